"""Samples of codes against enumerated distributions."""

import pytest
import torch
from alphabet import Alphabet, chi_square, total_variation

from latentdiff.discrete import Absorbing, Uniform, sample

TRUTH = Alphabet()


def counts(process, steps, n=8000, predict=None, **options):
    predict = predict or TRUTH.predict(process)
    return TRUTH.histogram(sample(predict, (n, 3), process, steps, torch.Generator().manual_seed(0), **options))


@pytest.mark.parametrize("kind, name", [(Absorbing, "linear"), (Absorbing, "cosine"), (Uniform, "linear"), (Uniform, "cosine")])
def test_samples_are_those_of_the_enumerated_chain_and_near_the_joint(kind, name):
    process = kind(3, name)
    predict = TRUTH.predict(process)
    distances = []
    for steps in (1, 4, 16):
        chain = TRUTH.chain(process, steps, predict)
        assert abs(chi_square(counts(process, steps), chain)) < 3.5
        distances.append(total_variation(chain, TRUTH.joint))
    # One step draws each position from its own marginal: the error of a factorised joint.
    places = torch.nn.functional.one_hot(TRUTH.states, 3).double()
    marginals = torch.einsum("s,snk->nk", TRUTH.joint, places)
    torch.testing.assert_close(TRUTH.chain(process, 1, predict), torch.einsum("snk,nk->sn", places, marginals).prod(1))
    assert distances[0] > 0.3 and distances[2] < 0.5 * distances[1] < 0.25 * distances[0] + 0.1
