"""A latent cache that is damaged, or in which several jobs work at once: nothing wrong is read, nothing live is removed."""

import json
import os
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_latent_cache import N, PlainCodec, build, make_dataset
from tiny_text import TEXTS, own_prompts

from latentdiff.data.captions import Captions, build_states
from latentdiff.data.latent_cache import build_part, open_cache
from latentdiff.data.tensor_shards import building, content_sha256, shard_path, write_shard
from latentdiff.errors import UserError
from latentdiff.utils import locks, signals

PARTS = {"batch": 3, "shard_size": 8, "dtype": "float32"}


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def permute_labels(path) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as shard:
        facts = shard.metadata()
    save_file({**tensors, "labels": tensors["labels"].roll(1)}, path, facts)


def write_other_labels(path) -> None:
    """As `write_shard` would, so that the shard's own hash fits."""
    tensors = load_file(path)
    with safe_open(path, "pt") as shard:
        made_of = json.loads(shard.metadata()["facts"])["identity"]
    write_shard(path, {**tensors, "labels": tensors["labels"].roll(1)}, made_of)


@pytest.mark.parametrize("damage", [flip_a_bit, permute_labels, write_other_labels])
def test_a_damaged_shard_is_named_and_only_it_is_made_again(tmp_path, damage):
    build(tmp_path)
    whole, shard = files(tmp_path), shard_path(tmp_path, 1)
    damage(shard)
    for attempt in (lambda: open_cache(tmp_path), lambda: build(tmp_path)):
        with pytest.raises(UserError, match=r"shard-00001.safetensors: its content has sha256 \w{12}, and was") as error:
            attempt()
        assert "delete this file, and run `latentdiff encode` again" in str(error.value) and "\n" not in str(error.value)
    assert len(open_cache(tmp_path, check="size")) == N
    shard.unlink()
    codec = PlainCodec()
    build(tmp_path, codec)
    assert codec.encoded == 8 and files(tmp_path) == whole


def test_damage_before_the_cache_is_finished_is_not_taken_over(tmp_path):
    build_part(PlainCodec(), make_dataset(), tmp_path, **PARTS, rank=0, world=2)
    flip_a_bit(shard_path(tmp_path, 0))
    with pytest.raises(UserError, match="shard-00000.safetensors: its content"):
        build_part(PlainCodec(), make_dataset(), tmp_path, **PARTS, rank=1, world=2)
    assert not (tmp_path / "manifest.json").exists()


def test_the_manifest_has_the_hash_of_every_shard(tmp_path):
    build(tmp_path)
    hashes = json.loads((tmp_path / "manifest.json").read_text())["sha256"]
    assert hashes == [content_sha256(load_file(shard_path(tmp_path, number))) for number in range(3)]


class Elsewhere(PlainCodec):
    """The same encoder on another machine, where sums are rounded otherwise."""

    def moments(self, images):
        mean, std = super().moments(images)
        return mean * (1 + 1e-6), std


def test_a_shard_made_again_may_have_other_bytes(tmp_path):
    before = build(tmp_path).manifest["sha256"]
    shard_path(tmp_path, 1).unlink()
    after = build(tmp_path, Elsewhere()).manifest["sha256"]
    assert after[0] == before[0] and after[1] != before[1] and after[2] == before[2]
    assert len(open_cache(tmp_path)) == N


def test_a_manifest_without_hashes_opens_with_one_warning(tmp_path, capsys):
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert len(open_cache(tmp_path)) == len(open_cache(tmp_path)) == len(build(tmp_path)) == N
    assert capsys.readouterr().err.count("has no hashes, as an earlier version wrote it") == 1


def in_a_thread(work):
    """What work() gives or raises in another thread, which holds no lock of this one."""
    result: list = []

    def run():
        try:
            result.append(work())
        except UserError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return result[0]


def test_a_second_build_is_refused_and_removes_nothing(tmp_path):
    live = tmp_path / ".shard-00000.safetensors.0123abcd.tmp"
    with building(tmp_path):
        live.write_bytes(b"being written")
        for work in (lambda: build(tmp_path), lambda: build_part(PlainCodec(), make_dataset(), tmp_path, world=2)):
            refused = in_a_thread(work)
            assert isinstance(refused, locks.InUse) and str(refused).startswith(f"{tmp_path}: is in use by another run")
        assert live.exists() and not list(tmp_path.glob("shard-*"))
    build(tmp_path)  # now whoever wrote it is gone
    assert sorted(files(tmp_path)) == ["manifest.json", *(f"shard-0000{n}.safetensors" for n in range(3))]


def test_parts_work_at_the_same_time_and_one_part_once(tmp_path):
    live = tmp_path / ".shard-00000.safetensors.0123abcd.tmp"
    with building(tmp_path, 0, 2):
        live.write_bytes(b"being written")
        missing = in_a_thread(lambda: build_part(PlainCodec(), make_dataset(), tmp_path, **PARTS, rank=1, world=2))
        assert missing == [0, 2] and live.exists()
        refused = in_a_thread(lambda: build_part(PlainCodec(), make_dataset(), tmp_path, **PARTS, rank=0, world=2))
        assert isinstance(refused, locks.InUse) and "part-1-of-2: is in use" in str(refused)
        assert isinstance(in_a_thread(lambda: build(tmp_path)), locks.InUse)
    assert build_part(PlainCodec(), make_dataset(), tmp_path, **PARTS, rank=0, world=2) == []
    build(tmp_path / "alone")
    whole = files(tmp_path / "alone")
    (tmp_path / "alone").rename(tmp_path.with_name(f"{tmp_path.name}-alone"))
    assert files(tmp_path) == whole


def test_a_finished_cache_opens_while_another_job_has_it(tmp_path):
    build(tmp_path)
    with building(tmp_path):
        assert len(in_a_thread(lambda: build(tmp_path))) == N


class Signalled(PlainCodec):
    def moments(self, images):
        if self.encoded == 8:  # the first batch of the second shard
            os.kill(os.getpid(), signal.SIGTERM)
        return super().moments(images)


def test_a_signal_ends_after_the_shard_and_the_next_call_goes_on(tmp_path):
    with pytest.raises(signals.Stopped) as stopped:
        build(tmp_path, Signalled())
    assert stopped.value.code == 75
    assert sorted(files(tmp_path)) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    codec = PlainCodec()
    build(tmp_path, codec)
    build(tmp_path.with_name("unbroken"))
    assert codec.encoded == N - 16 and files(tmp_path) == files(tmp_path.with_name("unbroken"))


def test_a_full_disk_names_the_shard(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentdiff.data.tensor_shards.save_file", full)
    with pytest.raises(UserError, match=r"shard-00000.safetensors: cannot be written \(No space left on device\)"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_cache_are_hashed_with_their_place():
    labels = torch.arange(6)
    assert content_sha256({"labels": labels}) != content_sha256({"labels": labels.flip(0)})
    assert content_sha256({"a": labels}) != content_sha256({"b": labels})
    assert content_sha256({"a": labels}) != content_sha256({"a": labels.reshape(2, 3)})


def test_states_of_captions_are_hashed_too(tmp_path):
    prompts, captions = own_prompts(), Captions([tuple(TEXTS)])
    build_states(prompts, captions, tmp_path)
    (shard,) = tmp_path.iterdir()
    whole = shard.read_bytes()
    flip_a_bit(shard)
    with pytest.raises(UserError, match="shard-00000.safetensors: its content has sha256 .* delete this file, and start again"):
        build_states(prompts, captions, tmp_path)
    shard.unlink()
    (tmp_path / ".shard-00000.safetensors.0123abcd.tmp").write_bytes(b"half a shard")
    build_states(prompts, captions, tmp_path)
    assert files(tmp_path) == {shard.name: whole}


def test_a_killed_evaluation_leaves_nothing_beside_the_reference(tmp_path):
    from latentdiff.evaluation import feature_cache
    from latentdiff.evaluation.feature_statistics import FeatureStatistics
    from latentdiff.evaluation.frechet import Moments

    moments = Moments(2)
    moments.update(torch.arange(8.0).reshape(4, 2))
    path = tmp_path / "reference-0.safetensors"
    for leftover in (".reference-0.0123.tmp", ".reference-0.safetensors.01234567.tmp"):
        (tmp_path / leftover).write_bytes(b"half")
    feature_cache._write(path, FeatureStatistics(moments, None, "0", torch.zeros(4, 2)), {})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
