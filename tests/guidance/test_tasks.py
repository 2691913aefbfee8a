"""Restoring images by the task's name: the observation each task makes, and a pipeline's call."""

import pytest
import torch
from exact import mixture
from test_guidance_exact import exact

from latentdiff.errors import UserError
from latentdiff.guidance import TASKS, Blur, restoration
from latentdiff.samplers import sample
from latentdiff.schedules import make_schedule

SIDE = 8
MASK = torch.zeros(SIDE, SIDE)
MASK[SIDE // 2 :] = 1


def observed(task, image):
    """What is seen of images [B, C, 8, 8] in a task, with the further arguments of `restoration`."""
    if task == "upscale":
        return torch.nn.functional.avg_pool2d(image, 4), {}
    if task == "colorize":
        return image, {}
    if task == "deblur":
        return Blur(1.5)(image), {"blur_std": 1.5}
    return image, {"mask": MASK}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_draws_samples_that_agree_with_its_observation(task):
    """Latents that are the pixels, of a Gaussian: what was observed comes back, and the rest is drawn."""
    s, m = make_schedule("flow"), mixture((3, SIDE, SIDE)).only(0)
    image = m.draw(1, torch.Generator().manual_seed(5))[0].float()
    seen, extra = observed(task, image)
    made = restoration(task, seen, lambda z: z, (SIDE, SIDE), strength=1.0, **extra)
    call = made.call
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    noise = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    arguments = (noise, call["sampler"], call["num_inference_steps"], generators)
    x = sample(call["guidance"](exact(m, s)), *arguments, **call["sampler_options"])
    free = sample(exact(m, s), *arguments, **call["sampler_options"])

    def miss(x):
        return float((made.operator(x) - made.y).square().mean().sqrt())

    # DPS is not exact, and does not come as near
    assert miss(x) < (0.15 if made.settings.method == "mmps" else 0.45) * miss(free)
    assert (x[0] - x[1]).abs().max() > 0.1
    if task == "inpaint":
        finished = made.finish((image.expand(4, -1, -1, -1).roll(1, 2).clamp(-1, 1) + 1) / 2)
        assert torch.equal(finished[:, :, : SIDE // 2], (seen[:, :, : SIDE // 2].expand(4, -1, -1, -1).clamp(-1, 1) + 1) / 2)


def test_colours_are_not_guided_unless_it_is_asked_for():
    seen = torch.zeros(1, 1, 8, 8)
    scales = [
        restoration(*ask, lambda z: z, [8, 8], **given).call.get("guidance_scale")
        for ask, given in ((("colorize", seen), {}), (("colorize", seen), {"guidance": 3.0}), (("deblur", seen), {}))
    ]
    assert scales == [1.0, 3.0, None]


def test_settings_take_the_place_of_the_defaults():
    made = restoration("upscale", torch.zeros(1, 1, 7, 7), lambda z: z, [28, 28], method="dps", steps=7, noise_std=0.3)
    assert made.operator.factor == 4 and made.call["num_inference_steps"] == 7
    guide = made.guide(exact(mixture((1, 28, 28)), make_schedule("vp")))
    assert guide.method == "dps" and guide.noise_std == 0.3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("sharpen", torch.zeros(1, 1, 8, 8)), "task 'sharpen': unknown; valid: inpaint, upscale, deblur, colorize"),
        (("upscale", torch.zeros(1, 1, 3, 3)), "task upscale: the image is 3x3, which is no whole part of the model's 8x8"),
        (("upscale", torch.zeros(1, 1, 8, 8)), "task upscale: the image is 8x8"),
        (("upscale", torch.zeros(1, 1, 4, 2)), "task upscale: the image is 4x2"),
        (("deblur", torch.zeros(1, 1, 4, 4)), "task deblur: the image is 4x4, and the model's images are 8x8"),
        (("inpaint", torch.zeros(1, 1, 8, 8)), "task inpaint: needs a mask"),
        (("inpaint", torch.zeros(1, 1, 8, 8), lambda z: z, (8, 8), torch.zeros(8, 8)), "task inpaint: the mask hides nothing"),
        (("colorize", torch.zeros(1, 2, 8, 8)), "task colorize: the image has 2 channels"),
    ],
)
def test_mistakes_are_named(arguments, said):
    with pytest.raises(UserError, match=said):
        restoration(*(*arguments, lambda z: z, (8, 8))[: max(4, len(arguments))])


def test_a_sampler_that_does_not_end_is_refused():
    with pytest.raises(UserError, match="task deblur: sampler dopri5 does not end with method mmps"):
        restoration("deblur", torch.zeros(1, 1, 8, 8), lambda z: z, (8, 8), sampler="dopri5")
    assert restoration("deblur", torch.zeros(1, 1, 8, 8), lambda z: z, (8, 8), sampler="dopri5", method="dps").call


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="task deblur: has no setting 'stepz'; valid: method, noise_std"):
        restoration("deblur", torch.zeros(1, 1, 8, 8), lambda z: z, (8, 8), stepz=3)
