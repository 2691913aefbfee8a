"""Shapes and randomness."""

import pytest
import torch

from latentdiff.utils.random import derive_seed, generators, rand, randn, randn_like
from latentdiff.utils.tensors import flat_mean, flat_std, per_sample, widen


def test_widen_goes_along_the_batch_even_where_every_axis_is_as_long():
    x, t = torch.ones(3, 3, 3, 3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wide = widen(t, x)
    assert wide.shape == (3, 1, 1, 1) and wide.dtype == x.dtype
    assert (wide * x)[1].eq(2).all()
    assert widen(0.5, x).shape == (1, 1, 1, 1) and widen(torch.tensor(0.5), torch.ones(3)).shape == (1,)
    assert widen(t, torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("t", [torch.ones(2), torch.ones(3, 1), torch.ones(1)])
def test_wrong_shapes_are_both_printed(t):
    for function in (widen, per_sample):
        with pytest.raises(ValueError) as error:
            function(t, torch.zeros(3, 2))
        assert str(list(t.shape)) in str(error.value) and "[3, 2]" in str(error.value)


def test_per_sample_is_float64():
    assert torch.equal(per_sample(0.1, torch.zeros(2, 5)), torch.full((2,), 0.1, dtype=torch.float64))


def test_flat_statistics_do_not_mix_samples():
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        assert float(flat_mean(x)[i]) == pytest.approx(float(x[i].mean()), abs=1e-6)
        assert float(flat_std(x)[i]) == pytest.approx(float(x[i].std(correction=0)), abs=1e-6)


@pytest.mark.parametrize("draw", [rand, randn])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_image_does_not_depend_on_its_batch(draw, dtype):
    batch = draw((3, 2, 4), generators(5, [10, 11, 12]), dtype=dtype)
    assert batch.dtype == dtype and batch.shape == (3, 2, 4)
    assert torch.equal(batch[2:], draw((1, 2, 4), generators(5, [12]), dtype=dtype))
    assert not torch.equal(batch[0], batch[1])


def test_generator_decides_not_the_global_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = randn((4, 2), torch.Generator().manual_seed(3))
    assert torch.equal(first, randn_like(torch.zeros(4, 2), torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert randn((4, 2)).shape == (4, 2) and not torch.equal(torch.get_rng_state(), before)


def test_number_of_generators_must_be_the_batch():
    with pytest.raises(ValueError, match=r"2 generators.*\[3, 1\]"):
        randn((3, 1), generators(0, [0, 1]))


def test_seeds_are_stable_and_apart():
    assert derive_seed(1, "noise", 2) == 4669699727149190129  # a resumed run must find the same noise anywhere
    seeds = {derive_seed(1, 2), derive_seed("1", 2), derive_seed(12), derive_seed(2, 1), derive_seed(1, 2, 0)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_python_number_keeps_its_digits():
    assert float(widen(0.1, torch.ones(2, 3, dtype=torch.float64))[0, 0]) == 0.1
