import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_unet, tiny_vae

from latentdiff import checkpoints
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import autoencoder_folder, load_autoencoder
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.utils import shipped

NAMES = ["T-shirt/top", "Bag", "42"]


def publish(folder, **changes):
    torch.manual_seed(0)
    arguments = dict(
        unet=tiny_unet(),
        vae=tiny_vae(),
        scheduler=DDIMScheduler(),
        meta={"steps": 7, "metrics": {"psnr_db": 27.5}},
        class_names=NAMES,
        null_class=3,
        image_size=(6, 5),
        default_guidance_scale=1.5,
        default_guidance_interval=(0.0, 1.0),
    )
    return checkpoints.save(folder, **{**arguments, **changes})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def folder(tmp_path):
    return publish(tmp_path / "model")


def pixels(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    call = dict(class_labels=["Bag", 0, None], guidance_scale=2.0, num_inference_steps=4, output_type="np")
    return pipe(**call, generator=generators).images


def test_what_is_published_is_what_is_loaded(published):
    pipe = checkpoints.load(published)
    assert pipe.class_names == NAMES
    assert pipe.config.null_class == 3 and list(pipe.config.image_size) == [6, 5]
    assert list(pipe.config.default_guidance_interval) == [0.0, 1.0]
    assert pipe.config.default_guidance_scale == 1.5 and pipe.config.default_num_inference_steps == 20
    assert pipe.unet.dtype == torch.float32 and not pipe.unet.training and not pipe.vae.training
    torch.manual_seed(0)
    for key, value in tiny_unet().state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[key], value.half().float())
    with safe_open(published / "unet" / checkpoints.WEIGHTS, "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}
    assert checkpoints.load(published, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_the_record_says_how_it_was_made(published):
    meta = checkpoints.read_meta(published)
    assert meta["steps"] == 7 and meta["metrics"] == {"psnr_db": 27.5}
    assert meta["class_names"] == NAMES and meta["null_class"] == 3 and meta["weights_dtype"] == "float16"
    assert torch.__version__.startswith(meta["versions"]["torch"])
    assert "T-shirt/top" in (published / "README.md").read_text()


def test_nothing_is_pickled(published):
    files = [p for p in published.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".py", ".md", ".safetensors"}


def test_publishing_leaves_the_callers_models_alone(tmp_path):
    unet = tiny_unet().train()
    publish(tmp_path / "model", unet=unet)
    assert unet.dtype == torch.float32 and unet.training and next(unet.parameters()).requires_grad


STOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentdiff":
            raise ImportError("latentdiff is blocked")
sys.meta_path.insert(0, Blocker())
import numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.split(".")[0] == "latentdiff" for name in sys.modules)
generators = [torch.Generator().manual_seed(i) for i in range(3)]
call = dict(class_labels=["Bag", 0, None], guidance_scale=2.0, num_inference_steps=4, output_type="np")
numpy.save(sys.argv[2], pipe(**call, generator=generators).images)
try:
    pipe("a red apple")
except ValueError as error:
    assert "no text encoder" in str(error) and "the classes are" in str(error)
try:
    pipe(class_labels="Bag", sampler="ddim")
except ValueError as error:
    assert "needs the latentdiff package" in str(error)
    print("said so")
"""


def test_stock_diffusers_gives_the_same_pixels(published, tmp_path):
    # -P and the scratch directory keep the repository off the path; the blocker is for an installed latentdiff
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums are split by threads
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(published), str(tmp_path / "images.npy")],
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "said so" in result.stdout
    assert "not found in your environment" not in result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), pixels(checkpoints.load(published)))


def test_our_own_class_runs_no_code_from_the_folder(folder):
    (folder / "pipeline.py").write_text("raise SystemExit('the folder was executed')")
    assert isinstance(LatentDiffusionPipeline.from_pretrained(str(folder)), LatentDiffusionPipeline)
    assert checkpoints.load(folder).class_names == NAMES


def test_a_checkpoint_does_not_say_where_its_parts_were_loaded_from(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "private" / "vae")
    folder = publish(tmp_path / "model", vae=type(tiny_vae()).from_pretrained(tmp_path / "private" / "vae"))
    assert not [path for path in folder.rglob("*.json") if "private" in path.read_text()]


def test_saving_a_loaded_pipeline_gives_a_checkpoint_again(published, tmp_path):
    checkpoints.load(published).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"][0] == "pipeline"
    assert (tmp_path / "again" / "pipeline.py").read_text() == (published / "pipeline.py").read_text()
    np.testing.assert_array_equal(pixels(checkpoints.load(tmp_path / "again")), pixels(checkpoints.load(published)))


def test_no_value_of_the_index_looks_like_a_component(published):
    # diffusers takes every list whose first entry is a string for a (library, class) pair when it downloads
    index = json.loads((published / "model_index.json").read_text())
    pairs = {key for key, value in index.items() if isinstance(value, list) and isinstance(value[0], str)}
    assert pairs == {"_class_name", "unet", "vae", "scheduler"}


def test_republishing_replaces_the_folder_whole(folder):
    (folder / "stale.txt").write_text("from the last time")
    publish(folder, class_names=["a", "b", "c"], card="# mine\n", files={"grid.png": b"png"})
    assert not (folder / "stale.txt").exists()
    assert checkpoints.load(folder).class_names == ["a", "b", "c"]
    assert (folder / "README.md").read_text() == "# mine\n" and (folder / "grid.png").read_bytes() == b"png"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_failure_half_way_leaves_the_old_checkpoint(folder, tmp_path):
    before = pixels(checkpoints.load(folder))
    with pytest.raises(FileNotFoundError):
        publish(folder, class_names=["a", "b", "c"], files={"grid.png": tmp_path / "absent.png"})
    np.testing.assert_array_equal(pixels(checkpoints.load(folder)), before)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_weights_that_do_not_fit_the_dtype_are_refused(tmp_path):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = 1e6
    with pytest.raises(UserError, match="conv_in.bias"):
        publish(tmp_path / "model", unet=unet)
    assert list(tmp_path.iterdir()) == []
    publish(tmp_path / "model", unet=unet, dtype=torch.bfloat16)


def test_default_guidance_needs_a_null_class(tmp_path):
    with pytest.raises(UserError, match="null class"):
        publish(tmp_path / "model", null_class=None, default_guidance_scale=2.0)
    with pytest.raises(UserError, match="default_guidance_interval: .* low <= high"):
        publish(tmp_path / "model", default_guidance_interval=(0.9, 0.2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [dict(class_names=["a", "b"], null_class=2), dict(null_class=0), dict(null_class=None)])
def test_classes_that_contradict_the_unet_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match="num_class_embeds"):
        publish(tmp_path / "model", default_guidance_scale=1.0, **changes)
    assert list(tmp_path.iterdir()) == []


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def scramble(file):
    file.write_bytes(b"\xff" * 64)


def remove(file):
    file.unlink()


def drop_a_weight(file):
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file)


def reshape_a_weight(file):
    weights = load_file(file)
    weights[sorted(weights)[0]] = torch.zeros(2, 3)
    save_file(weights, file)


@pytest.mark.parametrize(
    "name, harm",
    [
        ("unet/diffusion_pytorch_model.safetensors", truncate),
        ("unet/diffusion_pytorch_model.safetensors", scramble),
        ("unet/diffusion_pytorch_model.safetensors", remove),
        ("unet/diffusion_pytorch_model.safetensors", drop_a_weight),
        ("vae/diffusion_pytorch_model.safetensors", truncate),
        ("vae/config.json", remove),
        ("vae/config.json", scramble),
        ("scheduler/scheduler_config.json", remove),
        ("model_index.json", scramble),
        ("model_index.json", remove),
    ],
)
def test_a_damaged_file_is_named_in_one_line(folder, name, harm):
    harm(folder / name)
    with pytest.raises(UserError) as error:
        checkpoints.load(folder)
    assert str(folder / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_weights_of_another_shape_are_one_line(folder):
    reshape_a_weight(folder / "unet" / checkpoints.WEIGHTS)
    with pytest.raises(UserError) as error:
        checkpoints.load(folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_missing_folder_and_another_kind_of_pipeline_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        checkpoints.load(tmp_path / "absent")
    with pytest.raises(UserError, match="absent: no such folder"):
        checkpoints.read_meta(tmp_path / "absent")
    (folder / checkpoints.META).unlink()
    with pytest.raises(UserError, match="latentdiff.json: missing"):
        checkpoints.read_meta(folder)
    (folder / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="_class_name is KandinskyPipeline; expected"):
        checkpoints.load(folder)


@pytest.mark.parametrize("layout", ["clone", "wheel"])
def test_shipped_weights_are_found_from_anywhere(tmp_path, monkeypatch, layout):
    package = tmp_path / "somewhere" / "latentdiff"
    weights = (package if layout == "wheel" else package.parent) / "weights"
    (weights / "shoes").mkdir(parents=True)
    (weights / "shoes" / "model_index.json").write_text("{}")
    if layout == "clone":
        package.mkdir()
        (package.parent / "pyproject.toml").touch()
    monkeypatch.setattr(shipped, "__file__", str(package / "utils" / "shipped.py"))
    monkeypatch.chdir(tmp_path)
    assert checkpoints.resolve_model("weights/shoes") == checkpoints.resolve_model("shoes") == weights / "shoes"
    with pytest.raises(UserError, match="weights/hats.*weights/shoes"):
        checkpoints.resolve_model("weights/hats")
    for name in ("weights/emoji", "emoji-judge"):  # a wheel has no room for these
        with pytest.raises(UserError, match=f"'{name}': does not come with an installed package; clone latentdiff's"):
            checkpoints.resolve_model(name)
    (tmp_path / "weights" / "shoes").mkdir(parents=True)
    assert str(checkpoints.resolve_model("weights/shoes")) == "weights/shoes"  # a path that exists comes first


def test_a_folder_named_weights_beside_an_installed_package_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "weights" / "shoes").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "latentdiff" / "utils" / "shipped.py"))
    assert shipped.shipped_folder("weights") is None


def test_what_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (checkpoints.resolve_model("weights/fashion-mnist") / checkpoints.INDEX).is_file()
    assert (checkpoints.resolve_model("weights/fashion-mnist-features") / "model.safetensors").is_file()
    assert (autoencoder_folder("weights/autoencoder-rgb") / "config.json").is_file()  # as a config names it
    assert autoencoder_folder("autoencoder-rgb") is None
    with pytest.raises(UserError, match="weights/nothing: no autoencoder there"):  # never asked of the Hub
        load_autoencoder("weights/nothing")
    assert checkpoints.resolve_config("configs/folder/diffusion.yaml").is_file()
    assert checkpoints.resolve_config("configs/folder/nothing.yaml") == Path("configs/folder/nothing.yaml")


def test_what_a_wheel_lacks_is_in_the_repository():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later")
    weights = Path(__file__).parent.parent / "weights"
    packed = tomllib.loads((weights.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    inside = {pattern.split("/")[0] for pattern in packed["latentdiff.weights"]}
    assert inside | set(shipped.IN_REPOSITORY) == {path.name for path in weights.iterdir() if path.is_dir()}
    size = sum(path.stat().st_size for name in inside for path in (weights / name).rglob("*") if path.is_file())
    assert size < 59_000_000  # the code and the configs are less than 1 MB


def test_the_tested_versions_are_all_pinned_and_allowed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later")
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [line for line in (root / "tests" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, needed):
        if requirement.name == "latentdiff":
            continue
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement
    assert "setuptools" not in pinned  # it would bind the isolated environment of a build, too
