"""What users have on disk from before the modules were moved still works: runs, caches, configs, checkpoints, imports.

The files in tests/fixtures/before-the-move were made by the code before; its README lists them.

Results are compared with a tolerance, because processors round differently. On a processor with AVX-512 everything was equal
to the bit. Under ATEN_CPU_CAPABILITY=avx2 with ONEDNN_MAX_CPU_ISA=AVX2, and under default with SSE41, weights differed by at
most 2.4e-7, logged values by 1e-6 of themselves, and images by one grey level; by two for dopri5, which chooses its steps by
their error. A state that is not taken up in full shows: the steps after the stop change weights by more than 1e-3.
"""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import latentdiff
from latentdiff import _moved, samplers
from latentdiff.cli import main
from latentdiff.config import load_config

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "fixtures" / "before-the-move"
WEIGHTS = dict(rtol=1e-5, atol=5e-6)
METRICS = dict(rel=1e-4, abs=1e-6)
GREY_LEVELS, GREY_LEVELS_DOPRI5 = 1, 4
TOLERANT = {"rtol": 1e-3, "atol": 1e-3}  # of dopri5, which takes seconds by default
IMAGES = dict(np.load(FOLDER / "expected" / "images.npz"))
SAMPLERS = sorted(name.removeprefix("generate-") for name in IMAGES if name.startswith("generate-"))
MODULES = json.loads((FOLDER / "modules.json").read_text())
FOR_GOOD = "latentdiff.samplers.of_pipeline"  # every checkpoint's pipeline.py imports it, so it never warns


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the old files as the working folder."""
    folder = tmp_path / "old"
    shutil.copytree(FOLDER, folder)
    shutil.copytree(folder / "data", folder / "captioned", dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def steps():
    """A list that gets the name of each optimizer's class as it takes a step."""
    taken = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: taken.append(type(optimizer).__name__))
    yield taken
    handle.remove()


@pytest.fixture
def encoded(monkeypatch):
    """A list that gets the number of images whenever an autoencoder encodes some."""
    counts = []
    for cls in (diffusers.AutoencoderKL, diffusers.VQModel):
        encode = cls.encode

        def counting(self, x, *args, encode=encode, **kwargs):
            counts.append(len(x))
            return encode(self, x, *args, **kwargs)

        monkeypatch.setattr(cls, "encode", counting)
    return counts


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_metrics(run: Path, expected: Path) -> None:
    """The resumed run logs what the unbroken one logged: its means also hold steps from before the stop."""
    lines, expected_lines = read_lines(run), read_lines(expected)
    assert [list(line) for line in lines] == [list(line) for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(expected_line, **METRICS)


def check_weights(weights: dict, expected: dict, before: dict) -> None:
    """The expected averaged weights, which are far from those that the stopped run had."""
    assert list(weights) == list(expected) == list(before)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, **WEIGHTS, msg=lambda text, key=key: f"{key}: {text}")
    assert max(float((before[key] - value).abs().max()) for key, value in expected.items()) > 1e-3


@pytest.mark.parametrize(("name", "stopped_after", "optimizers"), [("stage1", 3, 2), ("codes", 4, 1)])
def test_a_stopped_run_of_stage_1_goes_on(old, steps, name, stopped_after, optimizers):
    run = old / "stopped" / name
    first_lines = (run / "metrics.jsonl").read_text()
    before = load_file(run / "state" / f"step-{stopped_after}" / "ema.safetensors")
    main(["train", f"{name}.yaml", "--resume"])
    assert len(steps) == (6 - stopped_after) * optimizers
    assert (run / "metrics.jsonl").read_text().startswith(first_lines)
    check_metrics(run / "metrics.jsonl", old / "expected" / f"{name}.metrics.jsonl")
    averages = load_file(run / "state" / "step-6" / "ema.safetensors")
    check_weights(averages, load_file(old / "expected" / f"{name}.safetensors"), before)
    published = load_file(run / "autoencoder" / "diffusion_pytorch_model.safetensors")
    check_weights(published, load_file(old / "expected" / f"{name}.autoencoder.safetensors"), before)


@pytest.mark.parametrize("name", ["stage2", "text"])
def test_a_stopped_run_of_stage_2_goes_on_with_its_latent_cache(old, steps, encoded, name):
    run = old / "stopped" / name
    first_lines = (run / "metrics.jsonl").read_text()
    before = load_file(run / "state" / "step-3" / "ema.safetensors")
    cache = {path.name: path.read_bytes() for path in (run / "latents").iterdir()}
    main(["encode", f"{name}.yaml"])
    assert encoded == []
    main(["train", f"{name}.yaml", "--resume"])
    assert len(steps) == 3
    assert sum(encoded) == 6  # the held-out images, for the validation loss; the 18 to train on are in the cache
    assert {path.name: path.read_bytes() for path in (run / "latents").iterdir()} == cache
    assert (run / "metrics.jsonl").read_text().startswith(first_lines)
    check_metrics(run / "metrics.jsonl", old / "expected" / f"{name}.metrics.jsonl")
    averages = load_file(run / "state" / "step-6" / "ema.safetensors")
    check_weights(averages, load_file(old / "expected" / f"{name}.safetensors"), before)
    published = load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    prefix = "" if name == "stage2" else "unet."
    assert all(torch.equal(value, averages[prefix + key].half()) for key, value in published.items())


@pytest.mark.parametrize(("which", "kind"), [(["--step", "3"], "snapshots"), (["--best"], "state")])
def test_an_old_snapshot_and_the_best_state_are_published(old, steps, encoded, which, kind):
    main(["publish", "stopped/stage2", *which, "--out", "published"])
    weights = load_file(old / "published" / "unet" / "diffusion_pytorch_model.safetensors")
    average = load_file(old / "stopped" / "stage2" / kind / "step-3" / "ema.safetensors")
    assert steps == encoded == [] and set(weights) == set(average)
    assert all(torch.equal(weights[key], average[key].half()) for key in weights)


@pytest.mark.parametrize("name", ["stage1", "codes", "stage2", "text", "features", "classifier", "judge"])
def test_an_old_config_says_what_it_said(name):
    config = load_config(FOLDER / f"{name}.yaml").model_dump(mode="json")
    expected = json.loads((FOLDER / "expected" / "configs.json").read_text())[name]

    def differences(now, before, place=""):
        if not isinstance(before, dict):
            return [] if now == before else [f"{place}: {before!r} is now {now!r}"]
        missing = [f"{place}.{key}: missing" for key in before if key not in now]
        return missing + [line for key in before if key in now for line in differences(now[key], before[key], f"{place}.{key}")]

    assert differences(config, expected) == []


def test_every_sampler_of_before_is_there():
    assert len(SAMPLERS) == 13 and set(SAMPLERS) - {"scheduler"} <= set(samplers.names())


@pytest.fixture(scope="module")
def by_diffusers(tmp_path_factory):
    """by_diffusers(folder) -> the pipeline that plain diffusers makes of a folder, with its own pipeline.py."""
    opened = {}
    patch = pytest.MonkeyPatch()
    modules = str(tmp_path_factory.mktemp("modules"))
    patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", modules)
    patch.syspath_prepend(modules)

    # Python would give the pipeline.py that an earlier test has opened under the same module name
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        patch.delitem(sys.modules, name)

    def call(folder: str):
        if folder not in opened:
            pipe = DiffusionPipeline.from_pretrained(FOLDER / folder, trust_remote_code=True)
            file = Path(inspect.getsourcefile(type(pipe)))
            assert file.is_relative_to(modules) and file.read_bytes() == (FOLDER / folder / "pipeline.py").read_bytes()
            pipe.set_progress_bar_config(disable=True)
            opened[folder] = pipe
        return opened[folder]

    yield call
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]
    patch.undo()


@pytest.fixture(scope="module")
def by_latentdiff():
    """The pipeline that latentdiff makes of the old checkpoint."""
    pipe = latentdiff.LatentDiffusionPipeline.from_pretrained(FOLDER / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_images(images: np.ndarray, expected: np.ndarray, tolerance: int = GREY_LEVELS) -> None:
    assert images.dtype == expected.dtype == np.uint8 and images.shape == expected.shape
    assert expected.std() > 20
    assert int(abs(images.astype(int) - expected.astype(int)).max()) <= tolerance


def call(pipe, sampler: str | None, **what) -> np.ndarray:
    """Four images as make_before_the_move.py has drawn them."""
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    options = TOLERANT if sampler == "dopri5" else None
    call = {"num_inference_steps": 6, "sampler": sampler, "sampler_options": options}
    images = pipe(**what, **call, generator=generators, output_type="np").images
    return np.round(images * 255).astype(np.uint8)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_old_checkpoint_samples_as_before(sampler, tmp_path, by_diffusers, by_latentdiff):
    name = None if sampler == "scheduler" else sampler
    labels, tolerance = ["across", "down", 2, None], GREY_LEVELS_DOPRI5 if sampler == "dopri5" else GREY_LEVELS
    check_images(call(by_diffusers("model"), name, class_labels=labels), IMAGES[f"call-{sampler}"], tolerance)
    check_images(call(by_latentdiff, name, class_labels=labels), IMAGES[f"call-{sampler}"], tolerance)
    flag = [] if name is None else ["--sampler", name]
    if name == "dopri5":
        flag += ["--sampler-options", *(f"{key}={value}" for key, value in TOLERANT.items())]
    what = ["across", "down", "--num-images", "2", "--steps", "6", "--seed", "5"]
    main(["generate", *what, "--model", str(FOLDER / "model"), "--out", str(tmp_path / "drawn.npz"), *flag])
    with np.load(tmp_path / "drawn.npz") as file:
        check_images(file["arr_0"], IMAGES[f"generate-{sampler}"], tolerance)


def test_an_old_checkpoint_without_a_scheduler_takes_its_own_sampler(by_diffusers):
    prompts, labels = ["across stripes", "a picture of down", "blank stripes", None], ["across", "down", None, "blank"]
    images = call(by_diffusers("text-model"), None, prompt=prompts, class_labels=labels)
    check_images(images, IMAGES["text-default"])


IMPORT_ALL = """
import importlib, json, sys, types, warnings

def kind(value):
    if isinstance(value, type):
        return "class"
    if isinstance(value, types.FunctionType | types.ModuleType | int | float | str | tuple | list | dict | frozenset):
        return type(value).__name__
    return "other"

results = {}
for name, kinds in json.load(sys.stdin).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(name)
        texts = [str(w.message) for w in caught if w.category is DeprecationWarning]
        texts = [text for text in texts if text.startswith(f"{name} has moved")]
        values = {key: getattr(module, key) for key in kinds if hasattr(module, key)}
    names = {key: getattr(value, "__name__", None) for key, value in values.items()}
    results[name] = {"warnings": texts, "kinds": {key: kind(value) for key, value in values.items()}, "names": names}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, dict]:
    """What a new process gets that imports every old module, one after the other."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], input=json.dumps(MODULES), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_still_there(module: str) -> bool:
    path = ROOT / Path(*module.removeprefix("latentdiff.").split("."))
    path = path if module.startswith("latentdiff.pipelines") else ROOT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_an_old_module_is_imported_with_its_names(imported, module):
    """Where this fails, a name has moved or is gone: put it into latentdiff/_moved.py."""
    old = module.removeprefix("latentdiff.")
    result = imported[module]
    expected = {name: kind for name, kind in MODULES[module].items() if f"{old}.{name}" not in _moved.REMOVED}
    gone = {f"{old}.{name}" for name in expected if name not in result["kinds"]}
    assert not gone, f"put these into NAMES or REMOVED of latentdiff/_moved.py: {sorted(gone)}"
    assert result["kinds"] == expected
    for name, kind in expected.items():
        if kind in ("class", "function"):
            new = _moved.NAMES.get(f"{old}.{name}", name).rpartition(".")[2]
            assert result["names"][name] == new, name
    if is_still_there(module):
        assert result["warnings"] == []
    else:
        (warning,) = result["warnings"]
        new = _moved.MODULES.get(old)
        assert warning.endswith(f"use latentdiff.{new}" if new else "its functions are elsewhere")


def test_the_map_names_what_there_was_and_what_there_is():
    old_names = {f"{module}.{name}".removeprefix("latentdiff.") for module, kinds in MODULES.items() for name in kinds}
    assert {f"latentdiff.{old}" for old in _moved.MODULES} <= set(MODULES)
    assert set(_moved.NAMES) | _moved.REMOVED <= old_names
    assert not set(_moved.NAMES) & _moved.REMOVED
    for new in _moved.MODULES.values():
        assert is_still_there(f"latentdiff.{new}"), new


def test_a_removed_name_is_refused_in_one_line():
    with pytest.warns(DeprecationWarning, match="latentdiff.planning.stages has moved; use latentdiff.training.estimate"):
        sys.modules.pop("latentdiff.planning.stages", None)
        module = importlib.import_module("latentdiff.planning.stages")
    with pytest.raises(AttributeError, match="no attribute 'class_count'; it was removed, and nothing replaces it"):
        module.class_count  # noqa: B018
    with pytest.raises(AttributeError, match="'never_there'"):
        module.never_there  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="latentdiff.planning.never_there"):
        importlib.import_module("latentdiff.planning.never_there")


def python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)


def test_a_script_is_warned_by_default_and_the_library_itself_uses_no_old_name():
    old = python("import latentdiff.rng; from latentdiff.evaluation.judge import JudgeNet; print(JudgeNet.__module__)")
    assert old.returncode == 0 and old.stdout.split() == ["latentdiff.models.judge_net"], old.stderr
    assert "latentdiff.rng has moved; use latentdiff.utils.random" in old.stderr
    assert "latentdiff.evaluation.judge.JudgeNet has moved; use latentdiff.models.judge_net.JudgeNet" in old.stderr
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "latentdiff").rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    new = python("\n".join(f"import {name}" for name in names), "-W", "error:latentdiff")
    assert new.returncode == 0, new.stderr


def test_the_name_that_checkpoints_import_gives_no_warning():
    code = f"import importlib; print(importlib.import_module({FOR_GOOD!r}).by_sampler.__name__)"
    done = python(code, "-W", "error:latentdiff")
    assert done.stdout.split() == ["by_sampler"], done.stderr
