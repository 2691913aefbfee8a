"""A U-Net that is given a second image: what it gets in training and in the pipeline, dropout, guidance, files, refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from stripes import stripe_pixels
from tiny_models import tiny_unet, tiny_vae
from tiny_runs import diffusion_config, diffusion_tree, write_yaml

from latentdiff import checkpoints
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.guidance import ClassifierFree
from latentdiff.models.image_condition import KEY, ImageCondition, draw_mask
from latentdiff.models.text_encoder import ClassCondition
from latentdiff.models.unet import make_unet
from latentdiff.objective import diffusion_loss
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline, PipelineInputError, condition_picture
from latentdiff.training import train
from latentdiff.training.conditioning import Conditions
from latentdiff.training.monitor import sampling_pipeline
from latentdiff.training.publish import open_diffusion, publish

WHOLE = (0, 0, 8, 8)
MASK = {"type": "class+image", "image": {"kind": "mask", "draws": 2}}
SMALL = {"type": "image", "image": {"factor": 2}}
PAIR = {"type": "image", "image": {"kind": "pair", "dropout": 0}}


@pytest.fixture(scope="module")
def paired_folder(tmp_path_factory) -> Path:
    """24 pictures of stripes; the `negative` of each, another file, is paired with it."""
    root = tmp_path_factory.mktemp("paired")
    pixels, labels = stripe_pixels(24, 0, 16)
    rows = []
    for k, image in enumerate(pixels):
        for name, values in ((f"{k:02d}.png", image), (f"negative/{k:02d}.png", 255 - image)):
            (root / name).parent.mkdir(exist_ok=True)
            Image.fromarray(values[..., 0]).save(root / name)
        rows.append({"file_name": f"{k:02d}.png", "label": str(labels[k].item()), "negative": f"negative/{k:02d}.png"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def mask_run(tmp_path_factory, stripe_folder, autoencoder_run) -> Path:
    """Output folder of a run of six steps on classes and masked images."""
    output = tmp_path_factory.mktemp("masked") / "run"
    train(diffusion_config(stripe_folder, output, autoencoder_run, condition=MASK, data__flips=True))
    return output


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, stripe_folder, autoencoder_run) -> Path:
    """Output folder of a run that learns to enlarge 8x8 to 16x16."""
    output = tmp_path_factory.mktemp("small") / "run"
    train(diffusion_config(stripe_folder, output, autoencoder_run, condition=SMALL, train__steps=60, prediction="sample"))
    return output


def opened(output: Path):
    """The trainer of a finished run, and its pipeline."""
    from latentdiff.config import DiffusionConfig
    from latentdiff.training.run_folder import recorded_config

    config = recorded_config(output, DiffusionConfig)
    trainer = open_diffusion(config)
    return trainer, sampling_pipeline(config, trainer.pipeline_parts())


# What the second image is


def test_a_small_image_is_the_mean_of_its_blocks_in_8_bits():
    images = torch.arange(64.0).reshape(1, 1, 8, 8) / 63 * 2 - 1
    given = ImageCondition("low_resolution", factor=4).given(images, WHOLE)
    blocks = ((images.reshape(1, 1, 2, 4, 2, 4).mean((3, 5)) + 1) * 127.5).round() / 127.5 - 1
    torch.testing.assert_close(given, blocks)
    # Inside the border that training pads alone
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1)
    assert torch.equal(ImageCondition("low_resolution", factor=4).given(padded, (2, 2, 8, 8)), given)


def test_a_grey_image_has_the_luma_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    given = ImageCondition("grey").given(images, WHOLE)
    expected = torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).copy()) / 127.5 - 1
    assert given.shape == (1, 3, 8, 8)
    assert float((given - expected).abs().max()) < 1.01 / 127.5  # Pillow cuts where this rounds


@pytest.mark.parametrize("masks", ["side", "rectangles", "frame", "mixed"])
def test_masks_follow_from_their_seed_and_hide_some(masks):
    drawn = torch.stack([draw_mask(masks, (12, 20), seed) for seed in range(60)])
    again = torch.stack([draw_mask(masks, (12, 20), seed) for seed in range(60)])
    assert drawn.shape == (60, 1, 12, 20) and torch.equal(drawn, again)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    share = drawn.mean((1, 2, 3))
    assert float(share.min()) > 0 and float(share.max()) < 1 and len(share.unique()) > 12
    if masks == "side":  # whole rows or whole columns
        rows, columns = drawn[:, 0].mean(2), drawn[:, 0].mean(1)
        whole = [bool((r * (1 - r) == 0).all()) or bool((c * (1 - c) == 0).all()) for r, c in zip(rows, columns, strict=True)]
        assert all(whole) and 0.2 < float(share.min()) and float(share.max()) < 0.8


# Training and the pipeline give the network the same


@pytest.mark.parametrize("kind", ["mask", "low_resolution", "pair"])
def test_the_pipeline_gives_the_network_what_training_gave(kind, request, tmp_path, autoencoder_run, paired_folder):
    if kind == "pair":
        changes = {"condition": PAIR, "data__pair_column": "negative"}
        config = diffusion_config(paired_folder, tmp_path / "run", autoencoder_run, **changes)
        trainer = open_diffusion(config)
        pipe = sampling_pipeline(config, trainer.pipeline_parts())
    else:
        trainer, pipe = opened(request.getfixturevalue("mask_run" if kind == "mask" else "small_run"))
    image, indices = trainer.conditions.image, torch.tensor([3, 0, 7])
    draws, nothing = image.condition.draws, torch.zeros(3, dtype=torch.bool)
    choice = torch.full((3,), 1 - 0.5 / draws)  # the last of each
    given, hidden = image.images.given(indices * draws + draws - 1)
    assert (hidden is None) == (kind != "mask")
    trained = image.look_up(indices, choice, nothing, False)
    noise = torch.zeros(3, *trainer.latents.cache.latent_shape)
    beside = pipe.encode_condition(*pipe.prepare_condition(given / 2 + 0.5, hidden), noise)
    torch.testing.assert_close(trained, beside, atol=5e-3, rtol=5e-3)  # the cache is float16
    torch.testing.assert_close(image.encode(given, hidden), beside, atol=1e-5, rtol=1e-5)
    assert beside.shape[1] == 2 + (kind == "mask") and float(beside[:, -2:].std()) > 0.1
    if kind == "pair":  # the pictures that are named, not the images themselves
        images, _ = trainer.latents.images.samples.batch(indices)
        torch.testing.assert_close(given, -images)
    if kind == "mask":  # a mirrored image under the same mask
        mirrored = image.images.given(indices * draws + draws - 1, flips=True)
        assert torch.equal(mirrored[1], hidden) and torch.equal(mirrored[0], given.flip(-1))
        flipped = image.look_up(indices, choice, nothing, True)
        torch.testing.assert_close(flipped, image.encode(*mirrored), atol=5e-3, rtol=5e-3)


def test_hidden_pixels_change_nothing(mask_run):
    _, pipe = opened(mask_run)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 1, 16, 16, generator=generator)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:, :] = 1
    others = torch.where(mask > 0, torch.rand(2, 1, 16, 16, generator=generator), pictures)

    def draw(**given) -> np.ndarray:
        seeds = [torch.Generator().manual_seed(k) for k in range(2)]
        return pipe(class_labels=[0, 1], generator=seeds, output_type="np", **given).images

    drawn = draw(condition_image=pictures, condition_mask=mask)
    assert np.array_equal(drawn, draw(condition_image=others, condition_mask=mask))
    assert not np.array_equal(drawn, draw(condition_image=1 - pictures, condition_mask=mask))
    assert not np.array_equal(drawn, draw(condition_image=pictures, condition_mask=mask.flip(2)))
    # image and mask_image stand in for the second image, where that is not given
    drawn_anew = {"image": pictures, "mask_image": mask}
    same = draw(**drawn_anew, condition_mask=mask)
    assert np.array_equal(draw(**drawn_anew), same)
    assert not np.array_equal(draw(**drawn_anew, condition_mask=torch.ones_like(mask)), same)
    # Row i alone is row i of the batch
    alone = pipe(
        class_labels=[1],
        condition_image=pictures[1:],
        condition_mask=mask,
        generator=[torch.Generator().manual_seed(1)],
        output_type="np",
    ).images
    assert np.allclose(alone[0], drawn[1], atol=1e-5)


# Dropout


class _Recorder:
    """In place of a PictureCondition: keeps which samples are dropped."""

    condition = SimpleNamespace(dropout=0.25)

    def look_up(self, indices, choice, dropped, flips):
        self.dropped = dropped
        return torch.zeros(len(indices), 1)


def test_each_condition_is_dropped_by_its_own_number_and_all_by_one():
    image = _Recorder()
    conditions = Conditions(ClassCondition(3, 0.25, 0.1), torch.zeros(8, dtype=torch.int64), None, 0.1, image)
    assert list(conditions.draw(4, torch.Generator())) == ["class", "joint", "image", "picture"]
    draws = {
        "class": torch.tensor([0.2, 0.9, 0.9, 0.9]),
        "joint": torch.tensor([0.5, 0.5, 0.05, 0.15]),
        "image": torch.tensor([0.9, 0.2, 0.9, 0.9]),
        "picture": torch.zeros(4),
    }
    labels = conditions(torch.arange(4), draws, "cpu")["class_labels"]
    assert labels.tolist() == [3, 0, 3, 0] and image.dropped.tolist() == [False, True, True, False]
    # With text as well, as many samples again lose class and text and keep the image
    text = SimpleNamespace(
        dropout=0.0,
        captions=SimpleNamespace(draw=lambda indices, choice, dropped: dropped.long()),
        look_up=lambda rows: {"rows": rows},
    )
    conditions = Conditions(ClassCondition(3, 0.25, 0.1), torch.zeros(8, dtype=torch.int64), text, 0.1, image)
    draws |= {"caption": torch.zeros(4), "text": torch.ones(4)}
    out = conditions(torch.arange(4), draws, "cpu")
    assert out["class_labels"].tolist() == [3, 0, 3, 3] and out["rows"].tolist() == [0, 0, 1, 1]
    assert image.dropped.tolist() == [False, True, True, False]


def test_a_dropped_image_is_zeros_and_other_draws_are_as_before(mask_run):
    trainer, pipe = opened(mask_run)
    image, indices = trainer.conditions.image, torch.arange(3)
    dropped = torch.tensor([False, True, False])
    beside = image.look_up(indices, torch.zeros(3), dropped, False)
    assert bool((beside[1] == 0).all()) and bool((beside[[0, 2]] != 0).any((1, 2, 3)).all())
    without = pipe.encode_condition(None, None, torch.zeros(3, 2, 8, 8))
    assert without.shape == beside.shape and not without.any()
    first = trainer.conditions.draw(5, torch.Generator().manual_seed(1))
    plain = Conditions(trainer.conditions.classes, trainer.conditions.labels, None, trainer.conditions.joint)
    second = plain.draw(5, torch.Generator().manual_seed(1))
    assert all(torch.equal(first[name], second[name]) for name in second)


# The network learns to use it


def test_a_model_learns_to_use_its_image(small_run):
    trainer, _ = opened(small_run)
    weights = load_file(small_run / "model/unet/diffusion_pytorch_model.safetensors")
    trainer.ema_model.load_state_dict({name: value.float() for name, value in weights.items()})
    validation = trainer.validation_set()
    assert validation[KEY].shape == (len(validation["x0"]), 2, 8, 8)
    x0, noise = validation["x0"], validation["noise"]
    t = torch.full((len(x0),), 0.9, dtype=torch.float64)
    denoiser = Denoiser(unet_model(trainer.ema_model, trainer.schedule), trainer.schedule, trainer.config.prediction)
    given = validation[KEY]
    with torch.no_grad():
        right, wrong = (float(diffusion_loss(denoiser, x0, t, noise, **{KEY: each}).mean()) for each in (given, given.flip(0)))
    assert right < 0.8 * wrong


# Guidance


def _tiny_pipeline(**changes) -> LatentDiffusionPipeline:
    torch.manual_seed(0)
    rule = {"kind": "mask", "factor": 1, "dropped": True}
    parts = {"class_names": ["a", "b", "c"], "null_class": 3, "image_condition": rule, "prediction": "epsilon"}
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=0)
    pipe = LatentDiffusionPipeline(
        tiny_unet(in_channels=9), tiny_vae(), scheduler, image_size=(8, 8), schedule={"name": "ddpm-linear"}, **parts | changes
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_by_class_and_image_is_that_of_instruct_pix2pix():
    pipe, x = _tiny_pipeline(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    picture = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3:] = 1
    beside = pipe.encode_condition(*pipe.prepare_condition(picture, mask), x)
    t, labels, null = 1.0, torch.tensor([0, 2]), torch.tensor([3, 3])

    def output(row, image):
        return pipe.unet(torch.cat([x, image], 1), 999, class_labels=row).sample

    with torch.no_grad():
        both, image_alone, bare = output(labels, beside), output(null, beside), output(null, 0 * beside)
        expected = bare + 1.7 * (image_alone - bare) + 3.0 * (both - image_alone)
        denoiser = Denoiser.from_pipeline(pipe)
        guided = ClassifierFree(
            denoiser,
            {"class_labels": labels, KEY: beside},
            {"class_labels": null, KEY: beside},
            3.0,
            bare={"class_labels": null, KEY: torch.zeros_like(beside)},
            bare_scale=1.7,
        )
        torch.testing.assert_close(guided(x, t).eps, expected, atol=1e-4, rtol=1e-4)

    arguments = {"class_labels": ["a", "c"], "condition_image": picture, "condition_mask": mask, "latents": x}
    arguments |= {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
    by_scheduler = pipe(**arguments, image_guidance_scale=1.7).images
    options = {"grid": "trailing"}
    by_sampler = pipe(**arguments, image_guidance_scale=1.7, sampler="ddim", sampler_options=options).images
    torch.testing.assert_close(by_scheduler, by_sampler, atol=2e-3, rtol=2e-3)
    # Of equal scales, two evaluations give what three would; 1 keeps the image in both branches
    pair = [pipe(**arguments, image_guidance_scale=scale).images for scale in (3.0, 3.0 + 1e-5)]
    torch.testing.assert_close(*pair, atol=1e-3, rtol=1e-3)
    near = [pipe(**arguments, image_guidance_scale=scale).images for scale in (1.0, 1.0 + 1e-5)]
    torch.testing.assert_close(*near, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(pair[0], near[0], atol=1e-2) and not torch.allclose(by_scheduler, near[0], atol=1e-2)


def test_guidance_of_a_model_of_an_image_alone():
    rule = {"kind": "pair", "factor": 1, "dropped": True}
    pipe = _tiny_pipeline(class_names=None, null_class=None, image_condition=rule)
    pipe.unet = tiny_unet(in_channels=8, num_class_embeds=None)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    call = {"condition_image": torch.rand(1, 1, 8, 8), "latents": x, "num_inference_steps": 2, "output_type": "latent"}
    one = pipe(**call, guidance_scale=2.0).images
    assert torch.equal(one, pipe(**call, image_guidance_scale=2.0).images)
    plain = pipe(**call).images
    assert not torch.allclose(one, plain) and torch.equal(plain, pipe(**call, guidance_scale=1.0).images)
    doubled = pipe(**{**call, "condition_image": torch.rand(3, 1, 8, 8), "latents": None}).images
    assert doubled.shape == (3, 4, 4, 4)  # as many as condition images
    never = _tiny_pipeline(class_names=None, null_class=None, image_condition={**rule, "dropped": False})
    never.unet = pipe.unet
    with pytest.raises(PipelineInputError, match="without image dropout"):
        never(**call, guidance_scale=2.0)
    with pytest.raises(PipelineInputError, match="each call needs condition_image"):
        never(num_inference_steps=2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"condition_image": torch.zeros(1, 1, 8, 8)}, "needs condition_mask too"),
        ({"condition_mask": torch.zeros(1, 1, 8, 8)}, "needs? condition_image"),
        ({"condition_image": torch.zeros(1, 1, 4, 4), "condition_mask": torch.zeros(1, 1, 8, 8)}, "condition_image of"),
        ({"image_guidance_scale": 2.0}, "no condition_image to guide to"),
    ],
)
def test_the_pipeline_refuses_what_cannot_be(call, said):
    with pytest.raises(PipelineInputError, match=said):
        _tiny_pipeline()(class_labels=["a"], num_inference_steps=2, **call)


def test_a_model_without_a_second_image_refuses_one(model):
    with pytest.raises(PipelineInputError, match="condition_image: this checkpoint is given no image"):
        checkpoints.load(model)(class_labels=[0], condition_image=torch.zeros(1, 1, 16, 16))


# Files: caches, states, checkpoints


def test_caches_name_what_they_are_of(mask_run, stripe_folder, autoencoder_run):
    manifest = json.loads((mask_run / "condition/manifest.json").read_text())
    made_of = manifest["identity"]
    assert made_of["count"] == 2 * json.loads((mask_run / "latents/manifest.json").read_text())["identity"]["count"]
    assert made_of["preprocessing"]["condition"] == {"kind": "mask", "factor": 1, "masks": "mixed", "draws": 2}
    assert "std" not in load_file(mask_run / "condition/shard-00000.safetensors")  # a condition is a mean
    changed = {**MASK, "image": {**MASK["image"], "masks": "side"}}
    config = diffusion_config(stripe_folder, mask_run, autoencoder_run, condition=changed, data__flips=True)
    with pytest.raises(UserError, match="other .*condition.*masks"):
        open_diffusion(config)


def test_a_resumed_run_is_the_run(tmp_path, mask_run, stripe_folder, autoencoder_run):
    kwargs = {"condition": MASK, "data__flips": True, "condition__image__folder": str(mask_run / "condition")}
    kwargs |= {"cache": {"folder": str(mask_run / "latents")}}
    kwargs["condition"] = {**MASK, "image": {**MASK["image"], "folder": str(mask_run / "condition")}}
    del kwargs["condition__image__folder"]
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **kwargs, train__steps=3))
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **kwargs), resume=True)
    name = "model/unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(mask_run / name), load_file(tmp_path / "run" / name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = publish(tmp_path / "run", out=tmp_path / "again")
    third = load_file(again / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(first[key], third[key]) for key in first)


def test_a_checkpoint_says_what_it_is_given_and_opens_in_diffusers(mask_run):
    folder = mask_run / "model"
    rule = {"kind": "mask", "factor": 1, "dropped": True, "masks": "mixed"}
    assert json.loads((folder / "model_index.json").read_text())["image_condition"] == rule
    unet = json.loads((folder / "unet/config.json").read_text())
    assert (unet["in_channels"], unet["out_channels"]) == (2 + 1 + 2, 2)
    ours = checkpoints.load(folder)
    theirs = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    theirs.set_progress_bar_config(disable=True)
    ours.set_progress_bar_config(disable=True)
    call = {"class_labels": [1], "condition_image": Image.new("L", (40, 40), 90)}
    call |= {"condition_mask": Image.new("L", (16, 16), 255)}
    drawn = [pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np").images for pipe in (ours, theirs)]
    assert np.array_equal(*drawn)


def test_index_entries_that_cannot_be_are_refused(mask_run, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(mask_run / "model", folder)
    index = json.loads((folder / "model_index.json").read_text())
    for rule in ("mask", {"kind": "x", "factor": 1, "dropped": True}, {"kind": "mask", "factor": 0, "dropped": True}):
        (folder / "model_index.json").write_text(json.dumps({**index, "image_condition": rule}))
        with pytest.raises(UserError, match="image_condition"):
            checkpoints.load(folder)


def test_a_pretrained_unet_is_widened_by_zeros(model, stripe_folder, autoencoder_run, tmp_path):
    condition = {"type": "class+image"}
    config = diffusion_config(
        stripe_folder, tmp_path / "run", autoencoder_run, condition=condition, model={"pretrained": str(model)}
    )
    unet, old = make_unet(config, (2, 8, 8), 4), checkpoints.load(model).unet
    assert unet.config.in_channels == 4 and unet.config.out_channels == 2
    x, beside, labels = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8), torch.tensor([0, 3])
    with torch.no_grad():
        new = unet(torch.cat([x, beside], 1), 500, class_labels=labels).sample
        torch.testing.assert_close(new, old(x, 500, class_labels=labels).sample)


# Commands


def test_the_commands_give_the_image(run, refused, small_run, mask_run, stripe_folder, feature_folder, here):
    Image.new("L", (4, 4), 200).save(here / "small.png")
    Image.new("L", (16, 16), 255).save(here / "mask.png")
    command = ("generate", "--model", small_run / "model", "--num-images", 2)
    run(*command, "--condition", "small.png", "--out", "one.npz")
    Image.new("L", (4, 4), 30).save(here / "other.png")
    run(*command, "--condition", "other.png", "--out", "two.npz")
    run(*command, "--condition", "small.png", "--image-guidance", 3, "--out", "three.npz")
    one, two, three = (np.load(here / f"{name}.npz")["arr_0"] for name in ("one", "two", "three"))
    assert one.shape == (2, 16, 16, 3) and not np.array_equal(one, two) and not np.array_equal(one, three)
    assert "takes no --condition-mask" in refused(*command, "--condition", "small.png", "--condition-mask", "mask.png")
    masked = ("generate", "--all-classes", "--model", mask_run / "model")
    assert "give --condition-mask" in refused(*masked, "--condition", "mask.png")
    assert "cannot be read as a picture" in refused(*command, "--condition", "none.png")

    report = json.loads(
        run(
            *("evaluate", small_run / "model", "--data", stripe_folder, "--features", feature_folder),
            *("--num-images", 12, "--cas-seeds", 0),
        )
    )
    assert report["protocol"]["prompts"]["given"] == {"kind": "low_resolution", "factor": 2}
    assert "is given a picture" in refused("gallery", mask_run / "model", "--data", stripe_folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"condition": {"type": "class", "image": {"factor": 2}}}, "condition.image.factor: condition.type is class"),
        ({"condition": {"type": "image", "image": {"kind": "mask", "factor": 2}}}, "condition.image.factor: is of kind"),
        ({"condition": {"type": "image", "image": {"draws": 2}}}, "condition.image.draws: is of kind mask"),
        ({"condition": {"type": "image", "image": {"dropout": 1}}}, "condition.image.dropout: 1 drops every second image"),
        ({"condition": {"type": "image", "image": {"factor": 3}}}, "condition.image.factor: 3 does not divide"),
        ({"condition": {"type": "image", "image": {"kind": "grey"}}}, "grey images have no colour"),
        ({"condition": PAIR}, "no paired pictures; name the column"),
        ({"condition": PAIR, "data__pair_column": "x"}, "pair_column name columns, and this folder has neither"),
        ({"condition": {"type": "image", "joint_dropout": 0.1}}, "condition.joint_dropout: condition.type is image"),
        (
            {"condition": {"type": "image", "image": {"dropout": 0}}, "sample__guidance": 2.0},
            "sample.guidance: 2 .* condition.image.dropout is 0",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, said, tmp_path, stripe_folder, autoencoder_run):
    with pytest.raises(UserError, match=said):
        train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    assert not (tmp_path / "run/latents").exists()


def test_pairs_that_cannot_be_are_refused(tmp_path, paired_folder, autoencoder_run):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(paired_folder, folder)
    changes = {"condition": PAIR, "data__pair_column": "negative"}
    config = diffusion_config(folder, tmp_path / "run", autoencoder_run, **changes)
    copied = diffusion_config(folder, tmp_path / "run", autoencoder_run, **changes, data__copies=2, data__shift=0.1)
    with pytest.raises(UserError, match="data.copies: moves images and not"):
        train(copied)
    (folder / "negative/03.png").write_bytes(b"")
    with pytest.raises(UserError, match="negative/03.png: the picture paired with 03.png cannot be read"):
        train(config)
    rows = (folder / "metadata.jsonl").read_text().replace('"negative/03.png"', '""')
    (folder / "metadata.jsonl").write_text(rows)
    with pytest.raises(UserError, match="line 4: has no negative"):
        train(config)


def test_encode_builds_both_caches_in_parts(run, here, stripe_folder, autoencoder_run):
    tree = diffusion_tree(stripe_folder, here / "run", autoencoder_run, condition=SMALL, cache={"shard_size": 10})
    config = write_yaml(here / "config.yaml", tree)
    for part in ("1/2", "2/2"):
        run("encode", config, "--part", part)
    for cache in ("latents", "condition"):
        assert (here / "run" / cache / "manifest.json").is_file()
    whole = write_yaml(here / "whole.yaml", {**tree, "output": str(here / "whole")})
    run("encode", whole)
    first, second = (load_file(here / name / "condition/shard-00001.safetensors") for name in ("run", "whole"))
    assert torch.equal(first["mean"], second["mean"])


def test_the_picture_that_is_encoded_is_mid_grey_where_it_is_hidden():
    given, mask = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    picture = condition_picture(given, mask, (4, 4), (6, 8))
    assert picture.shape == (1, 1, 6, 8) and picture[0, 0, 1, 2] == 0 and picture[0, 0, 1, 4] == 0.5
    assert bool((picture[..., 0, :] == -1).all()) and bool((picture[..., :2] == -1).all())
    small = condition_picture(torch.zeros(1, 1, 2, 2), None, (4, 4), (4, 4))
    assert small.shape == (1, 1, 4, 4)
