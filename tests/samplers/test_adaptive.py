"""The per-sample ODE solver against exact flows, and the independence of its rows."""

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.samplers import adaptive


def states(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pendulum(t, y):
    """y'' = -sin y with a forcing in t: nothing about it is linear.  y: [..., 2]"""
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -4 * torch.sin(angle) + t.reshape(-1, *(1,) * (angle.ndim - 1))], dim=-1)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-7), (torch.float32, 3e-5)])
@pytest.mark.parametrize("t0, t1", [(0.0, 1.5), (1.5, 0.0), (-1.0, 0.25)])
def test_a_linear_ode_has_its_exact_flow(t0, t1, dtype, atol):
    matrix = torch.tensor([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.3], [0.1, 0.0, -1.0]], dtype=torch.float64)
    y = states((5, 2, 3), dtype=dtype)
    found = adaptive.solve(lambda t, x: x @ matrix.to(x).T, y, t0, t1, rtol=1e-8 if atol < 1e-6 else 1e-6, atol=1e-8)
    truth = y.double() @ torch.linalg.matrix_exp((t1 - t0) * matrix).T
    assert found.y.dtype == dtype and found.nfe.shape == (5,)
    torch.testing.assert_close(found.y.double(), truth, rtol=0, atol=atol * float(truth.abs().max().clamp_min(1)))


def test_the_error_follows_the_tolerance():
    # y' = y cos t, y = y0 exp(sin t): the measured error stays below ten times the tolerance, and falls with it.
    y, errors = states((6, 4)), []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        found = adaptive.solve(lambda t, x: x * torch.cos(t)[:, None], y, 0.0, 5.0, tolerance, tolerance)
        errors.append(float((found.y - y * torch.exp(torch.sin(torch.tensor(5.0).double()))).abs().max()) / tolerance)
    assert max(errors) < 10
    assert errors[-1] * 1e-9 < errors[0] * 1e-3 / 1e4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("t0, t1", [(0.0, 3.0), (3.0, 0.0)])
def test_a_row_does_not_know_its_neighbours(t0, t1, dtype):
    # As many rows as entries, and rows of very different stiffness, so that some arrive long before others.
    rates, y = torch.tensor([0.01, 1.0, 0.3, 6.0]).to(dtype), states((4, 2, 2), dtype=dtype)

    def run(rows):
        def fn(t, x):
            return rates[rows].reshape(-1, 1, 1) * pendulum(t.to(dtype), x)

        return adaptive.solve(fn, y[rows], t0, t1)

    together = run([0, 1, 2, 3])
    assert len(set(together.nfe.tolist())) > 1
    for i in range(4):
        alone = run([i])
        assert int(alone.nfe[0]) == int(together.nfe[i])
        # Not bit by bit: a row that arrives last is read off an interpolant at its end, others are not.
        tight = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(alone.y[0], together.y[i], rtol=tight, atol=tight)


def test_a_shared_step_would_be_seen():
    """What torchdiffeq does, one step for all, fails the test above: the easy row then takes the stiff row's steps."""
    rates, y = torch.tensor([0.01, 6.0]).double(), states((2, 2))

    def fn(t, x):  # both rows as one sample: one norm, one step
        return (rates[:, None] * pendulum(t.expand(2), x.reshape(2, 2))).reshape(1, 4)

    shared = adaptive.solve(fn, y.reshape(1, 4), 0.0, 3.0)
    alone = adaptive.solve(lambda t, x: rates[0] * pendulum(t, x), y[:1], 0.0, 3.0)
    assert int(shared.nfe[0]) > 3 * int(alone.nfe[0])
    assert float((shared.y.reshape(2, 2)[0] - alone.y[0]).abs().max()) > 1e-13


def test_a_row_that_has_arrived_is_left_alone():
    # The first row's function would blow up if it went on past t1; it is asked for at t1 only.
    seen = []

    def fn(t, x):
        seen.append(float(t.max()))
        return torch.tensor([[0.0], [1.0]]).double() * 50 * x * torch.cos(50 * t)[:, None]

    found = adaptive.solve(fn, torch.ones(2, 1).double(), 0.0, 1.0)
    assert max(seen) <= 1.0 + 1e-12 and found.y[0, 0] == 1.0
    assert int(found.nfe[0]) < int(found.nfe[1]) and (found.nfe - 2).remainder(6).eq(0).all()


def test_nfe_counts_the_calls_of_a_single_row():
    calls = []
    found = adaptive.solve(lambda t, x: (calls.append(1), -x)[1], torch.ones(1, 3), 0.0, 2.0)
    assert int(found.nfe[0]) == len(calls)


def test_flat_states_and_empty_intervals():
    y = states((3,))
    torch.testing.assert_close(adaptive.solve(lambda t, x: x, y, 0.0, 1.0).y, y * torch.e, rtol=1e-4, atol=1e-4)
    still = adaptive.solve(lambda t, x: 1 / 0, y, 0.5, 0.5)
    assert still.y is y and still.nfe.tolist() == [0, 0, 0]
    assert adaptive.solve(lambda t, x: x, y[:0], 0.0, 1.0).y.shape == (0,)


def test_no_graph_is_kept():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert not adaptive.solve(lambda t, x: x * weight, states((3, 2)).requires_grad_(), 0.0, 1.0).y.requires_grad


@pytest.mark.parametrize(
    "fn, options, said",
    [
        (lambda t, x: 500 * torch.cos(900 * t)[:, None] * x, {"max_steps": 5}, "max_steps: 5 steps"),
        (lambda t, x: x**2, {}, "rtol 1e-05, atol 1e-05"),  # escapes to infinity at t = 1
        (lambda t, x: x * torch.nan, {}, "finite"),
        (lambda t, x: x, {"rtol": 0.0}, "rtol: must be above 0"),
        (lambda t, x: x, {"atol": -1.0}, "atol: must be above 0"),
        (lambda t, x: x, {"max_steps": 0}, "max_steps: must be above 0"),
    ],
)
def test_failure_is_said_in_one_line(fn, options, said):
    with pytest.raises(UserError, match=said) as error:
        adaptive.solve(fn, torch.ones(2, 1).double(), 0.0, 2.0, **options)
    assert "\n" not in str(error.value)


def test_low_precision_is_refused_and_messages_name_the_variable():
    with pytest.raises(UserError, match="y: the ODE is solved in float32 or float64, not bfloat16"):
        adaptive.solve(lambda t, x: x, torch.ones(2, 1).bfloat16(), 0.0, 1.0)
    with pytest.raises(UserError, match="from angle = 0 to 2"):
        adaptive.solve(lambda t, x: x * torch.nan, torch.ones(2, 1), 0.0, 2.0, variable="angle")


def test_the_last_step_allowed_may_arrive():
    def fn(t, x):
        return x * torch.cos(t)[:, None]

    y = torch.ones(1, 1).double()
    steps = (int(adaptive.solve(fn, y, 0.0, 5.0).nfe[0]) - 2) // 6
    adaptive.solve(fn, y, 0.0, 5.0, max_steps=steps)
    with pytest.raises(UserError, match="max_steps"):
        adaptive.solve(fn, y, 0.0, 5.0, max_steps=steps - 1)
