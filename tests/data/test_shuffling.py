"""The order of the data: epochs are permutations, positions are absolute, processes and workers change nothing."""

import itertools

import pytest
import torch

from latentdiff.data.shuffling import Batches, coin_flips, permutation, stream
from latentdiff.errors import UserError

GOLDEN_ORDER = [6, 5, 3, 2, 0, 9, 7, 4, 1, 8]
GOLDEN_FLIPS = [False, True, True, False, True, False, False, False]


class Echo:
    """A data set whose images are their own index and whose labels say whether they were mirrored."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batch(self, indices, *, flips=False):
        return indices, torch.as_tensor(flips).expand(len(indices)).long()


def take(batches: Batches, count: int) -> torch.Tensor:
    return torch.cat([images for images, _ in itertools.islice(batches, count)])


def test_each_epoch_is_a_permutation_and_they_differ():
    epochs = stream(11, seed=5, start=0, count=33).view(3, 11)
    assert all(sorted(epoch.tolist()) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert not torch.equal(stream(11, 6, 0, 11), epochs[0])


def test_any_window_of_the_stream_is_the_same():
    whole = stream(7, 1, 0, 100)
    for start, count in [(0, 7), (3, 2), (5, 20), (48, 52), (99, 1), (10, 0)]:
        assert torch.equal(stream(7, 1, start, count), whole[start : start + count])


def test_permutations_are_uniform():
    counts = torch.zeros(4, 4)
    for epoch in range(2000):
        counts[torch.arange(4), permutation(4, 0, epoch)] += 1
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5  # five standard deviations of a binomial


def test_the_order_is_fixed_for_ever():
    # A run started on one version of the libraries must go on with the same samples on another
    assert stream(10, 0, 0, 10).tolist() == GOLDEN_ORDER and coin_flips(0, 0, 8).tolist() == GOLDEN_FLIPS


def test_flips_are_fair_positional_and_not_the_order():
    flips = coin_flips(3, 0, 10000)
    assert abs(flips.double().mean() - 0.5) < 0.025 and torch.equal(coin_flips(3, 100, 50), flips[100:150])
    lower_half = stream(10000, 3, 0, 10000) < 5000
    assert abs((flips == lower_half).double().mean() - 0.5) < 0.025


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_global_batch(workers):
    whole = stream(10, 4, 0, 24)
    ranks = [Batches(Echo(10), 6, 4, rank=rank, world=3, workers=workers) for rank in range(3)]
    assert torch.equal(torch.cat([take(batches, 1) for _ in range(4) for batches in ranks]), whole)
    for batches in ranks:
        batches.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_run_goes_on_where_its_position_says(workers):
    reference = take(Batches(Echo(9), 4, 2), 8)
    first = Batches(Echo(9), 4, 2, workers=workers)
    before = take(first, 3)
    first.close()  # what was prepared ahead is not counted as seen
    assert first.position == 12
    assert torch.equal(torch.cat([before, take(Batches(Echo(9), 4, 2, start=first.position), 5)]), reference)


def test_flips_reach_the_data_set_by_position():
    halves = [Batches(Echo(5), 8, 7, rank=rank, world=2, flips=True) for rank in range(2)]
    assert torch.equal(torch.cat([next(batches)[1] for batches in halves]), coin_flips(7, 0, 8).long())


def test_an_error_in_a_worker_reaches_the_loop():
    class Broken(Echo):
        def batch(self, indices, *, flips=False):
            raise UserError("no image")

    batches = Batches(Broken(3), 2, 0, workers=1)
    with pytest.raises(UserError, match="no image"):
        next(batches)
    batches.close()


def test_unequal_shares_and_empty_data_are_refused():
    with pytest.raises(UserError, match="global batch 5 .* 2 processes"):
        Batches(Echo(3), 5, 0, world=2)
    with pytest.raises(UserError, match="no images"):
        stream(0, 0, 0, 1)
