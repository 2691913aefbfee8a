"""Images shared over processes: the same files and numbers from one, two and three, uneven shares and idle processes too."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import carry_out, command
from stripes import CLASSES
from tiny_runs import tree, write_stripes

from latentdiff.cli import main
from latentdiff.utils import processes

WORLDS = (1, 2, 3)
FIFTEEN = ("--all-classes", "--num-images", 5, "--steps", 2, "--batch-size", 4)


def jobs(folder: Path, model: Path, data: Path, features: Path) -> dict[tuple[str, int], dict]:
    """Every command of these tests, to be carried out by one fresh interpreter."""
    wanted = {}
    for world in WORLDS:
        out = folder / str(world)
        out.mkdir()
        ways = {  # four batches, and one
            "folder": (*FIFTEEN, "--sampler", "ancestral", "--out", out / "folder"),
            "npz": (*FIFTEEN, "--out", out / "all.npz"),
            "few": (CLASSES[1], "--num-images", 2, "--steps", 2, "--out", out / "few.png"),
        }
        wanted |= {(name, world): ("generate", "--model", model, *how) for name, how in ways.items()}
        measure = ("--features", features, "--num-images", 15, "--steps", 2, "--cas-seeds", 0, "--seed", 3, "--batch-size", 4)
        wanted["evaluate", world] = ("evaluate", model, "--data", data, *measure, "--out", out / "measured")
    one = ("generate", CLASSES[0], "--model", model, "--num-images", 1, "--out", folder / "none.png")
    wanted["unknown class", 2] = ("generate", "striped", *one[1:])
    # One image, and three processes that find the mistake in making it
    wanted["unknown option", 3] = (*one, "--sampler", "euler", "--sampler-options", "bogus=1")
    return {(name, world): command(*arguments, world=world) for (name, world), arguments in wanted.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory, model, feature_folder) -> tuple[Path, dict]:
    """(folder with one folder for each number of processes, {(name, world): result})."""
    folder = tmp_path_factory.mktemp("shared")
    data = write_stripes(folder / "data" / "train", 600).parent  # so many that several processes have some to look at
    write_stripes(data / "test", 24, seed=1)
    wanted = jobs(folder, model, data, feature_folder)
    return folder, dict(zip(wanted, carry_out(list(wanted.values())), strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["folder", "npz", "few", "evaluate"])
def test_all_processes_end_well_and_one_speaks(done, name, world):
    result = done[1][name, world]
    assert result["codes"] == [0] * world, result["stderr"]
    shared = f"latentdiff {'evaluate' if name == 'evaluate' else 'generate'}: {world} process(es), device cpu"
    shared += "; 1 batch(es) to share, a smaller --batch-size makes more\n" if name == "few" else "\n"
    assert result["stderr"].count("process(es), device cpu") == result["stderr"].count(shared) == (world > 1)
    if name == "evaluate":
        assert json.loads(result["stdout"]) == json.loads((done[0] / str(world) / "measured" / "evaluation.json").read_text())
    else:
        assert len(result["stdout"].splitlines()) == 1


@pytest.mark.parametrize("world", WORLDS[1:])
def test_generated_files_are_those_of_one_process(done, world):
    one, several = (tree(done[0] / str(count)) for count in (1, world))
    assert len(one) == 15 + 2 + 6 + 1  # and the record's six files, and what is kept of the reference
    names = [path.relative_to(done[0] / "1") for path in one]
    assert sorted(names) == sorted(path.relative_to(done[0] / str(world)) for path in several)
    for name in names:
        if name.suffix == ".png":
            assert one[done[0] / "1" / name] == several[done[0] / str(world) / name], name
    a, b = (np.load(done[0] / str(count) / "all.npz") for count in (1, world))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
    assert a["arr_1"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(np.unique(a["arr_0"].reshape(15, -1), axis=0)) == 15  # no image stands for another


def numbers(values: dict, prefix: str = "") -> dict[str, float]:
    """Those of nested dicts, by dotted keys."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


@pytest.mark.parametrize("world", WORLDS[1:])
def test_measured_numbers_are_those_of_one_process(done, world):
    one, several = (json.loads((done[0] / str(count) / "measured" / "evaluation.json").read_text()) for count in (1, world))
    assert one["protocol"] == several["protocol"] and one["protocol"]["images"] == 15  # which has a hash of the samples
    # Of the same pixels: what is left is where memory lies, which moves float32 features in their last bit
    assert one["reference"] == several["reference"] and one["reference"]["images"] == 600  # with hashes of its images
    for part, rel in (("metrics", 1e-6), ("reconstruction", 1e-6), ("distribution", 1e-4), ("memorisation", 1e-4)):
        assert len(numbers(one[part])) >= 3
        assert numbers(one[part]) == pytest.approx(numbers(several[part]), rel=rel), part


@pytest.mark.parametrize(
    ("name", "world", "said"),
    [("unknown class", 2, "latentdiff: unknown class 'striped'"), ("unknown option", 3, "bogus")],
)
def test_a_mistake_is_said_once_and_ends_all(done, name, world, said):
    result = done[1][name, world]
    (line,) = [line for line in result["stderr"].splitlines() if "process(es)" not in line]
    assert line.startswith("latentdiff: ") and "Traceback" not in line
    assert said in line
    # The launcher ends the others by SIGTERM, which a command answers with status 75 where it still runs
    assert result["codes"][0] == 2 and set(result["codes"][1:]) <= {-15, 75} and result["stdout"] == ""
    assert result["seconds"] < processes.PATIENCE and not (done[0] / "none.png").exists()


def test_shares_are_neighbouring_whole_batches(monkeypatch):
    assert processes.share(7, 2) == slice(0, 7)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for world in (2, 3, 8):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for total in (0, 1, 7, 16):
            for batch in (1, 3, 20):
                parts = [processes.share(total, batch, rank) for rank in range(world)]
                assert [k for part in parts for k in range(total)[part]] == list(range(total))
                assert all(part.start % batch == 0 or part.start == total for part in parts)
                batches = [-(-(part.stop - part.start) // batch) for part in parts]
                assert max(batches) - min(batches) <= 1 and batches[0] == max(batches)


def test_one_process_joins_nothing(run, model, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("one process must not wait for others")

    monkeypatch.setenv("WORLD_SIZE", "4")  # of a job whose processes no launcher of torch's started
    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    monkeypatch.setattr("accelerate.state.PartialState.__init__", fail)
    assert run("generate", CLASSES[0], "--model", model, "--num-images", "1", "--steps", "1") == "samples.png\n"


def test_a_process_alone_with_its_trouble_says_so_in_the_end(capsys, monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", "nowhere"])
    assert stopped.value.code == 2 and waited == [processes.PATIENCE]
    assert "nowhere" in capsys.readouterr().err
