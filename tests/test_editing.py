"""The command edit, and variations and interpolations: what they start from, what they end on, what they write."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_models import tiny_unet

from latentdiff import checkpoints, editing
from latentdiff.denoiser import Denoiser
from latentdiff.editing import (
    edit,
    frame_weights,
    subject_conditioning,
    variations,
)
from latentdiff.errors import UserError
from latentdiff.guidance import tasks
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline, normalise
from latentdiff.samplers import slerp
from latentdiff.translation import Between, encode_images, interpolate_images


@pytest.fixture(scope="module")
def pipe(model):
    pipe = checkpoints.load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def photo(here, stripe_folder):
    """photo(name, k) -> the name of a copy of image k of the stripes in the working folder."""
    files = sorted(stripe_folder.rglob("*.png"))

    def write(name: str = "photo.png", k: int = 0) -> str:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(files[k]).save(here / name)
        return name

    return write


@pytest.fixture
def half(here):
    """The name of a mask whose lower half is white."""
    mask = np.zeros((16, 16), np.uint8)
    mask[8:] = 255
    Image.fromarray(mask).save(here / "half.png")
    return "half.png"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))


def cells(path, count: int, row: int = 0, height: int = 16, width: int = 16) -> list[np.ndarray]:
    """The last `count` images in a row of a grid, each of them at its own size, without captions."""
    scale = round(96 / height)
    picture, column = pixels(path), width * scale + 6
    top, first = row * (height * scale + 32), picture.shape[1] - count * column
    left = [first + k * column for k in range(count)]
    return [picture[top : top + height * scale : scale, x : x + width * scale : scale] for x in left]


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_grid_has_the_original_the_condition_and_the_results(run, here, model, photo, half):
    ask = ("edit", photo(), "--model", model, "--mask", half, "--to", "across", "--num-images", 2, "--steps", 3)
    assert run(*ask).split() == ["edited.png"]
    original, condition, *results = cells("edited.png", 4)
    given = pixels("photo.png")
    assert np.array_equal(original, given)
    assert np.array_equal(condition[:8], given[:8]) and (condition[8:] == 128).all()
    assert len(results) == 2 and all(np.array_equal(result[:8], given[:8]) for result in results)
    assert not np.array_equal(results[0][8:], results[1][8:])
    before = (here / "edited.png").read_bytes()
    run(*ask)
    assert (here / "edited.png").read_bytes() == before


def test_a_result_depends_on_the_image_and_not_on_its_place(run, model, photo):
    names = [photo(f"{k}.png", k) for k in range(3)]
    ask = ("--model", model, "--strength", 0.5, "--steps", 4)
    run("edit", *names, *ask, "--out", "all.png")
    run("edit", names[2], *ask, "--out", "one.png", "--batch-size", 1)
    assert np.abs(cells("all.png", 1, 2)[0].astype(int) - cells("one.png", 1)[0].astype(int)).max() <= 1


def test_a_folder_gives_a_folder_that_goes_on_where_it_stopped(run, here, refused, model, photo):
    for k in range(3):
        photo(f"in/sub/{k}.png", k)
    ask = ("edit", "in", "--model", model, "--steps", 3, "--to", "blank", "down", "--batch-size", 2)
    assert run(*ask).split() == ["edited"]
    made = sorted((here / "edited").iterdir())
    assert len(made) == 6 and "sub_0_blank" in made[0].name and (here / "edited.png").is_file()
    before = [path.read_bytes() for path in made]
    made[3].unlink()
    run(*ask)
    assert [path.read_bytes() for path in made] == before
    assert "holds images of another call (--seed 0, now 1)" in refused(*ask, "--seed", 1)


def test_an_image_that_is_larger_shows_its_border(run, here, model, photo):
    run("edit", photo(), "--model", model, "--expand", 0, 4, 2, 0, "--steps", 3)
    shown, result = cells("edited.png", 2, height=18, width=20)
    assert np.array_equal(shown[:16, :16], pixels("photo.png")) and (shown[:, 16:] == 128).all()
    assert np.array_equal(result[:16, :16], pixels("photo.png")) and result[:, 16:].std() > 0


def test_interpolations_are_strips_animations_or_folders(run, refused, here, model, photo):
    first, last = photo("first.png", 0), photo("last.png", 20)
    ask = ("edit", first, last, "--model", model, "--task", "interpolate", "--num-images", 3, "--steps", 3)
    run(*ask, "--out", "way.png")
    row = cells("way.png", 5)
    assert np.array_equal(row[0], pixels(first)) and np.array_equal(row[-1], pixels(last))
    run(*ask, "--out", "way.webp")
    film = Image.open("way.webp")
    assert film.n_frames == 4  # there and back
    film.seek(1)
    assert np.array_equal(np.asarray(film.convert("L")), row[2])
    run(*ask, "--out", "way")
    assert np.array_equal(pixels("way/000-001.png"), row[2])
    photo("in/one.png")
    run("edit", "in", "--model", model, "--steps", 2)
    assert "--out edited: the folder is not empty" in refused(*ask, "--out", "edited")  # by images of another task
    run("edit", "--model", model, "--task", "interpolate", "--source", "down", "--to", "across", "--out", "classes.png")
    assert all(cell.std() > 0 for cell in cells("classes.png", 8))


def test_an_interpolation_of_classes_is_guided_where_it_is_asked_to(run, here, model):
    ask = ("edit", "--model", model, "--task", "interpolate", "--to", "down", "across", "--num-images", 2, "--steps", 4)
    for name, more in {"off": (1,), "on": (3,), "late": (3, "--guidance-interval", 0, 0.01)}.items():
        run(*ask, "--out", f"{name}.png", "--guidance", *more)
    off, on, late = ((here / f"{name}.png").read_bytes() for name in ("off", "on", "late"))
    assert off != on and late != on


def test_a_small_image_is_upscaled_to_one_that_has_its_means(run, here, model, photo):
    small = pixels(photo()).reshape(8, 2, 8, 2).mean((1, 3)).round().astype(np.uint8)
    Image.fromarray(small).save(here / "small.png")
    run("edit", "small.png", "--model", model, "--task", "upscale", "--to", "down", "--steps", 4, "--num-images", 2)
    original, *results = cells("edited.png", 3)
    assert np.array_equal(original, small.repeat(2, 0).repeat(2, 1)) and not np.array_equal(*results)
    inside = (small > 40) & (small < 215)  # elsewhere the result is clipped to [0, 1]
    for result in results:
        means = result.astype(float).reshape(8, 2, 8, 2).mean((1, 3))
        assert np.abs(means - small)[inside].mean() < 8


def test_a_task_has_a_guidance_of_its_own_where_none_is_asked_for(monkeypatch, run, refused, model, photo):
    monkeypatch.setitem(tasks.SETTINGS, "deblur", replace(tasks.SETTINGS["deblur"], guidance=1.0))
    ask = ("edit", photo(), "--model", model, "--task", "deblur", "--to", "down", "--steps", 3)
    results = []
    for k, guidance in enumerate(([], ["--guidance", 1], ["--guidance", 5])):
        run(*ask, *guidance, "--out", f"{k}.png")
        results += cells(f"{k}.png", 1)
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])
    assert "--guidance-rule: at guidance 1, which is off" in refused(*ask, "--guidance-rule", "apg")


def with_second_image(monkeypatch, pipe, kind, channels):
    """Let every model that is opened be one that is given a second image of a kind. Returns what its U-Net is given."""
    unet = tiny_unet(sample_size=8, in_channels=channels, out_channels=2, num_class_embeds=None)
    rule = {"kind": kind, "factor": 2 if kind == "low_resolution" else None, "dropped": False}
    given = []
    made = LatentDiffusionPipeline(
        unet, pipe.vae, DDIMScheduler(clip_sample=False), image_condition=rule, image_size=(16, 16), prediction="epsilon"
    )
    unet.register_forward_pre_hook(lambda net, inputs: given.append(inputs[0][:, 2:].clone()))
    monkeypatch.setattr(checkpoints, "load", lambda folder: made)
    return given


def test_a_model_with_a_second_image_does_what_it_was_trained_for(monkeypatch, run, refused, here, model, photo, pipe, half):
    given = with_second_image(monkeypatch, pipe, "low_resolution", 4)
    Image.open(photo()).resize((8, 8)).save(here / "small.png")
    run("edit", "small.png", "--model", model, "--steps", 2)
    original, result = cells("edited.png", 2)
    assert np.array_equal(original, pixels("small.png").repeat(2, 0).repeat(2, 1)) and result.std() > 0
    large = torch.from_numpy(pixels("small.png").copy())[None, None].float() / 127.5 - 1
    large = torch.nn.functional.interpolate(large, (16, 16), mode="bicubic", align_corners=False).clamp(-1, 1)
    expected = pipe.vae.encode(large).latent_dist
    assert (given[0] - normalise(expected.mean, pipe.vae.config)).abs().mean() < 0.3  # a draw of its posterior at most
    ask = ("edit", photo(), "--model", model)
    assert "this model is given a picture (low_resolution), so all it does is upscale" in refused(*ask, "--task", "variations")
    with_second_image(monkeypatch, pipe, "mask", 5)
    assert "--mask: missing; this model completes pictures" in refused(*ask)
    run(*ask, "--mask", half, "--steps", 2)
    original, _, result = cells("edited.png", 3)
    assert np.array_equal(original[:8], result[:8]) and not np.array_equal(original[8:], result[8:])
    assert "--method posterior: this model was trained" in refused(*ask, "--mask", half, "--method", "posterior")
    with_second_image(monkeypatch, pipe, "pair", 4)
    assert "--strength: this model is given the whole picture" in refused(*ask, "--strength", 0.5)


def test_inpainting_by_posterior_sampling_keeps_the_known_pixels(run, model, photo, half):
    run("edit", photo(), "--model", model, "--mask", half, "--method", "posterior", "--steps", 3)
    original, _, result = cells("edited.png", 3)
    assert np.array_equal(result[:8], original[:8]) and not np.array_equal(result[8:], original[8:])


def test_an_image_is_translated_there_and_back(run, here, model, photo):
    ask = ("--model", model, "--task", "translate", "--steps", 6, "--guidance", 1, "--strength", 1)
    run("edit", photo(), *ask, "--source", "across", "--to", "across", "down", "--out", "one.png")
    original, same, other = cells("one.png", 3)
    near, far = (np.abs(each.astype(float) - original).mean() for each in (same, other))
    assert near < far
    run("edit", photo(), *ask, "--source", "across", "--to", "across", "down", "--into", model, "--out", "two.png")
    assert (here / "one.png").read_bytes() == (here / "two.png").read_bytes()


def test_img2img_guides_away_from_what_the_image_shows(run, here, model, photo, monkeypatch):
    """--source is the class to guide away from: the pipeline's negative_class_labels."""
    asked, call = [], LatentDiffusionPipeline.__call__
    monkeypatch.setattr(
        LatentDiffusionPipeline, "__call__", lambda self, **given: (asked.append(given), call(self, **given))[1]
    )
    how = ("--strength", 0.6, "--steps", 6, "--guidance", 8, "--guidance-interval", 0, 1)
    results = []
    for source in (("--source", "down"), ("--source", "across"), ()):
        run("edit", photo(), "--model", model, "--to", "across", *how, *source, "--out", f"{len(results)}.png")
        results.append(cells(f"{len(results)}.png", 2)[1].tobytes())
    assert len(set(results)) == 3
    names = [pipe_call.get("negative_class_labels") for pipe_call in asked]
    labels = checkpoints.load(model).class_names
    assert [None if number is None else labels[number] for number in names] == ["down", "across", None]
    # It is something to guide away from for a rule too, without a class to guide to
    run("edit", photo(), "--model", model, "--source", "down", "--guidance-rule", "apg", *how, "--out", "rule.png")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing.png"], "IMAGE nothing.png: no such file or folder"),
        ([], "IMAGE: missing; give image files or folders"),
        (["half.png", "--task", "inpaint"], "--mask: missing; --task inpaint needs it"),
        (["half.png", "--task", "outpaint"], "--expand: missing"),
        (["half.png", "--task", "variations", "--mask", "half.png"], "--mask: goes with --task inpaint, not variations"),
        (
            ["half.png", "--mask", "half.png", "--source", "down"],
            "--source: goes with --task img2img or translate or variations or",
        ),
        (
            ["half.png", "--source", "down", "--guidance", "1"],
            "--source: at guidance 1, which is off, nothing is guided away from",
        ),
        (
            ["half.png", "--source", "down", "--negative", "x"],
            "--source: with img2img it is what to guide away from, as --negative is",
        ),
        (["half.png", "--method", "posterior"], "--method posterior: goes with --task inpaint, not img2img"),
        (["half.png", "--mask", "half.png", "--method", "posterior", "--strength", "0.5"], "--method posterior: takes neither"),
        (["half.png", "--into", "x"], "--into: goes with --task translate, not img2img"),
        (["half.png", "--task", "deblur", "--blur", "0"], "--blur 0: must be a standard deviation"),
        (["half.png", "--task", "colorize", "--steps", "2"], "the images have 1 channels; only colour images"),
        (["half.png", "--task", "upscale", "--steps", "2"], "which is no whole part of the model's 16x16"),
        (["half.png", "small.png", "--task", "upscale"], "IMAGE: to be upscaled together, images must be of one size"),
        (["half.png", "--task", "translate", "--to", "down", "--strength", "0"], "--strength 0: nothing is translated"),
        (["half.png", "--task", "translate", "--into", "nowhere"], "'nowhere': no such folder"),
        (["half.png", "--strength", "1.5"], "--strength 1.5: must be from 0"),
        (["half.png", "--expand", "0", "0", "0", "0"], "--expand 0 0 0 0: must be four numbers"),
        (["half.png", "--to", "diagnal"], "--to: unknown class 'diagnal'; the classes are"),
        (["half.png", "--task", "variations", "--source", "x"], "--source: unknown class 'x'"),
        (["half.png", "--mask", "black.png"], "--mask black.png: has no white"),
        (["half.png", "--mask", "text.png"], "--mask text.png: cannot be read as an image"),
        (["half.png", "--task", "interpolate"], "IMAGE: to interpolate, give two images or more"),
        (["half.png", "half.png", "--task", "interpolate", "--num-images", "1"], "an interpolation of 1 images"),
        (["half.png", "--out", "a.jpg"], "--out a.jpg: must end in .png (a grid), or name a folder"),
        (["folder", "--out", "a.png"], "--out a.png: a folder of images gives a folder"),
        (["text.png"], "IMAGE text.png: cannot be read as an image"),
        (["half.png", "--guidance", "3"], "there is no class or prompt to guide to"),
        (["half.png", "--task", "variations", "--guidance", "2"], "--guidance: has no part in --task variations; leave it out"),
        (
            ["half.png", "half.png", "--task", "interpolate", "--guidance-interval", "0", "1"],
            "interpolate between images; leave",
        ),
        (["half.png", "--task", "translate"], "--to: missing; name what the images become, or give --into"),
        (
            ["--task", "interpolate", "--to", "down", "across", "--guidance", "-1"],
            "guidance_scale -1.0: must be a finite number",
        ),
        (["--task", "interpolate", "--to", "down", "across", "--out", "folder"], "--out folder: the folder is not empty"),
        (["half.png", "--mask", "half.png", "--method", "posterior", "--sampler", "dopri5"], "--sampler dopri5: its adaptive"),
        (["half.png", "--expand", "100000", "0", "0", "0"], "the result may be at most 8192 pixels high and wide"),
        (["half.png", "--sampler", "eular"], "--sampler eular: unknown; valid: ancestral"),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_a_mistake_is_one_line(refused, here, model, photo, half, arguments, line):
    Image.new("L", (16, 16)).save(here / "black.png")
    Image.new("L", (8, 8)).save(here / "small.png")
    (here / "text.png").write_text("no image")
    photo("folder/one.png")
    assert line in refused("edit", *arguments, "--model", model)


@pytest.mark.parametrize("word", [{"task": "enlarge"}, {"method": "magic", "mask": "half.png"}], ids=["task", "method"])
def test_python_is_told_of_an_unknown_word(here, model, half, word):
    (name, value), *_ = word.items()
    with pytest.raises(UserError, match=f"^--{name} {value}: unknown; valid: "):
        editing.edit(model, ["half.png"], **word, progress=False)


# --- variations and interpolation -----------------------------------------------------------------------------------------


@pytest.fixture
def images(stripe_folder):
    """float32 [4, 1, 16, 16] in [0, 1]."""
    files = sorted(stripe_folder.rglob("*.png"))[:4]
    return torch.stack([torch.from_numpy(pixels(file).copy())[None].float() / 255 for file in files])


def seeded(count, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def gaussian(monkeypatch):
    """Make every denoiser that of data N(0, I): its ODE leaves x alone, so encoding and decoding are known."""
    from_pipeline = Denoiser.from_pipeline

    def exact(pipe, **conditioning):
        schedule = from_pipeline(pipe).schedule
        return Denoiser.from_score(
            lambda x, t, **_: -x / (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).to(x)[:, None, None, None], schedule
        )

    monkeypatch.setattr(Denoiser, "from_pipeline", exact)


def test_variations_go_from_the_image_to_another(monkeypatch, pipe, images):
    gaussian(monkeypatch)
    latents = encode_images(pipe, images * 2 - 1, seeded(4))
    back = pipe.decode_latents(latents, "pt")
    none = variations(pipe, images, 0.0, generator=seeded(4))
    assert not none.requires_grad  # else the graph of the decoder stays in memory
    torch.testing.assert_close(none, back, atol=5e-3, rtol=0)
    half, full = (variations(pipe, images, s, generator=seeded(4)) for s in (0.5, 1.0))
    generators = seeded(4)
    encode_images(pipe, images * 2 - 1, generators)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
    torch.testing.assert_close(full, pipe.decode_latents(noise, "pt"), atol=5e-3, rtol=0)
    torch.testing.assert_close(half, pipe.decode_latents(slerp(latents, noise, 0.5), "pt"), atol=5e-3, rtol=0)
    alone = variations(pipe, images[2:3], 0.5, generator=seeded(4)[2:3])
    torch.testing.assert_close(alone[0], half[2], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"strength 2.0: must be from 0"):
        variations(pipe, images, 2.0)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_an_interpolation_ends_on_its_ends(monkeypatch, pipe, images, batch_size):
    gaussian(monkeypatch)
    first, last, weights = images[:1] * 2 - 1, images[3:] * 2 - 1, frame_weights(5).tolist()
    draws = {"generator": seeded(1), "generator_of_b": seeded(1, 9)}
    made = interpolate_images(pipe, first, last, weights, **draws, batch_size=batch_size)
    ends = encode_images(pipe, first, seeded(1)), encode_images(pipe, last, seeded(1, 9))
    assert made.shape == (5, 1, 1, 16, 16) and not made.requires_grad
    for k, weight in enumerate(weights):
        expected = pipe.decode_latents(slerp(*ends, weight), "pt") * 2 - 1
        torch.testing.assert_close(made[k], expected, atol=1e-2, rtol=0)
    mean = interpolate_images(pipe, first, last, [0.0, 1.0], use_mean=True)
    expected = pipe.decode_latents(encode_images(pipe, first, use_mean=True), "pt") * 2 - 1
    torch.testing.assert_close(mean[0], expected, atol=1e-2, rtol=0)


def test_an_interpolation_between_two_conditions_is_made_in_batches(pipe, images):
    sizes, (a, b) = [], (images[:2] * 2 - 1, images[2:] * 2 - 1)
    hook = pipe.unet.register_forward_hook(lambda net, inputs, out: sizes.append(len(inputs[0])))
    call = {"steps": 2, "what": [0, 1], "what_of_b": [2, 2], "use_mean": True}
    made = interpolate_images(pipe, a, b, [0.0, 0.5, 1.0], **call, batch_size=4)
    hook.remove()
    assert max(sizes) == 4
    for k in range(2):  # each pair on its own
        one = {**call, "what": [k], "what_of_b": [2]}
        alone = interpolate_images(pipe, a[k : k + 1], b[k : k + 1], [0.0, 0.5, 1.0], **one)
        torch.testing.assert_close(alone[:, 0], made[:, k], atol=1e-3, rtol=0)
    as_first = interpolate_images(pipe, a, b, [0.5], **{**call, "what_of_b": None})
    assert (as_first[0] - made[1]).abs().max() > 1e-3


def test_between_two_conditions_each_end_is_its_own(pipe):
    plain = Denoiser.from_pipeline(pipe)
    ends = [Denoiser.from_pipeline(pipe, **subject_conditioning(pipe, [k] * 3)) for k in (0, 2)]
    x = torch.randn(3, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    out = Between(*ends, torch.tensor([0.0, 0.25, 1.0]))(x, 0.5)
    one, other = (end(x, 0.5) for end in ends)
    assert torch.equal(out.x0[0], one.x0[0])
    torch.testing.assert_close(out.x0[2], other.x0[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(out.eps[1], 0.75 * one.eps[1] + 0.25 * other.eps[1])
    assert (one.x0 - other.x0).abs().max() > 1e-3
    assert out.schedule is ends[0].schedule and plain is not None


def test_edit_is_a_public_function(model, photo, here):
    import latentdiff

    assert latentdiff.edit is edit
    assert edit(model, [photo()], strength=0.3, steps=3, out=here / "x.png", progress=False) == here / "x.png"
