"""The Denoiser against the exact score of a Gaussian mixture, and what the U-Net is really fed."""

import pytest
import torch
from exact import mixture
from torch import nn

from latentdiff import prediction
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.schedules import make_schedule, names
from latentdiff.utils.tensors import widen

SHAPE = (2, 4, 4)  # with a batch of 4, B == W == H


def states(schedule, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, _ = m.draw(4, g)
    eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    t = torch.linspace(schedule.t_min + 0.01, schedule.t_max, 4, dtype=torch.float64)
    return widen(schedule.alpha(t), x0) * x0 + widen(schedule.sigma(t), x0) * eps, t


@pytest.mark.parametrize("name", names())
def test_from_score_gives_back_everything(name):
    s, m = make_schedule(name), mixture(SHAPE)
    x, t = states(s, m)
    out = Denoiser.from_score(lambda x, t: m.score(x, s, t), s)(x, t)
    score = m.score(x, s, t)
    torch.testing.assert_close(out.score, score, rtol=1e-10, atol=1e-10)
    velocity = widen(s.drift(t), x) * x - 0.5 * widen(s.diffusion(t) ** 2, x) * score  # 2011.13456 eq. 13
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-6, atol=1e-8)
    # Tweedie: x0 = (x + sigma^2 score) / alpha.
    x0 = (x + widen(s.sigma(t) ** 2, x) * score) / widen(s.alpha(t), x)
    torch.testing.assert_close(out.x0, x0, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", prediction.names())
def test_every_prediction_gives_the_same_denoiser(kind):
    s, m = make_schedule("flow"), mixture(SHAPE)
    x, t = states(s, m)
    truth = Denoiser.from_score(lambda x, t: m.score(x, s, t), s)(x, t)
    model = Denoiser(lambda x, t: prediction.target(kind, s, truth.x0, truth.eps, t), s, kind)
    torch.testing.assert_close(model(x, t).velocity, truth.velocity)


def test_row_alone_is_row_in_batch():
    s, m = make_schedule("vp"), mixture(SHAPE)
    x, t = states(s, m)
    denoiser = Denoiser.from_score(lambda x, t: m.score(x, s, t), s)
    for i in range(4):
        alone = denoiser(x[i : i + 1], float(t[i]))
        torch.testing.assert_close(alone.velocity[0], denoiser(x, t).velocity[i], rtol=1e-12, atol=1e-12)


def test_precision_and_times():
    seen = {}

    def model(x, t):
        seen.update(x=x.dtype, t=t)
        return x.bfloat16()

    denoiser = Denoiser(model, make_schedule("vp"))
    out = denoiser(torch.ones(3, 2), 0.25)
    assert out.x0.dtype == torch.float32 and seen["x"] == torch.float32
    assert seen["t"].shape == (3,) and seen["t"].dtype == torch.float32 and out.t.dtype == torch.float64
    assert denoiser(torch.ones(3, 2, dtype=torch.float16), 0.25).x0.dtype == torch.float32
    assert denoiser(torch.ones(3, 2, dtype=torch.float64), 0.25).x0.dtype == torch.float64


def test_mistakes_are_named():
    with pytest.raises(UserError, match="valid: epsilon"):
        Denoiser(lambda x, t: x, make_schedule("vp"), "noise")
    with pytest.raises(ValueError, match=r"\[3\].*\[2, 5\]"):
        Denoiser(lambda x, t: x, make_schedule("vp"))(torch.zeros(2, 5), torch.zeros(3))


class Recorder(nn.Module):
    """Stands for a U-Net: remembers what it was fed."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, sample, timestep, encoder_hidden_states="absent", class_labels=None):
        self.fed = (timestep, encoder_hidden_states, class_labels, sample.dtype, torch.is_autocast_enabled("cpu"))
        return type("Output", (), {"sample": sample * self.weight})


def test_unet_is_fed_the_timesteps_of_diffusers():
    unet, s = Recorder(), make_schedule("ddpm-linear")
    labels = torch.arange(1000)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    Denoiser(unet_model(unet, s), s)(torch.zeros(1000, 1), t, class_labels=labels)
    assert torch.equal(unet.fed[0], torch.arange(1000.0))  # to the last bit, through float32 times
    assert unet.fed[1] is None and unet.fed[2] is labels and not unet.fed[4]
    Denoiser(unet_model(unet, s), s)(torch.zeros(2, 1), 0.50053)
    assert unet.fed[0][0] == pytest.approx(499.53)


def test_autocast_covers_the_network_alone():
    s = make_schedule("vp")
    for wrapped in (Recorder(), nn.Sequential()):
        inner = Recorder()
        if isinstance(wrapped, nn.Sequential):
            wrapped.module = inner  # as DDP does
            wrapped.forward = inner.forward
        else:
            inner = wrapped
        out = Denoiser(unet_model(wrapped, s, autocast=torch.bfloat16), s)(torch.ones(2, 1), 0.5)
        assert inner.fed[4] and out.x0.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
    half = Recorder(torch.float16)
    assert Denoiser(unet_model(half, s), s)(torch.ones(2, 1), 0.5).x0.dtype == torch.float32
    assert half.fed[3] == torch.float16


def test_real_unets():
    from diffusers import UNet2DConditionModel, UNet2DModel

    s = make_schedule("ddpm-linear")
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3])
    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = UNet2DModel(
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            num_class_embeds=4,
            **blocks,
        )
        conditional = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            mid_block_type="UNetMidBlock2D",
            attention_head_dim=4,
            num_class_embeds=4,
            **blocks,
        )
    for unet, extra in ((plain, {}), (conditional, {"encoder_hidden_states": None})):
        with torch.no_grad():
            y = unet(x, torch.tensor([499.0, 499.0]), class_labels=labels, **extra).sample
            out = Denoiser(unet_model(unet, s), s)(x, 0.5, class_labels=labels)
        torch.testing.assert_close(out.eps, y, rtol=1e-5, atol=1e-5)


def test_a_timestep_in_the_place_of_t_is_refused():
    denoiser = Denoiser(lambda x, t: x, make_schedule("flow"), "flow")
    for t in (500, -0.5, torch.tensor([0.5, 500.0]), float("nan")):
        with pytest.raises(UserError, match=r"not within \[0, 1\]"):
            denoiser(torch.zeros(2, 3), t)
