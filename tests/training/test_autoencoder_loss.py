"""Stage 1's terms: their values, and that the gradient of each reaches what it should train and nothing else."""

import sys
import types

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn
from torch.nn import functional as F

from latentdiff.config import Stage1Loss
from latentdiff.errors import UserError
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.models.feature_net import FeatureNet
from latentdiff.models.perceptual import Lpips, Perceptual
from latentdiff.training.autoencoder_loss import (
    adaptive_weight,
    discriminator_loss,
    discriminator_terms,
    generator_loss,
    kl,
    l1,
    l2,
    stage1_terms,
)

TINY = dict(
    in_channels=1,
    out_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=2,
    mid_block_add_attention=False,
)
NOTHING = Stage1Loss(l1=0, l2=0, perceptual=0, kl=0, commitment=0, adversarial=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.rand(3, 1, 16, 16) * 2 - 1


def kl_forward(images):
    vae = AutoencoderKL(**TINY)
    posterior = vae.encode(images).latent_dist
    return vae, vae.decode(posterior.mean).sample, {"moments": (posterior.mean, posterior.logvar)}


def vq_forward(images):
    vae = VQModel(**TINY, num_vq_embeddings=8)
    out = vae.decode(vae.encode(images).latents)
    return vae, out.sample, {"commitment": out.commit_loss}


def gradient_of(module):
    """Sum of absolute gradients; None if no parameter received one."""
    gradients = [p.grad.abs().sum() for p in module.parameters() if p.grad is not None]
    return sum(gradients).item() if gradients else None


def test_values_against_closed_forms(images):
    other = torch.rand_like(images)
    for ours, exact in ((l1, F.l1_loss), (l2, F.mse_loss)):
        assert torch.allclose(ours(other, images), torch.stack([exact(other[i], images[i]) for i in range(3)]))
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(kl(mean, logvar), exact, rtol=1e-5)
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    assert generator_loss(fake).item() == pytest.approx(1.0)


def test_losses_are_float32_and_refuse_other_shapes(images):
    assert l1(images.bfloat16(), images).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(3, 1, 16, 16\) and \(3, 1, 8, 8\)"):
        l2(images, images[..., :8, :8])


@pytest.mark.parametrize("forward", [kl_forward, vq_forward])
@pytest.mark.parametrize("term", ["l1", "l2", "perceptual", "adversarial"])
def test_a_term_on_the_pictures_trains_encoder_and_decoder_only(images, forward, term):
    vae, reconstruction, _ = forward(images)
    perceptual, discriminator = Perceptual(FeatureNet(1, widths=(8, 8, 8))), PatchDiscriminator(1, (8, 8))
    weights = NOTHING.model_copy(update={term: 1.0})
    if term == "adversarial":  # L1 must stand beside it; its own gradient is then taken away
        weights = weights.model_copy(update=dict(l1=1.0, adaptive=False))
    terms = stage1_terms(images, reconstruction, weights, 0, perceptual=perceptual, discriminator=discriminator)
    loss = terms["total"] - terms["l1"] if term == "adversarial" else terms["total"]
    loss.backward()
    # An encoder may learn less than a decoder, not a millionth of it: rounding left of `total - l1` must not pass.
    assert gradient_of(vae.decoder) > 1e-3
    assert gradient_of(vae.encoder) > 1e-6 * gradient_of(vae.decoder)
    assert gradient_of(perceptual) is None and gradient_of(discriminator) is None
    assert all(p.requires_grad for p in discriminator.parameters())


def test_kl_trains_the_encoder_alone(images):
    vae, reconstruction, parts = kl_forward(images)
    terms = stage1_terms(images, reconstruction, NOTHING.model_copy(update=dict(l1=1.0, kl=1.0)), 0, **parts)
    terms["kl"].backward()
    assert gradient_of(vae.encoder) > 0 and gradient_of(vae.quant_conv) > 0
    assert gradient_of(vae.decoder) is None and gradient_of(vae.post_quant_conv) is None


def test_commitment_trains_encoder_and_codebook(images):
    vae, reconstruction, parts = vq_forward(images)
    terms = stage1_terms(images, reconstruction, NOTHING.model_copy(update=dict(l1=1.0, commitment=1.0)), 0, **parts)
    terms["commitment"].backward()
    assert gradient_of(vae.encoder) > 0 and gradient_of(vae.quantize) > 0
    assert gradient_of(vae.decoder) is None


def test_total_is_the_weighted_sum_of_what_is_logged(images):
    vae, reconstruction, parts = kl_forward(images)
    weights = Stage1Loss(l1=0.7, l2=0.2, perceptual=0.3, kl=1e-3, adversarial=0.5)
    terms = stage1_terms(
        images,
        reconstruction,
        weights,
        0,
        perceptual=Perceptual(FeatureNet(1, widths=(8, 8, 8))),
        discriminator=PatchDiscriminator(1, (8, 8)),
        last_layer=vae.decoder.conv_out.weight,
        **parts,
    )
    expected = sum(getattr(weights, name) * terms[name] for name in ("l1", "l2", "perceptual", "kl"))
    expected = expected + weights.adversarial * terms["adaptive_weight"] * terms["adversarial"]
    assert set(terms) == {"l1", "l2", "perceptual", "kl", "adversarial", "adaptive_weight", "total"}
    assert torch.allclose(terms["total"], expected, rtol=1e-6)
    assert not terms["adaptive_weight"].requires_grad


def test_adaptive_weight_balances_the_gradients_at_the_last_layer(images):
    vae, reconstruction, _ = kl_forward(images)
    discriminator = PatchDiscriminator(1, (8, 8))
    last = vae.decoder.conv_out.weight
    weights = NOTHING.model_copy(update=dict(l1=2.0, adversarial=1.0))
    terms = stage1_terms(images, reconstruction, weights, 0, discriminator=discriminator, last_layer=last)
    (pixels,) = torch.autograd.grad(2.0 * terms["l1"], last, retain_graph=True)
    (adversary,) = torch.autograd.grad(terms["adversarial"], last, retain_graph=True)
    assert terms["adaptive_weight"].item() == pytest.approx((pixels.norm() / adversary.norm()).item(), rel=1e-3)

    at_images = adaptive_weight(terms["l1"], terms["adversarial"], reconstruction)
    (pixels,) = torch.autograd.grad(terms["l1"], reconstruction, retain_graph=True)
    (adversary,) = torch.autograd.grad(terms["adversarial"], reconstruction, retain_graph=True)
    assert at_images.item() == pytest.approx((pixels.norm() / adversary.norm()).item(), rel=1e-3)
    assert adaptive_weight(terms["l1"], 0 * terms["adversarial"], last, maximum=50.0).item() == 50.0


@pytest.mark.parametrize("at_images", [False, True])
def test_adaptive_weight_over_two_processes_is_that_of_the_whole_batch(at_images):
    decoder, discriminator = nn.Conv2d(1, 1, 3, padding=1), PatchDiscriminator(1, (8, 8))
    z, target = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)

    def weight(rows, reduce=None):
        x = decoder(z[rows])
        losses = l1(x, target[rows]).mean(), generator_loss(discriminator(x))
        return adaptive_weight(*losses, x if at_images else decoder.weight, reduce=reduce)

    seen: dict[str, list] = {"first": [], "second": []}
    for name, rows in (("first", slice(0, 2)), ("second", slice(2, 4))):
        weight(rows, reduce=lambda value, name=name: seen[name].append(value) or value)
    means = [(a + b) / 2 for a, b in zip(seen["first"], seen["second"], strict=True)]
    one_of_two = weight(slice(0, 2), reduce=lambda value: means.pop(0))
    assert one_of_two.item() == pytest.approx(weight(slice(0, 4)).item(), rel=1e-4)
    assert weight(slice(0, 2)).item() != pytest.approx(weight(slice(0, 4)).item(), rel=1e-3)


def test_before_its_start_the_adversary_is_neither_computed_nor_felt(images):
    weights = NOTHING.model_copy(update=dict(l1=1.0, adversarial=1.0, adversarial_start=10))
    vae, reconstruction, _ = kl_forward(images)
    parts = {"discriminator": PatchDiscriminator(1, (8, 8)), "last_layer": vae.decoder.conv_out.weight}
    before = stage1_terms(images, reconstruction, weights, 9, **parts)
    assert set(before) == {"l1", "total"} and not weights.adversarial_at(9)
    wanted = torch.autograd.grad(before["l1"], reconstruction, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(before["total"], reconstruction, retain_graph=True)[0], wanted)
    after = stage1_terms(images, reconstruction, weights, 10, **parts)
    assert "adversarial" in after and weights.adversarial_at(10)
    assert not torch.allclose(torch.autograd.grad(after["total"], reconstruction)[0], wanted)


def test_a_weighted_term_without_its_parts_is_refused(images):
    with pytest.raises(ValueError, match="perceptual"):
        stage1_terms(images, images, NOTHING.model_copy(update=dict(perceptual=1.0)), 0)
    with pytest.raises(ValueError, match="discriminator"):
        stage1_terms(images, images, NOTHING.model_copy(update=dict(l1=1.0, adversarial=1.0)), 0)
    with pytest.raises(ValueError, match="l1, l2, perceptual"):
        stage1_terms(images, images, NOTHING, 0)


def test_discriminator_learns_and_leaves_the_autoencoder_alone(images):
    vae, reconstruction, _ = kl_forward(images)
    discriminator = PatchDiscriminator(1, (8, 16, 16))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        terms = discriminator_terms(discriminator, images, reconstruction)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append(terms["total"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert terms["real_logits"] > terms["fake_logits"]
    assert gradient_of(vae) is None


def test_discriminator_judges_each_image_alone_and_any_size():
    discriminator = PatchDiscriminator(3, (8, 16, 16))
    x = torch.randn(4, 3, 28, 36)
    logits = discriminator(x)
    assert logits.shape == (4, 1, 7, 9)
    assert torch.allclose(discriminator(x[2:3]), logits[2:3], atol=1e-5)


def test_perceptual_distance_is_that_of_unit_vectors(images):
    net = FeatureNet(1, widths=(8, 8, 8))
    distance, other = Perceptual(net), torch.rand_like(images)
    expected = torch.zeros(3)
    for a, b in zip(net.maps(other), net.maps(images), strict=True):
        cosine = F.cosine_similarity(a, b, dim=1)  # |u - v|^2 = 2 - 2 cos
        expected += (2 - 2 * cosine).mean((1, 2)) / 3
    assert torch.allclose(distance(other, images), expected, rtol=2e-2)
    assert torch.equal(distance(images, images), torch.zeros(3))
    assert torch.allclose(distance(other[1:2], images[1:2]), distance(other, images)[1:2], atol=1e-6)


def test_perceptual_gradient_is_the_derivative(images):
    distance = Perceptual(FeatureNet(1, widths=(8, 8, 8))).double()
    x, way = torch.rand(1, 1, 16, 16, dtype=torch.float64, requires_grad=True), torch.randn(1, 1, 16, 16).double()
    target = images[:1].double()
    (g,) = torch.autograd.grad(distance(x, target).sum(), x)
    h = 1e-6
    slope = (distance(x + h * way, target) - distance(x - h * way, target)).item() / (2 * h)
    assert slope == pytest.approx((g * way).sum().item(), rel=1e-5)


def test_perceptual_rule_for_channels(images):
    colour = Perceptual(FeatureNet(3, widths=(8, 8, 8)))
    other = torch.rand_like(images)
    repeated = colour(other.repeat(1, 3, 1, 1), images.repeat(1, 3, 1, 1))
    assert torch.allclose(colour(other, images), repeated, atol=1e-6)
    grey = Perceptual(FeatureNet(1, widths=(8, 8, 8)))
    a, b = torch.rand(2, 5, 16, 16), torch.rand(2, 5, 16, 16)
    apart = torch.stack([grey(a[:, i : i + 1], b[:, i : i + 1]) for i in range(5)]).mean(0)
    assert torch.allclose(grey(a, b), apart, atol=1e-6)


def test_perceptual_network_stays_in_eval_mode_and_frozen():
    distance = Perceptual(nn.Sequential(FeatureNet(1), nn.Dropout()))
    distance.train()
    assert not distance.net.training and not any(p.requires_grad for p in distance.parameters())


def test_lpips_says_what_is_missing_or_lets_the_gradient_through(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"):
        Lpips()

    class Offline:
        def __init__(self, **_):
            raise OSError("no route to host")

    class AtHand(nn.Module):  # the package's call: two RGB images -> [B, 1, 1, 1]
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.shape[1] == 3
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Offline))
    with pytest.raises(UserError, match="no route to host"):
        Lpips()
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=AtHand))
    x = torch.rand_like(images).requires_grad_()
    distance = Lpips()(x, images)
    distance.sum().backward()
    assert torch.allclose(distance, l2(x, images)) and x.grad.abs().sum() > 0
