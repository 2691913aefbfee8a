"""Published folders in unmodified diffusers by the plainest call: no dtype, no size, no component."""

import inspect
import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_unet, tiny_vae
from tiny_stable import stable_parts

from latentdiff import checkpoints
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.schedules import make_schedule

PICTURE = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
MASK = Image.fromarray(np.pad(np.full((16, 8), 255, np.uint8), ((0, 0), (0, 8))))
PROMPT = "a picture of vertical stripes"
TEXT, IMAGE, INPAINT = {}, {"image": PICTURE}, {"image": PICTURE, "mask_image": MASK}
CALLS = {
    "DiffusionPipeline": TEXT,
    "StableDiffusionPipeline": TEXT,
    "StableDiffusionImg2ImgPipeline": IMAGE,
    "StableDiffusionInpaintPipeline": INPAINT,
    "StableDiffusionPAGPipeline": TEXT,
    "StableDiffusionPAGImg2ImgPipeline": IMAGE,
    "StableDiffusionPAGInpaintPipeline": INPAINT,
    "AutoPipelineForText2Image": TEXT,
    "AutoPipelineForImage2Image": IMAGE,
    "AutoPipelineForInpainting": INPAINT,
    "StableDiffusionPanoramaPipeline": {"height": 16, "width": 32},
    "StableDiffusionSAGPipeline": TEXT,
    "LatentDiffusionPipeline": TEXT,
}
OPENED_ALONE = [  # a call needs more than these tests have
    "CycleDiffusionPipeline",
    "LEditsPPPipelineStableDiffusion",
    "LatentConsistencyModelPipeline",
    "StableDiffusionAttendAndExcitePipeline",
    "StableDiffusionDiffEditPipeline",
    "StableDiffusionGLIGENPipeline",
    "StableDiffusionInstructPix2PixPipeline",
]


@pytest.fixture(autouse=True)
def no_cache_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module", params=["float16", "float32"])
def folder(request, tmp_path_factory):
    """A text model as training publishes it, in either dtype; its parts come with the sizes that they have by default."""
    parts = stable_parts()
    parts["unet"].register_to_config(sample_size=[8, 8])
    parts["vae"].register_to_config(sample_size=4)
    parts["vae"].register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    parts["scheduler"] = make_schedule("cosine").to_scheduler(prediction="v_prediction")
    return checkpoints.save(
        tmp_path_factory.mktemp("stock") / "model",
        **parts,
        meta={},
        null_prompt="",
        image_size=(16, 16),
        prediction="v_prediction",
        schedule={"name": "cosine"},
        dtype=getattr(torch, request.param),
    )


def plainly(name, folder):
    cls = LatentDiffusionPipeline if name == "LatentDiffusionPipeline" else getattr(diffusers, name)
    trust = {"trust_remote_code": True} if name == "DiffusionPipeline" else {}
    pipe = cls.from_pretrained(folder, **trust)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", CALLS)
def test_it_opens_and_draws(folder, name):
    pipe, call = plainly(name, folder), CALLS[name]
    picture = pipe(PROMPT, num_inference_steps=3, guidance_scale=2.0, **call).images[0]
    assert picture.size == (call.get("width", 16), 16)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in pipe.text_encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", OPENED_ALONE)
def test_it_opens(folder, name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    pipe = plainly(name, folder)
    assert isinstance(pipe, getattr(diffusers, name)) and pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32


def test_stock_and_our_pipeline_draw_the_same_by_the_plainest_calls(folder):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = []
    for name in ("StableDiffusionPipeline", "LatentDiffusionPipeline"):
        call = dict(num_inference_steps=4, guidance_scale=2.0, output_type="latent")
        made.append(plainly(name, folder)(PROMPT, latents=noise, **call).images)
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-4)


def test_opening_warns_of_no_outdated_scheduler(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = plainly("StableDiffusionPipeline", folder)
    assert pipe.scheduler.config.steps_offset == 1 and pipe.scheduler.config.clip_sample is False


def test_tiles_and_slices_change_nothing_at_the_models_own_size(folder):
    pipe = plainly("StableDiffusionPipeline", folder)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = pipe.vae.decode(z).sample
        pipe.vae.enable_tiling()
        assert torch.equal(pipe.vae.decode(z).sample, whole)
        pipe.vae.enable_slicing()
        torch.testing.assert_close(pipe.vae.decode(z).sample, whole, rtol=0, atol=1e-5)
        larger = torch.randn(1, 4, 16, 16)  # the check can fail: tiles are in use
        tiled = pipe.vae.decode(larger).sample
        pipe.vae.disable_tiling()
        assert not torch.equal(pipe.vae.decode(larger).sample, tiled)


def test_the_files_hold_what_other_versions_read(folder):
    sizes = {part: json.loads((folder / part / "config.json").read_text())["sample_size"] for part in ("unet", "vae")}
    assert sizes == {"unet": 8, "vae": 16}
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["clip_sample"] is False and scheduler["thresholding"] is False
    # transformers before version 5 reads a CLIP tokenizer from these two files
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = (folder / "tokenizer" / "merges.txt").read_text().splitlines()
    assert vocabulary == tokenizer["vocab"]
    assert [line.split() for line in merges if not line.startswith("#version")] == tokenizer["merges"]


def test_an_oblong_model_keeps_both_sides(tmp_path):
    unet = tiny_unet()
    unet.register_to_config(sample_size=[2, 4])
    vae = tiny_vae()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.register_to_config(sample_size=1)
    folder = checkpoints.save(
        tmp_path / "model",
        unet=unet,
        vae=vae,
        scheduler=diffusers.DDIMScheduler(),
        meta={},
        class_names=["a", "b", "c"],
        null_class=3,
    )
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == [2, 4]
    assert json.loads((folder / "vae" / "config.json").read_text())["sample_size"] == 4 * factor
    assert unet.config.sample_size == [2, 4] and vae.config.sample_size == 1  # what is published is a copy


def test_the_card_says_what_the_model_is_conditioned_on(folder, tmp_path):
    card = (folder / "README.md").read_text()
    assert "conditioned on text" in card and "unconditional" not in card and 'pipe("what to draw").images[0]' in card
    common = dict(vae=tiny_vae(), scheduler=diffusers.DDIMScheduler(), meta={})
    names = ["Äpfel", "b", "c"]
    other = checkpoints.save(tmp_path / "classes", unet=tiny_unet(), class_names=names, null_class=3, **common)
    card = (other / "README.md").read_text(encoding="utf-8")
    assert "conditioned on classes Äpfel, b, c." in card and 'pipe(class_labels=["Äpfel"])' in card


@pytest.mark.parametrize("name", ["fashion-mnist", "emoji"])
def test_the_shipped_folders_state_the_same(name):
    model = checkpoints.resolve_model(f"weights/{name}")
    index = json.loads((model / "model_index.json").read_text())
    unet, vae = (json.loads((model / part / "config.json").read_text()) for part in ("unet", "vae"))
    assert unet["sample_size"] == 8 and vae["sample_size"] == 8 * 2 ** (len(vae["block_out_channels"]) - 1)
    schedule = dict(index["schedule"])
    written = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    options = json.loads((model / "latentdiff.json").read_text())["config"]["sample"]["scheduler_config"]
    again = make_schedule(schedule.pop("name"), **schedule).to_scheduler(index["scheduler"][1], index["prediction"], **options)
    expected = json.loads(again.to_json_string())
    for each in (written, expected):
        del each["_diffusers_version"]
    betas, same_betas = (each.pop("trained_betas") or [] for each in (written, expected))
    assert written == expected
    assert betas == pytest.approx(same_betas, rel=1e-9)  # cosines differ in the last digits from one processor to another
    if name == "emoji":
        assert json.loads((model / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
        weights = load_file(model / "text_encoder" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        assert (
            json.loads((model / "tokenizer" / "vocab.json").read_text())
            == (json.loads((model / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
        )


def test_older_diffusers_reads_the_pipelines_annotations():
    """diffusers 0.36 reads a class, Any or Union[...] and fails at `list | None`; it also hands on dduf_entries."""
    from typing import Union, get_origin

    for name, parameter in inspect.signature(LatentDiffusionPipeline.__init__).parameters.items():
        kind = parameter.annotation
        assert name in ("self", "scheduler", "tokenizer") or isinstance(kind, type) or get_origin(kind) is Union, name
    index = checkpoints.resolve_model("weights/fashion-mnist") / "model_index.json"
    assert LatentDiffusionPipeline._dict_from_json_file(index, dduf_entries=None)["null_class"] == 10
