"""The latent cache: what is read is what was encoded, after kills too, and only for what it was made of."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.latent_cache import build_cache, identity, open_cache
from latentdiff.data.sources import ArraySource
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec

N = 22  # images: three shards of 8, the last one short


class PlainCodec:
    """An encoder with known moments, two channels at half size, that does not commute with mirroring; counts images."""

    def __init__(self, gain: float = 1.0):
        self.gain, self.encoded = gain, 0

    def moments(self, images):
        self.encoded += len(images)
        pooled = torch.nn.functional.avg_pool2d(images[:, :1], 2) * self.gain  # [B, 1, h, w]
        tilted = pooled * torch.arange(1.0, pooled.shape[-1] + 1)
        return torch.cat([pooled, tilted], 1), torch.cat([0.1 + 0 * pooled, 0.5 + pooled.abs()], 1)

    def fingerprint(self, latents_only=False):
        return hashlib.sha256(str(self.gain).encode()).hexdigest()


def make_dataset(n: int = N, seed: int = 0, **preprocess) -> ImageDataset:
    images = np.random.default_rng(seed).integers(0, 255, (n, 8, 8, 1), dtype=np.uint8)
    return ImageDataset(ArraySource("toy", images, torch.arange(n) % 3, ["a", "b", "c"]), Preprocess(**preprocess))


def build(folder: Path, codec=None, dataset=None, **options):
    defaults = {"batch": 3, "shard_size": 8, "dtype": "float32", "patience": 0.0}
    return build_cache(codec or PlainCodec(), dataset or make_dataset(), folder, **{**defaults, **options})


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_moments_labels_and_flips_come_back(tmp_path):
    dataset, codec = make_dataset(), PlainCodec()
    cache = build(tmp_path, codec, dataset, flips=True)
    index, flips = torch.tensor([21, 0, 8, 7, 8]), torch.tensor([False, True, True, False, False])
    images, labels = dataset.batch(index, flips=flips)
    mean, std = codec.moments(images)
    read = cache.moments(index, flips)
    torch.testing.assert_close(read[0], mean, rtol=0, atol=0)
    torch.testing.assert_close(read[1], std, rtol=0, atol=0)
    assert torch.equal(cache.batch(index, flips=flips)[0], mean) and torch.equal(cache.batch(index)[1], labels)
    assert len(cache) == N and cache.latent_shape == (2, 4, 4) and cache.class_names == ["a", "b", "c"]
    assert torch.equal(cache.labels, dataset.labels)
    with pytest.raises(IndexError):
        cache.batch([N])


def test_draws_are_fresh_with_the_right_moments_and_per_sample(tmp_path):
    cache = build(tmp_path)
    generator = torch.Generator().manual_seed(0)
    index = torch.full((4000,), 5)
    draws, (mean, std) = cache.batch(index, generator)[0], cache.moments([5])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(cache.batch(index, generator)[0], draws)
    assert ((draws.mean(0) - mean[0]).abs() < 5 * std[0] / 4000**0.5).all()
    assert (draws.std(0) / std[0] - 1).abs().max() < 5 / 8000**0.5  # five standard errors of a standard deviation
    each = [torch.Generator().manual_seed(k) for k in range(3)]
    together = cache.batch([1, 2, 3], each)[0]
    assert torch.equal(cache.batch([3], [torch.Generator().manual_seed(2)])[0][0], together[2])


def test_half_precision_is_near_and_overflow_is_refused(tmp_path):
    cache = build(tmp_path / "half", dtype="float16")
    exact = build(tmp_path / "single")
    torch.testing.assert_close(cache.moments(range(N))[0], exact.moments(range(N))[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(cache.moments(range(N))[0], exact.moments(range(N))[0])
    with pytest.raises(UserError, match="not finite as torch.float16: use dtype float32"):
        build(tmp_path / "large", PlainCodec(gain=1e6), dtype="float16")
    assert not list((tmp_path / "large").glob("*.safetensors"))  # nothing half-written
    with pytest.raises(UserError, match="valid are float16, float32"):
        build(tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("flips", [False, True])
def test_statistics_are_those_of_all_draws(tmp_path, flips):
    cache = build(tmp_path, flips=flips)
    sides = [cache.moments(range(N), side) for side in ([False, True] if flips else [False])]
    mean, std = (torch.cat(values).double().transpose(0, 1).flatten(1) for values in zip(*sides, strict=True))
    variance = mean.var(1, correction=0) + std.square().mean(1)
    got = cache.statistics()
    torch.testing.assert_close(got.mean, mean.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.std, variance.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.posterior_share, std.square().mean(1) / variance, rtol=1e-12, atol=0)


def test_another_autoencoder_preprocessing_or_data_is_named_and_refused(tmp_path):
    build(tmp_path)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    for codec, dataset, said in [
        (PlainCodec(2.0), make_dataset(), r"other autoencoder weights \(\w{12}, now \w{12}\);"),
        (PlainCodec(), make_dataset(framing="pad", multiple_of=16), r"other preprocessing \(padded_size .* now \[16"),
        (PlainCodec(), make_dataset(seed=1), r"other data \(\w{12}, now \w{12}\);"),
        (PlainCodec(2.0), make_dataset(seed=1), "other autoencoder weights .* and other data "),
    ]:
        for attempt in (
            lambda c=codec, d=dataset: open_cache(tmp_path, identity(c, d)),
            lambda c=codec, d=dataset: build(tmp_path, c, d),
        ):
            with pytest.raises(UserError, match=said) as error:
                attempt()
            assert str(tmp_path) in one_line(error)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before
    assert len(open_cache(tmp_path, identity(PlainCodec(), make_dataset()))) == N


def test_unfinished_shards_of_another_autoencoder_are_refused_too(tmp_path):
    with pytest.raises(UserError, match="waited 0 s for other processes, and shard-00001.safetensors and 0 more"):
        build(tmp_path, world=2, dataset=make_dataset(16))
    with pytest.raises(UserError, match="no finished latent cache"):
        open_cache(tmp_path)
    with pytest.raises(UserError, match="other autoencoder weights"):
        build(tmp_path, PlainCodec(2.0), make_dataset(16))


def test_flips_that_were_not_cached_are_refused_and_more_than_asked_is_fine(tmp_path):
    plain = build(tmp_path / "plain")
    with pytest.raises(UserError, match="without flips"):
        plain.batch([0], flips=True)
    with pytest.raises(UserError, match="other flips"):
        build(tmp_path / "plain", flips=True)
    build(tmp_path / "both", flips=True)
    codec = PlainCodec()
    assert build(tmp_path / "both", codec, dtype="float16", shard_size=5).has_flips and codec.encoded == 0


def test_truncated_shard_is_named_and_only_it_is_made_again(tmp_path):
    whole = build(tmp_path).moments(range(N))[0]
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="shard-00001.safetensors: truncated") as error:
        open_cache(tmp_path)
    one_line(error)
    codec = PlainCodec()
    assert torch.equal(build(tmp_path, codec).moments(range(N))[0], whole) and codec.encoded == 8
    build(tmp_path / "other", PlainCodec(2.0))
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(UserError, match="shard-00001.safetensors: of another cache"):
        open_cache(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json: not the manifest") as error:
        open_cache(tmp_path)
    one_line(error)


def test_progress_counts_up_to_all(tmp_path):
    seen: list[tuple[int, int]] = []
    build(tmp_path, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen) and seen[0] == (3, N) and seen[-1] == (N, N)


SLOW_BUILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_latent_cache import PlainCodec, build
class Slow(PlainCodec):
    def moments(self, images):
        time.sleep(0.2)
        return super().moments(images)
build(sys.argv[2], Slow(), rank=0, world=2, patience=60.0)
"""


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, "the build ended first"
        time.sleep(0.01)


def test_a_killed_build_goes_on_and_processes_share_the_work(tmp_path):
    # Rank 0 of two makes shards 0 and 2; it is killed when shard 0 is there, and a new one does the rest
    arguments = [str(Path(__file__).parent), str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, *arguments])
    wait_for(tmp_path / "killed" / "shard-00000.safetensors", process)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    (tmp_path / "killed" / "shard-00002.1.tmp").write_bytes(b"half a shard")  # what a kill while writing leaves
    made = (tmp_path / "killed" / "shard-00000.safetensors").stat().st_mtime_ns
    helper = Thread(target=build, args=(tmp_path / "killed",), kwargs={"rank": 1, "world": 2, "patience": 60.0})
    helper.start()
    codec = PlainCodec()
    cache = build(tmp_path / "killed", codec, rank=0, world=2, patience=60.0)
    helper.join(60)
    assert codec.encoded == N - 16  # shard 2 only: shard 0 was there, shard 1 was the other's
    assert (tmp_path / "killed" / "shard-00000.safetensors").stat().st_mtime_ns == made
    alone = build(tmp_path / "alone")
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert torch.equal(cache.moments(range(N))[1], alone.moments(range(N))[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_reading_needs_little_memory_of_its_own(tmp_path):
    shards, rows, shape = 8, 512, (4, 32, 32)
    made_of = {"count": shards * rows, "shard_size": rows, "flips": False, "dtype": "float16"}
    tensors = {name: torch.full((rows, *shape), 0.5, dtype=torch.float16) for name in ("mean", "std")}
    for number in range(shards):
        save_file(tensors, tmp_path / f"shard-{number:05d}.safetensors", {"identity": json.dumps(made_of)})
    manifest = {"identity": made_of, "latent_shape": shape, "labelled": False, "class_names": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    del tensors

    def anonymous_megabytes() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    cache = open_cache(tmp_path)
    cache.batch(range(0, len(cache), 64))
    before, peak = anonymous_megabytes(), 0.0
    for start in range(64):
        cache.batch(range(start, len(cache), 64))
        peak = max(peak, anonymous_megabytes())
    assert peak - before < 16  # of 64 MB on disk


def test_a_real_autoencoder_changes_its_cache_with_any_weight(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    codec, dataset = LatentCodec(vae), make_dataset()
    cache = build(tmp_path, codec, dataset)
    mean, std = codec.moments(dataset.batch(range(9))[0])
    torch.testing.assert_close(cache.moments(range(9))[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.moments(range(9))[1], std, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    with pytest.raises(UserError, match="other autoencoder weights"):
        build(tmp_path, LatentCodec(vae), dataset)
