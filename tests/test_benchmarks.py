"""The benchmarks' own arithmetic; what they measure is measured by hand (tests/benchmarks/README.md)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_a_cell_says_the_median_and_the_range_of_its_values(benchmark):
    table = benchmark("reporting").Table(
        "T", {"a": "{:.1f}", "b": "{:.0%}"}, {"x": {"a": [3.0, 1.0, 2.0], "b": [0.5]}, "y": {}}
    )
    assert [table.cell("x", "a"), table.cell("x", "b"), table.cell("y", "a")] == ["2.0 (1.0 to 3.0)", "50%", "–"]
    assert "| x | 2.0 (1.0 to 3.0) | 50% |" in table.markdown() and "| y | – | – |" in table.markdown()


def test_runs_laid_over_each_other_show_the_spread_of_their_medians(benchmark):
    reporting = benchmark("reporting")
    first = reporting.Table(
        "T", {"a": "{:.0f}", "once": "{:.0f}"}, {"x": {"a": [1.0, 2.0, 90.0], "once": [7.0]}}, {"rate": 1.0}
    )
    second = reporting.Table("T", {"a": "{:.0f}"}, {"x": {"a": [4.0]}}, {"rate": 3.0})
    (both,) = reporting.laid_over([reporting.from_json(f"noise\n{reporting.as_json([t])}\n") for t in (first, second)])
    assert both.rows == {"x": {"a": [2.0, 4.0], "once": [7.0]}} and both.about == {"rate": 2.0}


def test_repeated_runs_are_processes_of_their_own_and_the_later_ones_leave_out_what_is_dear(benchmark, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, os, argparse; sys.path.insert(0, {str(BENCHMARKS)!r}); import reporting\n"
        "def work(found):\n"
        "    row = {'pid': [os.getpid()], 'dear': [1] * found.dear}\n"
        "    return [reporting.Table('T', {'pid': '{}', 'dear': '{}'}, {'x': row})]\n"
        "parser = argparse.ArgumentParser(); parser.add_argument('--dear', type=int)\n"
        "reporting.command(parser, work, later=['--dear', '0'])\n"
    )
    (table,) = benchmark("reporting").run_again(str(script), ["--repeat", "3", "--dear", "2"])
    assert len(set(table.rows["x"]["pid"])) == 3 and table.rows["x"]["dear"] == [1]


def test_a_round_times_every_contender_once_and_one_that_is_not_installed_is_left_out(benchmark, capsys):
    speed, contenders = benchmark("speed"), benchmark("contenders")
    seen = []

    def missing(setting):
        raise ImportError("No module named 'peer'")

    def builder(name):
        return lambda setting: contenders.Contender(lambda number: seen.append((name, number)), torch.nn.Linear(2, 3))

    setting = contenders.Setting(Path(), 8, torch.device("cpu"))
    found = speed.build({speed.OURS: builder("ours"), "other": builder("other"), "peer": missing}, setting)
    assert list(found) == [speed.OURS, "other"] and "peer: left out (No module named 'peer')" in capsys.readouterr().err
    table = speed.stage_table("T", found, setting, 8, 2)
    timed = [step for step in seen if step[1]]
    assert timed == [("other", 1), ("ours", 1), ("ours", 2), ("other", 2)]
    assert len(table.rows["other"][speed.TIMES]) == 2 and set(table.rows[speed.OURS][speed.TIMES]) == {1.0}
    assert table.rows["other"]["M parameters"] == [9e-6]


def test_a_step_is_credited_with_the_operations_it_does(benchmark):
    speed, contenders = benchmark("speed"), benchmark("contenders")
    layer = torch.nn.Linear(64, 32, bias=False)
    contender = contenders.Contender(lambda number: layer(torch.ones(8, 64, requires_grad=True)).sum().backward(), layer)
    assert speed.flops(contender) == 3 * 2 * 8 * 64 * 32  # forward, and the gradients of weights and input


def test_the_peak_is_of_this_process_alone_and_stays_when_memory_is_given_back():
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import speed, torch; here = torch.device('cpu')\n"
        "before = speed.peak(here); torch.ones(2**26); print(speed.peak(here) - before)"  # 256 MiB, freed at once
    )
    kept = bytearray(b"1" * 2**29)  # the parent is larger than the child ever is
    grown = float(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert 250 < grown < 300 and len(kept) == 2**29


def test_nothing_stands_in_for_torchvision_once_the_peer_is_read(benchmark):
    peers = benchmark("peers")
    before = sys.modules.get("torchvision")
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        with pytest.raises(ImportError, match="denoising_diffusion_pytorch"):
            peers._lucidrains()
    else:
        peers._lucidrains()
    assert sys.modules.get("torchvision") is before


def test_the_summary_reads_cells_that_the_tables_have(benchmark):
    speed, sampling, reporting = benchmark("speed"), benchmark("sampling"), benchmark("reporting")
    stage2, stage1 = speed.STAGES.values()
    row = {speed.TIMES: [2.5], speed.SHARE: [0.5]}
    trained = [reporting.Table("T", dict(speed.FORMATS), {name: row for name in stage}) for stage in (stage2, stage1)]
    images = reporting.Table("T", {}, {name: {} for name in (sampling.PEER, sampling.OURS)})
    draws = {name: (lambda classes, seed: None) for name in images.rows}
    for batch in (1, 64):
        sampling.add_rates(images, draws, batch, 1, torch.device("cpu"))
    starts = reporting.Table(
        "T", {"seconds": "{:.1f}"}, {name: {"seconds": [5.0]} for name in ("16 images", "of these start-up")}
    )
    lines = benchmark("all").summary(*trained, images, starts).splitlines()
    assert len(lines) == 5 + 5 + 1 + 2 + 2 + 2 and not any(line.endswith("– |") for line in lines), lines
    del trained[0].rows["MONAI, cached"]
    assert len(benchmark("all").summary(*trained, images, starts).splitlines()) == len(lines) - 1


def test_colours_are_measured_in_the_plane_of_cielab(benchmark):
    restoration = benchmark("restoration")
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [0.2, 0.2, 0.2]])[:, :, None, None].expand(3, 3, 2, 2)
    expected = torch.tensor([[80.8, 69.9], [68.3, -112.0], [0.0, 0.0]])  # of sRGB under D50
    assert (restoration.ab_of(corners) - expected[:, :, None, None]).abs().max() < 1


def test_trivial_colours_are_those_of_the_training_pictures_on_the_grey_that_is_given(benchmark):
    restoration = benchmark("restoration")
    train = torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.1], [1.0, 1.0, 1.0]])[:, :, None, None].expand(3, 3, 2, 2)
    seen = restoration.eight_bits(restoration.Grey()(train))
    for colours in (restoration.mean_colours, restoration.nearest_colours):
        assert (colours(train, seen) - train).abs().max() < 0.01
    brighter = restoration.nearest_colours(train, seen[:1] + 0.1)
    assert (brighter - train[:1] - 0.1).abs().max() < 0.01
