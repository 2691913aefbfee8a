"""Codebook usage over an epoch and the revival of dead codes."""

import math

import pytest
import torch
from diffusers import VQModel
from planted import planted

from latentdiff.models import codebook
from latentdiff.models.codebook import (
    CodebookEma,
    CodeUsage,
    code_indices,
    codebooks,
    codes_of,
    revive,
    revive_dead_codes,
)
from latentdiff.pipelines.vq_models import ResidualVQModel


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


# Several levels -------------------------------------------------------------------------------------------------------


def residual_model() -> ResidualVQModel:
    torch.manual_seed(0)
    model = ResidualVQModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
        num_quantizers=2,
        mid_block_add_attention=False,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def check_levels(update):
    usage = CodeUsage(4, levels=2)
    update(usage, torch.tensor([[[0, 3], [1, 3]], [[0, 3], [1, 3]]]))  # [..., L]
    assert usage.counts.tolist() == [[2, 2, 0, 0], [0, 0, 0, 4]]
    assert usage.usage() == 3 / 8 and usage.dead().tolist() == [2, 3, 4, 5, 6]
    coarse, fine = usage.levels()
    assert (coarse.perplexity(), fine.perplexity()) == (pytest.approx(2), pytest.approx(1))
    assert usage.perplexity() == pytest.approx(math.sqrt(2))  # of the mean entropy


def test_levels_are_counted_apart():
    check_levels(CodeUsage.update)
    with pytest.raises(AssertionError):
        check_levels(planted(CodeUsage.update, ("own += found", "own.copy_(found > 0)")))


def test_a_later_level_is_revived_by_what_is_left_over():
    model = residual_model()
    before = codebooks(model).detach().clone()
    latents = torch.randn(4, 3, 4, 4)
    counts = torch.ones(2, 16, dtype=torch.int64)
    counts[0, 5] = counts[1, [2, 7]] = 0
    rows = revive(model, counts, latents, torch.Generator().manual_seed(0))
    assert rows.tolist() == [5, 18, 23]
    after = codebooks(model).detach()
    changed = (after != before).any(-1).nonzero().tolist()
    assert changed == [[0, 5], [1, 2], [1, 7]]
    vectors = latents.movedim(1, -1).reshape(-1, 3)
    assert bool((vectors == after[0, 5]).all(1).any())
    left = vectors - after[0][torch.cdist(vectors, after[0]).argmin(1)]
    for row in (2, 7):
        assert bool((left - after[1, row]).norm(dim=1).min() < 1e-6)


# Running means --------------------------------------------------------------------------------------------------------


def check_means(update, model):
    """Three batches, against N and m written down code by code; a code that is never chosen keeps its row."""
    ema, decay = CodebookEma(model, 0.8), 0.8
    books = codebooks(model).detach().clone()
    levels, codes, channels = books.shape
    counts, sums = torch.ones(levels, codes), books.clone()
    for seed in range(3):
        latents = torch.randn(2, channels, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.3
        chosen = codes_of(model, latents).movedim(1, -1).reshape(-1, levels)
        update(ema, model, latents, chosen)
        rest = latents.movedim(1, -1).reshape(-1, channels)
        for level in range(levels):
            for k in range(codes):
                own = rest[chosen[:, level] == k]
                counts[level, k] = decay * counts[level, k] + (1 - decay) * len(own)
                sums[level, k] = decay * sums[level, k] + (1 - decay) * own.sum(0)
            rest = rest - books[level][chosen[:, level]]
        total = counts.sum(1, keepdim=True)
        books = sums / ((counts + 1e-5) / (total + codes * 1e-5) * total)[..., None]
        torch.testing.assert_close(codebooks(model).detach(), books, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2])
def test_rows_are_running_means_of_the_latents_that_chose_them(levels, model):
    check_means(CodebookEma.update, model if levels == 1 else residual_model())
    for bug in [
        ("new[..., 1:], 1 - self.decay", "new[..., 1:], self.decay"),
        ("smoothed[..., None]", "self.counts[..., None].clamp_min(1)"),
        ("self.counts.lerp_(new[..., 0], 1 - self.decay)", "pass"),
    ]:
        with pytest.raises(AssertionError):
            check_means(planted(CodebookEma.update, bug, _left_over=codebook._left_over), model)


def check_parts(update):
    """Two processes, each with half of a batch and the sum over both, come to what one comes to."""
    latents = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    one, two = residual_model(), residual_model()
    whole, half = CodebookEma(one, 0.9), CodebookEma(two, 0.9)
    codes = codes_of(one, latents).movedim(1, -1).reshape(-1, 2)
    update(whole, one, latents, codes)
    other = []
    CodebookEma(residual_model(), 0.9).update(residual_model(), latents[2:], codes[32:], lambda new: other.append(new) or new)
    update(half, two, latents[:2], codes[:32], lambda new: new + other[0])
    torch.testing.assert_close(codebooks(two), codebooks(one))
    torch.testing.assert_close(half.counts, whole.counts)


def test_running_means_of_several_processes_are_those_of_one():
    check_parts(CodebookEma.update)
    with pytest.raises(AssertionError):
        check_parts(planted(CodebookEma.update, ("new = total(new)", "pass"), _left_over=codebook._left_over))


def test_running_means_are_those_of_vector_quantize_pytorch(model):
    peer = pytest.importorskip("vector_quantize_pytorch")
    theirs = peer.VectorQuantize(3, 16, decay=0.8, threshold_ema_dead_code=0, accept_image_fmap=True).train()
    theirs._codebook.embed.data.copy_(codebooks(model))
    theirs._codebook.embed_avg.data.copy_(codebooks(model))
    ema = CodebookEma(model, 0.8)
    for seed in range(3):
        latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 0.3
        codes = codes_of(model, latents)
        assert torch.equal(theirs(latents)[1], codes[:, 0])
        ema.update(model, latents, codes.flatten())
        torch.testing.assert_close(codebooks(model).detach(), theirs._codebook.embed, rtol=1e-4, atol=1e-6)
