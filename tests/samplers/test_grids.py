"""Time grids: they cover their schedule, are even in what they say, and are diffusers' where they bear its names."""

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.samplers import grids
from latentdiff.schedules import make_schedule, names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("grid", grids.names())
@pytest.mark.parametrize("n", [1, 2, 20, 300])
def test_grid_covers_the_schedule(name, grid, n):
    s = make_schedule(name)
    t = grids.make_grid(grid, s, n)
    assert t.shape == (n + 1,) and t.dtype == torch.float64 and (t.diff() < 0).all()
    assert float(t[-1]) == (s.t_min if name == "ve" else 0)
    assert s.t_min <= float(t[-2]) and float(t[0]) <= s.t_max
    if grid != "leading":
        assert float(t[0]) == pytest.approx(s.t_max, abs=1e-12)


def test_grids_are_even_in_what_they_say():
    s = make_schedule("vp")
    angle = torch.atan(s.sigma(grids.angle(s, 10)) / s.alpha(grids.angle(s, 10)))
    torch.testing.assert_close(angle.diff(), angle.diff()[:1].expand(10), rtol=1e-6, atol=0)
    snr = s.log_snr(grids.log_snr(s, 10))[:-1]
    torch.testing.assert_close(snr.diff(), snr.diff()[:1].expand(9), rtol=1e-6, atol=0)
    for rho in (7.0, 3.0):
        ratio = torch.exp(-0.5 * s.log_snr(grids.karras(s, 10, rho))[:-1]) ** (1 / rho)
        torch.testing.assert_close(ratio.diff(), ratio.diff()[:1].expand(9), rtol=1e-6, atol=0)


def test_karras_is_diffusers():
    s = make_schedule("ddpm-linear")
    peer = s.to_scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)
    peer.set_timesteps(12)
    ratio = torch.exp(-0.5 * s.log_snr(grids.karras(s, 12)))
    torch.testing.assert_close(ratio[:1].float(), peer.sigmas[:1], rtol=1e-3, atol=0)
    # diffusers' trailing sigmas end above sigma_min; ours reach it, so only the rule is compared.
    low, high = float(ratio[-2]) ** (1 / 7), float(ratio[0]) ** (1 / 7)
    torch.testing.assert_close(ratio[:-1], (high + torch.linspace(0, 1, 12, dtype=torch.float64) * (low - high)) ** 7)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("n", [7, 20, 33])
def test_spacings_are_diffusers(spacing, n):
    s = make_schedule("ddpm-linear")
    peer = s.to_scheduler("DDIMScheduler", timestep_spacing=spacing)
    peer.set_timesteps(n)
    ours = s.timestep(grids.make_grid(spacing, s, n)[:-1]).round().long()
    assert ours.tolist() == peer.timesteps.tolist()


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("grid", ["angle", "uniform", "shifted", "log_snr", "karras"])
def test_any_number_of_steps_makes_a_grid(name, grid):
    """More steps than t_min leaves room for are spread above it: the scaled-linear schedule has sigma(t_min) = 0.03."""
    s = make_schedule(name)
    for n in (50, 51, 54, 55, 60, 999, 1000, 1001, 3000):
        t = grids.make_grid(grid, s, n)
        assert len(t) == n + 1 and bool((t.diff() < 0).all()) and float(t[-2]) >= s.t_min - 1e-15


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_shifted_is_diffusers_shift_of_the_uniform_grid(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = make_schedule("flow")
    t = grids.shifted(s, 10, shift)
    u = t / (shift - (shift - 1) * t)
    torch.testing.assert_close(u.diff(), u.diff()[:1].expand(10), rtol=1e-9, atol=1e-12)
    # diffusers shifts given sigmas once; its own it shifts twice.
    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=u[:-1].numpy())
    torch.testing.assert_close(peer.sigmas.double(), t, rtol=1e-5, atol=1e-6)
    middle = t[1:-1]  # a shift of log SNR
    moved = s.log_snr(middle) - s.log_snr(u[1:-1])
    torch.testing.assert_close(moved, torch.full_like(moved, -2).mul(torch.tensor(shift).double().log()))
    assert (grids.shifted(s, 10, shift) != grids.uniform(s, 10))[1:-1].all() == (shift != 1)


def test_times_may_be_listed():
    s = make_schedule("flow")
    assert grids.make_grid([0.9, 0.5, 0], s, 7).tolist() == [0.9, 0.5, 0.0]
    assert grids.make_grid(torch.tensor([0.75, 0.5]), s, 7).dtype == torch.float64


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_is_positive(shift):
    with pytest.raises(UserError, match="shift: above 0"):
        grids.shifted(make_schedule("flow"), 4, shift)


@pytest.mark.parametrize("name", ["flow", "cosine"])
@pytest.mark.parametrize("grid", ["trailing", "leading", "linspace"])
def test_no_time_comes_twice(name, grid):
    s = make_schedule(name)
    for n in range(1, s.num_steps + 1):
        t = grids.make_grid(grid, s, n)
        # A difference of rounding would be no step either: DPM-Solver++ divides by it
        assert bool((t.diff() < -1e-6).all()) and len(t) in (n, n + 1), n
        assert len(t) == n + 1 or n > s.num_steps // 2


def test_a_grids_own_options_are_reachable_by_its_name():
    s = make_schedule("flow")
    assert torch.equal(grids.make_grid("karras", s, 8, {"rho": 3.0}), grids.karras(s, 8, 3.0))
    assert torch.equal(grids.make_grid("shifted", s, 8, {"shift": 5.0}), grids.shifted(s, 8, 5.0))
    for grid, options, said in (
        ("karras", {"shift": 5.0}, "karras has no option 'shift'; valid: rho"),
        ("uniform", {"n": 5}, "uniform has no option 'n'; valid: none"),
        ("karras", {"rho": 0.0}, "rho: above 0"),
        ([0.9, 0.0], {"rho": 5.0}, "a list of times has none"),
    ):
        with pytest.raises(UserError, match=said):
            grids.make_grid(grid, s, 8, options)


@pytest.mark.parametrize("steps", [5.0, "5", None])
def test_steps_are_an_integer(steps):
    with pytest.raises(UserError, match="steps: an integer of at least 1"):
        grids.make_grid("angle", make_schedule("flow"), steps)
