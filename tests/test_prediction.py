"""Every parameterization is a row that can be inverted, and they agree with each other and with diffusers."""

import pytest
import torch

from latentdiff import prediction
from latentdiff.errors import UserError
from latentdiff.schedules import make_schedule, names


def draw(seed=0, shape=(5, 3, 5, 5)):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))


def edm_output(s, x0, x_t, alpha, sigma):
    """F with x0 = c_skip x + c_out F, 2206.00364 table 1, at x_t/alpha and sigma/alpha."""
    x, r, std = x_t / alpha, sigma / alpha, s.sigma_data
    c_skip, c_out = std**2 / (r**2 + std**2), r * std / (r**2 + std**2).sqrt()
    return (x0 - c_skip * x) / c_out


# What the network says, as the papers define it: functions of (schedule, x0, eps, x_t, alpha, sigma, alpha', sigma')
DEFINITIONS = {
    "epsilon": lambda s, x0, eps, x_t, a, b, da, db: eps,
    "sample": lambda s, x0, eps, x_t, a, b, da, db: x0,
    "v_prediction": lambda s, x0, eps, x_t, a, b, da, db: a * eps - b * x0,
    "score": lambda s, x0, eps, x_t, a, b, da, db: -(x_t - a * x0) / b**2,  # of N(alpha x0, sigma^2) at x_t
    "flow": lambda s, x0, eps, x_t, a, b, da, db: da * x0 + db * eps,  # dx_t/dt
    "edm": lambda s, x0, eps, x_t, a, b, da, db: edm_output(s, x0, x_t, a, b),
}


def check_round_trip(kind: str, name: str) -> None:
    """(x0, eps) -> the definition's y -> (x0, eps), and target is that y: to 1e-10 in float64, away from the ends."""
    s = make_schedule(name)
    x0, eps = draw()
    t = s.t_min + (s.t_max - s.t_min) * torch.linspace(0.05, 0.95, 5, dtype=torch.float64)  # B == W: an axis would show
    a, b, da, db = (fn(t).reshape(5, 1, 1, 1) for fn in (s.alpha, s.sigma, s.d_alpha, s.d_sigma))
    x_t = a * x0 + b * eps
    y = DEFINITIONS[kind](s, x0, eps, x_t, a, b, da, db)
    torch.testing.assert_close(prediction.target(kind, s, x0, eps, t), y, rtol=1e-10, atol=1e-10)
    found = prediction.solve(kind, s, x_t, t, y)
    torch.testing.assert_close(found[0], x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1], eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("kind", prediction.names())
def test_every_parameterization_is_its_papers_and_inverts(name, kind):
    check_round_trip(kind, name)


ONE, ZERO = torch.ones_like, torch.zeros_like
ROW_BUGS = {
    "epsilon": lambda s, t: (ZERO(t), -ONE(t)),
    "sample": lambda s, t: (s.alpha(t), ZERO(t)),
    "v_prediction": lambda s, t: (s.sigma(t), s.alpha(t)),
    "score": lambda s, t: (ZERO(t), -1 / s.sigma(t) ** 2),
    "flow": lambda s, t: (-s.d_alpha(t), s.d_sigma(t)),
    "edm": lambda s, t: (s.sigma(t), -s.alpha(t)),  # without the normalisation, which a preserved variance hides
}


@pytest.mark.parametrize("kind", ROW_BUGS)
def test_a_wrong_row_is_seen(kind, monkeypatch):
    monkeypatch.setitem(prediction._ROWS, kind, ROW_BUGS[kind])
    with pytest.raises(AssertionError):
        check_round_trip(kind, "flow")


@pytest.mark.parametrize("kind", prediction.names())
def test_a_wrong_inverse_is_seen(kind, monkeypatch):
    right = prediction.solve
    for wrong in (
        lambda *args: right(*args)[::-1],  # x0 and eps exchanged
        lambda k, s, x_t, t, y: right(k, s, x_t, t, -y),
        lambda k, s, x_t, t, y: tuple(z * (1 + 1e-8) for z in right(k, s, x_t, t, y)),
    ):
        monkeypatch.setattr(prediction, "solve", wrong)
        with pytest.raises(AssertionError):
            check_round_trip(kind, "vp")


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("kind", prediction.names())
def test_solve_inverts_target_up_to_the_ends(name, kind):
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
    with pytest.raises(UserError, match="valid: epsilon, sample, v_prediction, score, flow, edm"):
        prediction.row("eps", make_schedule("vp"), 0.5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_read_from_scheduler(kind):
    assert prediction.from_scheduler(make_schedule("ddpm-linear").to_scheduler(prediction=kind)) == kind
    for name in (None, "DPMSolverMultistepScheduler"):
        assert prediction.from_scheduler(make_schedule("flow").to_scheduler(name)) == "flow"
    assert prediction.from_scheduler(make_schedule("edm").to_scheduler()) == "edm"


def test_edms_other_prediction_is_refused():
    peer = make_schedule("edm").to_scheduler(prediction_type="v_prediction")
    with pytest.raises(UserError, match="EDMEulerScheduler with prediction_type v_prediction; valid: epsilon"):
        prediction.from_scheduler(peer)


def test_edm_is_minus_v_on_a_preserved_variance():
    s, t = make_schedule("cosine"), torch.linspace(0, 1, 11, dtype=torch.float64)
    v = prediction.row("v_prediction", s, t)
    torch.testing.assert_close(prediction.row("edm", s, t), tuple(-z for z in v), rtol=0, atol=1e-15)
