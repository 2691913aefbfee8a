"""Every parameterization is a row that can be inverted, and they agree with each other and with diffusers."""

import pytest
import torch

from latentdiff import prediction
from latentdiff.errors import UserError
from latentdiff.schedules import make_schedule, names


def draw(seed=0, shape=(5, 3, 5, 5)):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("kind", prediction.names())
def test_solve_inverts_target(name, kind):
    s = make_schedule(name)
    x0, eps = draw()
    t = torch.linspace(s.t_min, s.t_max, 5, dtype=torch.float64)  # B == W: a wrong axis would show
    wide = (5, 1, 1, 1)
    x_t = s.alpha(t).reshape(wide) * x0 + s.sigma(t).reshape(wide) * eps
    found = prediction.solve(kind, s, x_t, t, prediction.target(kind, s, x0, eps, t))
    torch.testing.assert_close(found[0], x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(found[1], eps, rtol=0, atol=1e-8)


def test_velocity_target_is_diffusers():
    s = make_schedule("ddpm-linear")
    x0, eps = (z.float() for z in draw())
    k = torch.tensor([0, 10, 300, 700, 999])
    peer = s.to_scheduler("DDPMScheduler").get_velocity(x0, eps, k)
    torch.testing.assert_close(prediction.target("v_prediction", s, x0, eps, (k + 1) / 1000), peer, rtol=0, atol=2e-5)


def test_flow_on_the_straight_path_is_noise_minus_data():
    x0, eps = draw()
    torch.testing.assert_close(prediction.target("flow", make_schedule("flow"), x0, eps, 0.4), eps - x0)


def test_score_is_minus_eps_over_sigma():
    s = make_schedule("vp")
    x0, eps = draw()
    torch.testing.assert_close(prediction.target("score", s, x0, eps, 0.4), -eps / s.sigma(0.4))


def test_flow_is_solved_where_alpha_vanishes():
    x0, eps = draw()
    found = prediction.solve("flow", make_schedule("flow"), eps, 1.0, eps - x0)
    torch.testing.assert_close(found[0], x0)


def test_unknown_prediction_is_named():
    with pytest.raises(UserError, match="valid: epsilon, sample, v_prediction, score, flow"):
        prediction.row("eps", make_schedule("vp"), 0.5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_read_from_scheduler(kind):
    assert prediction.from_scheduler(make_schedule("ddpm-linear").to_scheduler(prediction=kind)) == kind
    assert prediction.from_scheduler(make_schedule("flow").to_scheduler()) == "flow"
