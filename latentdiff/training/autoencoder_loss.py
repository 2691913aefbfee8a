"""The terms of the stage-1 loss: pixels, perceptual distance, KL or commitment, and a patch discriminator.

Images are [B, C, H, W] in [-1, 1]. Every term is computed in float32, whatever precision the network ran in. The terms of
each sample are [B]; `stage1_terms` averages them to scalars whose weighted sum is the total, so what is logged is exactly
what is minimised.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.config import Stage1Loss

Reduce = Callable[[Tensor], Tensor]

ADAPTIVE_MAX = 1e4  # largest adaptive weight


def l1(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference per sample, [B]."""
    _same_shape(reconstruction, images)
    return (reconstruction.float() - images.float()).abs().flatten(1).mean(1)  # [B]


def l2(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference per sample, [B]."""
    _same_shape(reconstruction, images)
    return (reconstruction.float() - images.float()).square().flatten(1).mean(1)  # [B]


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over all but the batch, [B] (VAE, arXiv:1312.6114, appendix B)."""
    _same_shape(mean, logvar)
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)  # [B]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator (arXiv:1705.02894), mean over patches; scalar. Halved, as in VQGAN's code."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The autoencoder's side of the hinge loss, -E[D(reconstruction)]; scalar."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    maximum: float = ADAPTIVE_MAX,
    reduce: Reduce | None = None,
    scale: float = 1.0,
) -> Tensor:
    """|grad_L reconstruction| / (|grad_L adversarial| + 1e-6), at most `maximum` (VQGAN, arXiv:2012.09841, eq. 7).

    A scalar without a gradient. The graph is kept for the caller's own backward pass.

    Args:
        reconstruction, adversarial: the two losses, scalars.
        last_layer: L, the weight of the decoder's last convolution, as in the paper. Or the reconstructed images: a compiled
            decoder needs that, as its backward pass cannot run twice.
        maximum: the largest weight.
        reduce: averages a tensor over the processes, so that all get the weight of a single process with the whole batch.
        scale: the losses are multiplied by it in the backward pass, and the gradients divided: in float16 small gradients
            would vanish.
    """

    def gradient_norm(loss: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss * scale, last_layer, retain_graph=True)
        g = g.float() / scale
        if reduce is None:
            return g.norm()
        # A weight's gradient is the mean over the processes. Images differ between them, so their squares add up
        return reduce(g).norm() if last_layer.is_leaf else reduce(g.square().sum()).sqrt()

    return (gradient_norm(reconstruction) / (gradient_norm(adversarial) + 1e-6)).clamp(0.0, maximum).detach()


def likeness_and_adversarial(
    images: Tensor,
    reconstruction: Tensor,
    weights: Stage1Loss,
    discriminator: nn.Module,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two scalars whose gradients `adaptive_weight` compares: pixel and perceptual terms, weighted, and the adversarial."""
    terms = stage1_terms(
        images, reconstruction, weights.model_copy(update={"adversarial": 0.0, "kl": 0.0}), 0, perceptual=perceptual
    )
    with frozen(discriminator):
        return terms["total"], generator_loss(discriminator(reconstruction))


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Within the block, gradients flow through `module` but not into its parameters."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in trainable:
            p.requires_grad_(True)


def stage1_terms(
    images: Tensor,
    reconstruction: Tensor,
    weights: Stage1Loss,
    step: int,
    *,
    moments: tuple[Tensor, Tensor] | None = None,
    commitment: Tensor | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    discriminator: nn.Module | None = None,
    last_layer: Tensor | None = None,
    reduce: Reduce | None = None,
    factor: Tensor | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The autoencoder's loss at a step: scalars by name, with their weighted sum `total`, which is what to run backward from.

    The names are l1, l2, perceptual, kl (nats per image), commitment, adversarial, and adaptive_weight, which is a factor of
    the adversarial term. A term is absent where its weight is 0 or it has not started; kl and commitment also where their
    argument is None. Under no_grad the adaptive weight is 1.

    Args:
        images, reconstruction: [B, C, H, W] in [-1, 1].
        weights: of the terms.
        step: the step's number; 0 is the first.
        moments: mean and logvar of the posterior, of an AutoencoderKL.
        commitment: the quantiser's loss, a scalar, of a VQModel.
        perceptual: (reconstruction, images) -> distances [B].
        discriminator: the module itself, not its DDP wrapper. Its parameters get no gradient here.
        last_layer, reduce, scale: see `adaptive_weight`.
        factor: the adaptive weight where it is known already, as for a batch in pieces.

    Raises:
        ValueError: a term's weight is above 0, and the network it needs is not given; or l1, l2 and perceptual are all 0.
    """
    terms: dict[str, Tensor] = {}
    if weights.l1 > 0:
        terms["l1"] = l1(reconstruction, images).mean()
    if weights.l2 > 0:
        terms["l2"] = l2(reconstruction, images).mean()
    if weights.perceptual > 0:
        if perceptual is None:
            raise ValueError("perceptual weight > 0 needs a perceptual network; give one or set the weight to 0")
        terms["perceptual"] = perceptual(reconstruction, images).mean()
    if not terms:
        raise ValueError("one of the weights l1, l2, perceptual must be > 0")
    likeness = _weighted_sum(terms, weights)

    if moments is not None and weights.kl > 0:
        terms["kl"] = kl(*moments).mean()
    if commitment is not None and weights.commitment > 0:
        terms["commitment"] = commitment.float().mean()
    total = _weighted_sum(terms, weights)

    if weights.adversarial_at(step):
        if discriminator is None or (weights.adaptive and last_layer is None):
            raise ValueError("adversarial weight > 0 needs a discriminator, and last_layer when it is adaptive")
        with frozen(discriminator):
            terms["adversarial"] = generator_loss(discriminator(reconstruction))
        if weights.adaptive and torch.is_grad_enabled():
            assert last_layer is not None
            if factor is None:
                factor = adaptive_weight(likeness, terms["adversarial"], last_layer, ADAPTIVE_MAX, reduce, scale)
            terms["adaptive_weight"] = factor
        else:
            factor = torch.ones_like(total)
        total = total + weights.adversarial * factor * terms["adversarial"]
    return {**terms, "total": total}


def discriminator_terms(discriminator: nn.Module, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """The discriminator's loss `total`, and its mean logits `real_logits` and `fake_logits`; scalars.

    The autoencoder gets no gradient. Real and reconstructed images [B, C, H, W] go through the discriminator in one call,
    because DDP expects one forward pass for each backward pass.
    """
    _same_shape(reconstruction, images)
    fake = reconstruction.detach().to(images.dtype)
    real_logits, fake_logits = discriminator(torch.cat([images, fake])).chunk(2)
    return {
        "total": discriminator_loss(real_logits, fake_logits),
        "real_logits": real_logits.detach().float().mean(),
        "fake_logits": fake_logits.detach().float().mean(),
    }


def _weighted_sum(terms: dict[str, Tensor], weights: Stage1Loss) -> Tensor:
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
