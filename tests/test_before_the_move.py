"""What users have on disk from before the modules were moved still works: runs, caches, configs, checkpoints, imports.

The files in tests/fixtures/before-the-move were made by the code before; its README lists them.

Results are compared with a tolerance, because processors round differently. Made again with the instruction sets default,
avx2 and avx512 of torch and oneDNN, weights differed by at most 2e-6 and images by at most 1 grey level in 255. A state that
is not taken up in full shows: three steps change weights by 1e-2.
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
from latentdiff import samplers
from latentdiff.cli import main
from latentdiff.config import load_config

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "fixtures" / "before-the-move"
WEIGHTS = dict(rtol=1e-4, atol=2e-5)  # ten times what two instruction sets differ by
GREY_LEVELS = 2
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
        assert line == pytest.approx(expected_line, rel=1e-3, abs=1e-5)


def check_weights(weights: dict, expected: dict, before: dict) -> None:
    """The expected averaged weights, which are far from those that the stopped run had."""
    assert list(weights) == list(expected) == list(before)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, **WEIGHTS, msg=lambda text, key=key: f"{key}: {text}")
    assert max(float((before[key] - value).abs().max()) for key, value in expected.items()) > 100 * WEIGHTS["atol"]


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

    def call(folder: str):
        if folder not in opened:
            pipe = DiffusionPipeline.from_pretrained(FOLDER / folder, trust_remote_code=True)
            file = Path(inspect.getsourcefile(type(pipe)))
            assert file.is_relative_to(modules) and file.read_bytes() == (FOLDER / folder / "pipeline.py").read_bytes()
            pipe.set_progress_bar_config(disable=True)
            opened[folder] = pipe
        return opened[folder]

    yield call
    patch.undo()


@pytest.fixture(scope="module")
def by_latentdiff():
    """The pipeline that latentdiff makes of the old checkpoint."""
    pipe = latentdiff.LatentDiffusionPipeline.from_pretrained(FOLDER / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_images(images: np.ndarray, expected: np.ndarray) -> None:
    assert images.dtype == expected.dtype == np.uint8 and images.shape == expected.shape
    assert expected.std() > 20
    assert int(abs(images.astype(int) - expected.astype(int)).max()) <= GREY_LEVELS


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
    labels = ["across", "down", 2, None]
    check_images(call(by_diffusers("model"), name, class_labels=labels), IMAGES[f"call-{sampler}"])
    check_images(call(by_latentdiff, name, class_labels=labels), IMAGES[f"call-{sampler}"])
    flag = [] if name is None else ["--sampler", name]
    if name == "dopri5":
        flag += ["--sampler-options", *(f"{key}={value}" for key, value in TOLERANT.items())]
    what = ["across", "down", "--num-images", "2", "--steps", "6", "--seed", "5"]
    main(["generate", *what, "--model", str(FOLDER / "model"), "--out", str(tmp_path / "drawn.npz"), *flag])
    with np.load(tmp_path / "drawn.npz") as file:
        check_images(file["arr_0"], IMAGES[f"generate-{sampler}"])


def test_an_old_checkpoint_without_a_scheduler_takes_its_own_sampler(by_diffusers):
    what = {"prompt": ["across stripes", "a picture of down", "blank stripes", None], "class_labels": ["across", "down", None, "blank"]}
    check_images(call(by_diffusers("text-model"), None, **what), IMAGES["text-default"])


IMPORT_ALL = """
import importlib, json, sys, warnings
modules = json.loads(sys.stdin.read())
def kind(value):
    import types
    if isinstance(value, type):
        return "class"
    if isinstance(value, types.FunctionType | types.ModuleType | int | float | str | tuple | list | dict | frozenset):
        return type(value).__name__
    return "other"
found = {}
for name, kinds in modules.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            found[name] = {"error": str(error)}
            continue
        said = [str(w.message) for w in caught if w.category is DeprecationWarning and name in str(w.message)]
        values = {key: getattr(module, key) for key in kinds if hasattr(module, key)}
    found[name] = {
        "warnings": said,
        "kinds": {key: kind(value) for key, value in values.items()},
        "named": {key: getattr(value, "__name__", None) for key, value in values.items()},
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, dict]:
    """What a new process finds that imports every old module, one after the other."""
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, input=json.dumps(MODULES), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def is_still_there(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    if module.startswith("latentdiff.pipelines"):
        path = ROOT / Path(*module.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_an_old_module_is_imported_with_its_names(imported, module):
    result = imported[module]
    assert "error" not in result
    assert result["kinds"] == MODULES[module]
    if is_still_there(module) or module == FOR_GOOD:
        assert result["warnings"] == []
    else:
        (warning,) = result["warnings"]
        assert "\n" not in warning


def test_the_name_that_checkpoints_import_gives_no_warning():
    command = [sys.executable, "-W", "error::DeprecationWarning:latentdiff", "-W", "error::DeprecationWarning:__main__"]
    line = f"import importlib; print(importlib.import_module({FOR_GOOD!r}).by_sampler.__name__)"
    done = subprocess.run([*command, "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "by_sampler", done.stderr
    assert hasattr(importlib.import_module(FOR_GOOD), "by_sampler")
