"""Pipelines over codes: they sample as the library does, open in plain diffusers, and change and complete images."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel, VQModel

from latentdiff import checkpoints
from latentdiff.discrete import ClassifierFree, make_process, sample
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.pipelines.discrete_diffusion import DiscreteDiffusionPipeline, code_logits
from latentdiff.pipelines.latent_diffusion import PipelineInputError

CODES, SIDE = 5, 8
CLASSES = ["across", "down", "blank"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny_pipeline(
    process: str = "absorbing", schedule: str = "linear", levels: str = "together", **config
) -> DiscreteDiffusionPipeline:
    """Random networks over 8x8 codes of grey 16x16 images, with three classes and the null class.

    With levels in turn the U-Net is over codes of two levels, which the autoencoder does not have.
    """
    torch.manual_seed(0)
    count = 1 if levels == "together" else 2
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    sizes = {"in_channels": count * (CODES + 1), "out_channels": count * CODES, "sample_size": SIDE, "num_class_embeds": 4}
    unet = UNet2DModel(**blocks, **sizes, norm_num_groups=4, layers_per_block=1, add_attention=False).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 30  # logits that are far from uniform
    vae = VQModel(
        1,
        1,
        ("DownEncoderBlock2D",) * 2,
        ("UpDecoderBlock2D",) * 2,
        (8, 8),
        latent_channels=2,
        norm_num_groups=4,
        num_vq_embeddings=CODES,
        mid_block_add_attention=False,
    ).eval()
    with torch.no_grad():
        latents = vae.encode(picture() * 2 - 1).latents  # [1, 2, 8, 8]; some of them are the codes
        vae.quantize.embedding.weight.copy_(latents.flatten(2)[0, :, :: 64 // CODES][:, :CODES].T)
    names = {"class_names": CLASSES, "null_class": 3, "default_num_inference_steps": 4, "default_guidance_scale": 2.0}
    pipe = DiscreteDiffusionPipeline(
        unet, vae, {"name": process, "schedule": schedule, "levels": levels}, **{**names, **config}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def half_mask() -> torch.Tensor:
    """White on the left half."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    return mask


@pytest.mark.parametrize(
    ("process", "schedule", "order", "levels"),
    [
        ("absorbing", "linear", "random", "together"),
        ("absorbing", "cosine", "confidence", "together"),
        ("absorbing", "cosine", "random", "coarse_first"),
        ("absorbing", "cosine", "confidence", "coarse_first"),
        ("uniform", "cosine_squared", "random", "together"),
    ],
)
def test_it_draws_what_the_library_draws(process, schedule, order, levels):
    pipe = tiny_pipeline(process, schedule, levels)
    call = {"class_labels": ["down", None, 0], "num_inference_steps": 6, "sampler": order, "output_type": "codes"}
    codes = pipe(**call, guidance_scale=2.5, generator=generators(1, 2, 3)).images
    guidance = ClassifierFree({"class_labels": torch.tensor([1, 3, 0])}, {"class_labels": torch.tensor([3, 3, 3])}, 2.5)
    known = torch.full((3, *pipe.code_shape), -1)
    law = make_process(process, CODES, schedule, levels)
    arguments = {"steps": 6, "guidance": guidance, "order": order}
    expected = sample(pipe.predict, known.shape, law, generator=generators(1, 2, 3), **arguments)
    assert torch.equal(codes, expected) and len(codes.unique()) > 2
    # A row does not depend on the batch
    alone = pipe(**{**call, "class_labels": 0}, guidance_scale=2.5, generator=generators(3)).images
    assert torch.equal(alone[0], codes[2])
    # The same with known codes
    known[:, :, 2:5] = 1
    expected = sample(pipe.predict, known.shape, law, generator=generators(1, 2, 3), known=known, **arguments)
    predict = guidance(pipe.predict)
    drawn = pipe.draw_codes(
        lambda codes, t: predict(codes, torch.full((3,), t, dtype=torch.float64)), 3, 6, generators(1, 2, 3), order, known=known
    )
    assert torch.equal(drawn, expected) and bool((drawn[:, :, 2:5] == 1).all())


def test_a_checkpoint_without_levels_draws_them_together():
    pipe = tiny_pipeline()
    old = DiscreteDiffusionPipeline(pipe.unet, pipe.vae, {"name": "absorbing", "schedule": "linear"})
    assert old.config.process["levels"] == "together"
    for name, levels in (("uniform", "coarse_first"), ("absorbing", "fine_first")):
        with pytest.raises(PipelineInputError, match=f"process: its levels is '{levels}'; valid: together"):
            DiscreteDiffusionPipeline(pipe.unet, pipe.vae, {"name": name, "schedule": "linear", "levels": levels})


def test_an_image_is_restored_fine_levels_first_kept_coarse():
    """Up to strength 1/3 only the second of two levels is drawn anew."""
    pipe = tiny_pipeline(levels="coarse_first")
    start = torch.randint(CODES, (2, 2, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    for order in ("random", "confidence"):
        logits = torch.zeros(2, 2, SIDE, SIDE, CODES)
        drawn = pipe.draw_codes(lambda codes, t: logits, 2, 12, generators(1, 2), order, start=start, first=8)  # noqa: B023
        assert torch.equal(drawn[:, 0], start[:, 0]) and not torch.equal(drawn[:, 1], start[:, 1])
        more = pipe.draw_codes(lambda codes, t: logits, 2, 12, generators(1, 2), order, start=start, first=4)  # noqa: B023
        assert not torch.equal(more[:, 0], start[:, 0]) and int((more == CODES).sum()) == 0


def test_the_masks_of_a_changed_image_fall_with_the_schedule():
    """At strength 1/2 half of the codes are masked, and "confidence" draws them in the half of the steps that runs."""
    left = []
    start = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.int64)
    logits = torch.zeros(1, 1, SIDE, SIDE, CODES)

    def watch(pipe, i, t, tensors):
        left.append(int(tensors["codes"].eq(CODES).sum()))

    pipe = tiny_pipeline()
    pipe.draw_codes(lambda codes, t: logits, 1, 8, generators(1), "confidence", start=start, first=4, callback=watch)
    masked = left[0] / 3 * 4  # of a linear schedule: 3/4 of the masks after the first of four steps
    assert 20 <= masked <= 44 and left[1:] == [int(masked / 2), int(masked / 4), 0]


def test_masks_that_are_left_are_counted_exactly():
    """In float32, 22 of 49 steps would leave 26 of 49 masks."""
    left, known = [], torch.full((1, 1, SIDE, SIDE), -1)
    known.view(-1)[49:] = 0
    logits = torch.zeros(1, 1, SIDE, SIDE, CODES)
    tiny_pipeline().draw_codes(
        lambda codes, t: logits,
        1,
        49,
        generators(1),
        "confidence",
        known=known,
        callback=lambda pipe, i, t, tensors: left.append(int(tensors["codes"].eq(CODES).sum())),
    )
    assert left == [*range(48, -1, -1)]


def test_the_network_is_given_each_code_as_a_channel():
    unet = tiny_pipeline().unet
    given = {}
    unet.register_forward_pre_hook(lambda _, inputs: given.update(x=inputs[0], t=inputs[1]))
    codes = torch.randint(CODES + 1, (2, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    logits = code_logits(unet, codes, torch.tensor([0.5, 1.0]), CODES, class_labels=torch.tensor([0, 1]))
    assert torch.equal(given["x"].argmax(1, keepdim=True), codes) and torch.equal(given["x"].sum(1), torch.ones(2, SIDE, SIDE))
    assert given["t"].tolist() == [500.0, 1000.0] and logits.shape == (2, 1, SIDE, SIDE, CODES)
    plain = unet(given["x"], given["t"], class_labels=torch.tensor([0, 1])).sample
    assert torch.equal(logits[:, 0], plain.permute(0, 2, 3, 1))


def test_plain_diffusers_opens_what_was_saved(tmp_path):
    pipe = tiny_pipeline()
    checkpoints.save(
        tmp_path / "model",
        pipe.unet,
        pipe.vae,
        None,
        {},
        CLASSES,
        3,
        process=dict(pipe.config.process),
        default_sampler="confidence",
        dtype=torch.float32,
    )
    text = (tmp_path / "model" / "pipeline.py").read_text()
    assert "from latentdiff." not in text and "import latentdiff" not in text and text.count("\nclass LatentDiffusion") == 1
    remote = DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)
    remote.set_progress_bar_config(disable=True)
    own = checkpoints.load(tmp_path / "model")
    own.set_progress_bar_config(disable=True)
    assert type(remote) is not type(own) and type(own) is DiscreteDiffusionPipeline
    images = [p(class_labels=[0, 2], generator=generators(1, 2), output_type="np").images for p in (remote, own)]
    assert np.array_equal(*images) and images[0].std() > 0.01
    # What plain diffusers saves again is the same file, and the same model
    remote.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == text
    assert checkpoints.load(tmp_path / "again").config.default_sampler == "confidence"


def test_the_codec_and_the_pipeline_agree_on_codes():
    pipe = tiny_pipeline()
    codec, images = LatentCodec(pipe.vae), picture() * 2 - 1
    codes = pipe.encode_codes(images)
    assert torch.equal(codes, codec.codes(images)) and len(codes.unique()) > 2
    expected = (codec.decode_codes(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe.decode_codes(codes, "pt"), expected)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_inpainting_keeps_the_pixels_and_the_codes_outside_of_the_mask(process):
    pipe = tiny_pipeline(process)
    image, mask = picture(), half_mask()
    call = {"class_labels": [0, 1], "mask_image": mask, "mask_margin": 0}
    images = pipe(**call, image=image, generator=generators(1, 2), output_type="pt").images
    assert torch.equal(images[..., 8:], image.expand(2, -1, -1, -1)[..., 8:])
    assert not torch.equal(images[0, :, :, :8], images[1, :, :, :8])
    codes = pipe(**call, image=image, generator=generators(1, 2), output_type="codes").images
    grey = torch.where(mask > 0, 0.5, image)
    assert torch.equal(codes[:, :, :, 4:], pipe.encode_codes(grey * 2 - 1).expand(2, -1, -1, -1)[:, :, :, 4:])
    # What the mask hides changes nothing
    hidden = torch.where(mask > 0, picture(1), image)
    assert torch.equal(pipe(**call, image=hidden, generator=generators(1, 2), output_type="pt").images, images)


def test_strength_is_the_share_of_codes_that_may_change():
    pipe = tiny_pipeline()
    image = picture()
    codes = pipe.encode_codes(image * 2 - 1)
    call = {"class_labels": 0, "image": image, "num_inference_steps": 10, "output_type": "codes"}
    changed = [
        float((pipe(**call, strength=strength, generator=generators(1)).images != codes).double().mean())
        for strength in (0.0, 0.3, 1.0)
    ]
    assert changed[0] == 0 < changed[1] < 0.35 < changed[2]


def test_a_callback_sees_and_changes_the_codes_and_may_stop():
    pipe, seen = tiny_pipeline(), []

    def watch(pipe, step, t, tensors):
        seen.append((step, t, int((tensors["codes"] == CODES).sum())))
        pipe._interrupt = step == 1
        return {"codes": torch.where(tensors["codes"] == CODES, CODES, 2)}

    call = {"class_labels": 0, "num_inference_steps": 4, "generator": generators(1), "output_type": "codes"}
    codes = pipe(**call, callback_on_step_end=watch).images
    assert [each[:2] for each in seen] == [(0, 1.0), (1, 0.75)] and 64 > seen[0][2] > seen[1][2] > 0
    assert set(codes.unique().tolist()) == {0, 2}  # an interrupted call has no masks


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"sampler": "heun"}, "sampler 'heun': this checkpoint draws codes; valid: random, confidence"),
        ({"sampler_options": {"eta": 1}}, "sampler_options: 'eta' is unknown; valid: temperature, confidence_noise"),
        ({"sampler_options": {"temperature": 0}}, "temperature 0: must be a finite number above 0"),
        ({"sampler_options": {"confidence_noise": -1}}, "confidence_noise -1: must be a finite number of at least 0"),
        ({"output_type": "latent"}, "output_type 'latent': must be one of pil, np, pt, codes"),
        ({"class_labels": "boot"}, "unknown class 'boot'"),
        ({"generator": generators(1, 2)}, "2 generators for 1 images"),
        ({"num_inference_steps": 0}, "num_inference_steps 0: must be at least 1"),
        ({"mask_image": half_mask()}, "mask_image: goes with image="),
        ({"guidance_scale": 2.0, "class_labels": None}, "there is no class or prompt to guide to"),
    ],
)
def test_a_call_that_cannot_be_answered_is_refused(call, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        tiny_pipeline()(**{"class_labels": 0, **call})
    assert "\n" not in str(caught.value)


def test_other_orders_and_processes_are_refused():
    with pytest.raises(ValueError, match="needs masks"):
        tiny_pipeline("uniform")(class_labels=0, sampler="confidence")
    with pytest.raises(ValueError, match="process: its schedule is 'log'; valid: linear, cosine, cosine_squared"):
        tiny_pipeline(schedule="log")


def test_a_folder_whose_class_and_process_contradict_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "process": None}))
    with pytest.raises(UserError, match="process is None, which"):
        checkpoints.load(tmp_path / "model")
