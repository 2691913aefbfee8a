"""Codebook usage over an epoch and the revival of dead codes."""

import math

import pytest
import torch
from diffusers import VQModel

from latentdiff.models.codebook import CodeUsage, code_indices, revive_dead_codes


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )


def test_perplexity_and_usage_in_closed_form():
    usage = CodeUsage(8)
    assert usage.perplexity() == 0.0 and usage.usage() == 0.0
    usage.update(torch.full((2, 5), 3))
    assert usage.perplexity() == pytest.approx(1.0) and usage.usage() == 1 / 8
    usage.reset()
    usage.update(torch.arange(4).repeat(7))
    assert usage.perplexity() == pytest.approx(4.0)
    usage.reset()
    usage.update(torch.tensor([0, 0, 0, 1]))
    assert usage.perplexity() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert usage.dead().tolist() == [2, 3, 4, 5, 6, 7]


def test_an_epoch_is_the_sum_of_its_batches_and_processes():
    indices = torch.randint(0, 8, (100,), generator=torch.Generator().manual_seed(0))
    whole, first, second = CodeUsage(8), CodeUsage(8), CodeUsage(8)
    whole.update(indices)
    for part in indices[:60].split(7):
        first.update(part)
    second.update(indices[60:])
    first.merge(second)
    assert torch.equal(first.counts, whole.counts) and first.perplexity() == whole.perplexity()


def test_a_code_outside_the_codebook_is_refused():
    with pytest.raises(ValueError, match="code index 8 in a codebook of 8"):
        CodeUsage(8).update(torch.tensor([1, 8]))


def test_code_indices_are_the_nearest_codes(model):
    latents = torch.randn(2, 3, 4, 5) * 0.05
    indices = code_indices(model, latents)
    codebook = model.quantize.embedding.weight
    distances = (latents.permute(0, 2, 3, 1)[..., None, :] - codebook).square().sum(-1)  # [B, h, w, K]
    assert indices.shape == (2, 4, 5) and torch.equal(indices, distances.argmin(-1))


def test_dead_codes_become_encoder_outputs_and_are_used(model):
    latents = torch.randn(4, 3, 4, 4) + 5.0  # far from the codebook: one code or few serve them all
    usage = CodeUsage(16)
    usage.update(code_indices(model, latents))
    before = model.quantize.embedding.weight.detach().clone()
    alive = usage.counts > 0
    revived = revive_dead_codes(model, usage.counts, latents, torch.Generator().manual_seed(1))
    after = model.quantize.embedding.weight.detach()
    assert revived == len(usage.dead()) > 8
    assert torch.equal(after[alive], before[alive])
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    assert all((vectors == code).all(1).any() for code in after[~alive])
    usage.reset()
    usage.update(code_indices(model, latents))
    assert bool((usage.counts[~alive] > 0).all())
    assert model.quantize.embedding.weight.requires_grad


def test_revival_repeats_with_its_generator(model):
    latents, counts = torch.randn(4, 3, 4, 4), torch.zeros(16, dtype=torch.int64)
    books = []
    for seed in (1, 1, 2):
        revive_dead_codes(model, counts, latents, torch.Generator().manual_seed(seed))
        books.append(model.quantize.embedding.weight.detach().clone())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_no_vector_revives_two_codes(model):
    latents = torch.randn(1, 3, 2, 2)
    assert revive_dead_codes(model, torch.zeros(16, dtype=torch.int64), latents) == 4
    assert len(model.quantize.embedding.weight.detach().unique(dim=0)) == 16
    with pytest.raises(ValueError, match="counts"):
        revive_dead_codes(model, torch.zeros(5, dtype=torch.int64), latents)
