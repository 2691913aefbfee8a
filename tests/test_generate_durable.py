"""`generate` writes as it goes: it is stopped and goes on, in flat memory, one job at a time, and says what cannot be."""

import signal
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from stripes import CLASSES
from tiny_runs import tree

from latentdiff import generation
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.generation import generate
from latentdiff.utils import outputs, signals
from latentdiff.utils.locks import locked

SIX = {"num_images": 2, "steps": 2, "batch_size": 2, "all_classes": True, "progress": False}


def files(folder) -> dict[str, bytes]:
    return {path.name: data for path, data in tree(folder).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model) -> dict[str, bytes]:
    """The files of a call that nothing stopped."""
    return files(generate(model, out=tmp_path_factory.mktemp("whole") / "images", **SIX))


@pytest.fixture
def stopping(monkeypatch):
    """stopping(n, number): from now on the n-th batch that is made brings this signal to the process."""

    def arm(batch: int, number: int) -> list[int]:
        real, made = generation.generate_batches, []

        def counted(*args, **call):
            for images in real(*args, **call):
                made.append(len(made))
                if len(made) == batch:
                    signal.raise_signal(number)
                yield images

        monkeypatch.setattr(generation, "generate_batches", counted)
        return made

    return arm


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 75), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_ends_it_after_a_batch_and_the_same_call_goes_on(
    model, here, whole, capsys, monkeypatch, stopping, number, status
):
    made = stopping(2, number)
    command = ["generate", "--all-classes", "--model", str(model), "--num-images", "2", "--steps", "2", "--batch-size", "2"]
    command += ["--out", "images"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == status and len(made) == 2
    assert files(here / "images") == {name: whole[name] for name in sorted(whole)[:4]}
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"; run it again: latentdiff {' '.join(command)}")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    again = stopping(99, number)
    main(command)
    assert len(again) == 1 and files(here / "images") == whole  # the last batch alone was made


def test_a_finished_folder_is_left_as_it_is(model, tmp_path, whole, stopping):
    generate(model, out=tmp_path / "images", **SIX)
    made = stopping(99, signal.SIGTERM)
    assert generate(model, out=tmp_path / "images", **SIX) == tmp_path / "images"
    assert made == [] and files(tmp_path / "images") == whole


def test_lost_cut_off_and_half_written_images_are_made_again(model, tmp_path, whole):
    folder = tmp_path / "images"
    generate(model, out=folder, **SIX)
    names = sorted(whole)
    (folder / names[0]).unlink()
    (folder / names[2]).write_bytes(whole[names[2]][:-5])  # as after a loss of power
    (folder / names[3]).write_bytes(b"")
    (folder / f".{names[1]}.tmp").write_bytes(b"half")
    generate(model, out=folder, **SIX)
    assert files(folder) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "--seed 0, now 1"),
        ({"steps": 3}, "num_inference_steps 2, now 3"),
        ({"batch_size": 3}, "--batch-size 2, now 3"),
        ({"all_classes": False, "what": [CLASSES[0]] * 3}, "other subjects"),
        ({"precision": "bfloat16"}, '--precision "float32", now "bfloat16"'),
    ],
)
def test_images_of_another_call_are_neither_mixed_in_nor_replaced(model, tmp_path, change, words):
    folder = tmp_path / "images"
    generate(model, out=folder, **SIX)
    before = files(folder)
    with pytest.raises(UserError) as error:
        generate(model, out=folder, **{**SIX, **change})
    assert f"holds images of another call ({words})" in str(error.value) and "\n" not in str(error.value)
    assert files(folder) == before


def test_other_files_among_the_images_are_refused(model, tmp_path):
    folder = tmp_path / "images"
    generate(model, out=folder, **SIX)
    Image.new("L", (4, 4)).save(folder / "zzz.png")
    with pytest.raises(UserError, match="the folder is not empty"):
        generate(model, out=folder, **SIX)


def test_an_image_says_what_made_it(model, tmp_path):
    folder = generate(model, out=tmp_path / "images", **SIX)
    (path,) = folder.glob("00003-*.png")
    found = outputs.metadata(path)
    assert found["image"] == 3 and path.name == f"00003-{found['shows']}.png" and found["shows"] in CLASSES
    assert found["call"]["--seed"] == 0
    assert found["call"]["num_inference_steps"] == 2 and len(found["call"]["model"]) == 64
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    assert outputs.metadata(tmp_path / "plain.png") is None


@pytest.mark.parametrize("out", ["images", "all.npz", "grid.png"])
def test_two_calls_at_once_do_not_meet(model, tmp_path, out):
    path, entered, leave = tmp_path / out, threading.Event(), threading.Event()

    def hold():
        with locked(path, beside=bool(path.suffix)):
            entered.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(60)
    try:
        with pytest.raises(UserError, match=f"{path.name}: is in use by another run .*; wait for it, or name another --out"):
            generate(model, out=path, **SIX)
    finally:
        leave.set()
        holder.join()
    assert not path.exists()


@pytest.mark.parametrize("out", ["images", "all.npz"])
def test_memory_does_not_grow_with_the_images(model, tmp_path, monkeypatch, out):
    """Arrays of images that are alive at once: those of a batch, however many there are."""
    alive, most = [], []
    real = generation.generate_batches

    class Counted(np.ndarray):
        def __array_finalize__(self, base):
            pass

    def counted(*args, **call):
        import weakref

        for images, labels in real(*args, **call):
            array = images.view(Counted)
            alive.append(weakref.ref(array))
            del images
            most.append(sum(ref() is not None for ref in alive))
            yield array, labels
            del array

    monkeypatch.setattr(generation, "generate_batches", counted)
    generate(model, out=tmp_path / out, **{**SIX, "num_images": 20})
    assert len(most) == 30 and max(most) <= 3


def test_a_hundred_million_images_are_refused_before_any_is_made(refused, model, stopping):
    made = stopping(99, signal.SIGTERM)
    ask = ("generate", CLASSES[0], "--model", model, "--num-images", 10**12, "--steps", 1, "--out")
    assert "1000000000000 images are too many for one grid (1024); use .npz or a folder" in refused(*ask, "a.png")
    assert "images: 1,000,000,000,000 images take at least 4,096,000.0 GB, and the disk has" in refused(*ask, "images")
    assert "a.npz: 1,000,000,000,000 images take at least 768,000.0 GB" in refused(*ask, "a.npz")
    assert len(made) == 1  # of the npz, whose images' size is not known before


def test_an_npz_that_is_stopped_leaves_nothing(model, here, stopping):
    stopping(2, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(
            [
                "generate",
                "--all-classes",
                "--model",
                str(model),
                "--num-images",
                "2",
                "--steps",
                "2",
                "--batch-size",
                "2",
                "--out",
                "all.npz",
            ]
        )
    assert end.value.code == signals.STOPPED and list(here.iterdir()) == []


def test_an_npz_written_as_it_goes_is_what_numpy_writes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 1), dtype=np.uint8)
    labels = np.array([0, 1, -1, 2, 2])
    with outputs.npz_writer(tmp_path / "a.npz", labels) as add:
        for start in (0, 2, 4):
            add(images[start : start + 2])
    np.savez(tmp_path / "b.npz", images.repeat(3, -1), labels.astype(np.int64))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.npz").namelist() == ["arr_0.npy", "arr_1.npy"]


def test_a_full_disk_names_the_image(model, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"images/00000-across.png: cannot be written \(No space left on device\)"):
        generate(model, out=tmp_path / "images", **SIX)


def test_subjects_named_twice_count_on_without_a_list_of_all():
    images = generation.Numbered(["a", 1, "a"], 10**12)
    assert len(images) == 3 * 10**12 and images[-1] == ("a", 2 * 10**12 - 1, 2)
    assert images[10**12 : 10**12 + 2] == [(1, 0, 1), (1, 1, 1)]
    with pytest.raises(IndexError):
        images[3 * 10**12]
