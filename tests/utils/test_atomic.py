"""Files and folders that are the old or the new ones, whole; what a kill leaves is known by its name and removed."""

import errno
import os
import subprocess
import sys
import threading

import pytest
from PIL import Image

from latentdiff.checkpoints import resolve_model
from latentdiff.errors import UserError
from latentdiff.utils import atomic, locks
from latentdiff.utils.images import save_png


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text):
    with atomic.new_folder(folder) as new:
        (new / "part").mkdir()
        (new / "part" / "file").write_text(text)


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def test_a_folder_takes_the_place_of_the_old_one(tmp_path, way):
    for text in ("old", "new"):
        fill(tmp_path / "model", text)
        assert (tmp_path / "model" / "part" / "file").read_text() == text and names(tmp_path) == ["model"]
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_folders_are_exchanged_where_the_system_can(tmp_path, monkeypatch):
    fill(tmp_path / "model", "old")
    renamed = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: renamed.append(paths) or rename(*paths))
    fill(tmp_path / "model", "new")
    if not renamed:  # else this file system cannot
        assert (tmp_path / "model" / "part" / "file").read_text() == "new"


def test_an_error_leaves_the_old_folder(tmp_path, way):
    fill(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "model") as new:
        (new / "half").touch()
        raise ZeroDivisionError
    with pytest.raises(UserError) as said, atomic.new_folder(tmp_path / "model") as new:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(said.value) == f"{tmp_path / 'model'}: cannot be written (No space left on device)"
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "part" / "file").read_text() == "old"


def test_what_stood_aside_when_a_process_was_killed_comes_back(tmp_path):
    fill(tmp_path / "model", "old")
    os.rename(tmp_path / "model", tmp_path / ".model.old-0123abcd")
    (tmp_path / ".model.new-0123abcd").mkdir()
    atomic.recover(tmp_path / "model")
    assert (tmp_path / "model" / "part" / "file").read_text() == "old"
    fill(tmp_path / "model", "new")
    assert names(tmp_path) == ["model"]


def test_a_reader_finds_what_stood_aside(tmp_path):
    fill(tmp_path / "model", "old")
    os.rename(tmp_path / "model", tmp_path / ".model.old-0123abcd")
    with locks.locked(tmp_path / "model", beside=True):
        code = "from latentdiff.utils import atomic\nfrom pathlib import Path\n"
        code += f"atomic.put_back(Path({str(tmp_path / 'model')!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert not (tmp_path / "model").exists()  # somebody is at work on it
    assert resolve_model(tmp_path / "model") == tmp_path / "model" and names(tmp_path) == ["model"]


def test_files_that_the_block_does_not_write_are_kept_on_demand(tmp_path):
    fill(tmp_path / "net", "old")
    (tmp_path / "net" / "README.md").write_text("mine")
    with atomic.new_folder(tmp_path / "net", keep=True) as new:
        (new / "weights").touch()
    assert names(tmp_path / "net") == ["README.md", "part", "weights"]


def test_a_file_is_the_old_or_the_new_one_and_a_full_disk_names_it(tmp_path):
    atomic.write_text(tmp_path / "a" / "file", "old")
    with pytest.raises(UserError) as said, atomic.new_file(tmp_path / "a" / "file") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(said.value) == f"{tmp_path / 'a' / 'file'}: cannot be written (No space left on device)"
    assert names(tmp_path / "a") == ["file"] and (tmp_path / "a" / "file").read_text() == "old"
    save_png(Image.new("L", (2, 2)), tmp_path / "b" / "x.png")
    assert names(tmp_path / "b") == ["x.png"]


def test_a_file_that_is_read_and_not_there_is_not_said_to_be_unwritable(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.new_file(tmp_path / "file"):
        (tmp_path / "source").read_bytes()
    assert names(tmp_path) == []


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    others = [".hidden", ".git-1234abcd", "model", "x.tmp", ".npz", ".run.json", ".model", ".cache"]
    leftovers = [
        ".model-a1b2c3d4",
        ".writing-a1b2c3d4",
        ".saving-________",
        ".x.4711.npz",
        ".run.json.tmp",
        ".step-7.tmp",
        ".autoencoder.new-0123abcd",
        ".model.old-0123abcd",
        ".step-7.old-0123abcd.tmp",
        f"manifest.{'0f' * 16}.tmp",
    ]
    places = [tmp_path, tmp_path / "state", tmp_path / ".cache"]
    for inside in places:
        for name in others + leftovers:
            (inside / name).mkdir(parents=True, exist_ok=True)
            (inside / name / "inside").touch()
    for name in (".metrics.jsonl.0123abcd.tmp", f".model{locks.NAME}", f"state/{locks.NAME}"):
        (tmp_path / name).touch()
    atomic.sweep(tmp_path)
    assert names(tmp_path) == sorted([*others, "state"]) and names(tmp_path / "state") == sorted(others)
    assert names(tmp_path / ".cache") == sorted([*others, *leftovers, "inside"])  # a hidden folder belongs to somebody else


def test_what_another_job_is_writing_is_not_swept(tmp_path):
    with atomic.new_folder(tmp_path / "model"), locks.locked(tmp_path / "latents"):
        (tmp_path / "latents" / ".shard.tmp").touch()
        code = f"from latentdiff.utils import atomic\nfrom pathlib import Path\natomic.sweep(Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert (tmp_path / "latents" / ".shard.tmp").exists() and len(list(tmp_path.glob(".model.new-*"))) == 1
    assert names(tmp_path) == ["latents", "model"]


def test_sweeping_puts_back_a_folder_that_is_missing(tmp_path):
    (tmp_path / "run" / ".model.old-0123abcd").mkdir(parents=True)
    atomic.sweep(tmp_path / "run")
    assert names(tmp_path / "run") == ["model"]


def test_two_jobs_do_not_publish_into_one_folder(tmp_path):
    said = []

    def other():
        try:
            fill(tmp_path / "model", "other")
        except UserError as error:
            said.append(str(error))

    with atomic.new_folder(tmp_path / "model"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert said and said[0].startswith(f"{tmp_path / 'model'}: is in use by another run")
