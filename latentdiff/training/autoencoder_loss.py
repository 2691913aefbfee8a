"""The terms of the stage-1 loss: pixels, perception, KL or commitment, patch adversary.

Images are [B, C, H, W] in [-1, 1]. Every term is computed in float32 whatever the network ran in. Per-sample terms
return [B]; `stage1_terms` reduces them to scalars whose weighted sum is the total, so that what is logged is exactly
what is minimised.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Stage1Weights:
    """How much each term counts; a weight of 0 leaves the term out.

    `l1`, `l2` and `perceptual` are means over the values of an image; `kl` multiplies the nats of a whole image, summed
    over its latent. (Where both are sums, as in 2112.10752, 1e-6 there is 1e-6 / (C·H·W) here.) `commitment` multiplies
    the quantiser's own loss, |sg(z) - e|^2 + 0.25 |z - sg(e)|^2 in means over the latent (VQ-VAE, 1711.00937, eq. 3).
    `adversarial` multiplies the adaptive weight when `adaptive` is on, and the term is absent before step
    `adversarial_start`.
    """

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0
    kl: float = 1e-6
    commitment: float = 1.0
    adversarial: float = 0.5
    adversarial_start: int = 0
    adaptive: bool = True
    adaptive_max: float = 1e4

    def adversarial_at(self, step: int) -> bool:
        """Whether the adversary plays at this step (0 is the first); before, neither side is trained."""
        return self.adversarial > 0 and step >= self.adversarial_start


def l1(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference per sample, [B]."""
    _same_shape(reconstruction, images)
    return (reconstruction.float() - images.float()).abs().flatten(1).mean(1)  # [B]


def l2(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference per sample, [B]."""
    _same_shape(reconstruction, images)
    return (reconstruction.float() - images.float()).square().flatten(1).mean(1)  # [B]


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over all but the batch, [B] (1312.6114, appendix B)."""
    _same_shape(mean, logvar)
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)  # [B]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator (1705.02894), halved as in 2012.09841's code; scalar, mean over patches."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The autoencoder's side of the hinge loss: -E[D(reconstruction)]; scalar."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    maximum: float = 1e4,
    reduce: Reduce | None = None,
    scale: float = 1.0,
) -> Tensor:
    """|∇_L reconstruction| / (|∇_L adversarial| + 1e-6), at most `maximum` (2012.09841, eq. 7); detached scalar.

    `last_layer` L is the weight of the decoder's last convolution, as in the paper, or the reconstructed images
    themselves, which asks nothing of the decoder's graph: the choice for a compiled decoder, whose backward pass is
    one piece and may not be run twice. The graph is kept for the caller's own backward pass.

    With several processes, `reduce` averages a tensor over them, so that every one finds the weight that a single
    process with the whole batch finds. `scale` multiplies the losses on the way back and is divided out again: in float16
    small gradients would vanish.
    """

    def gradient_norm(loss: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(loss * scale, last_layer, retain_graph=True)
        g = g.float() / scale
        if reduce is None:
            return g.norm()
        # A shared weight's gradient is the mean of the processes'; images of one process are not those of another.
        return reduce(g).norm() if last_layer.is_leaf else reduce(g.square().sum()).sqrt()

    return (gradient_norm(reconstruction) / (gradient_norm(adversarial) + 1e-6)).clamp(0.0, maximum).detach()


def likeness_and_adversarial(
    images: Tensor,
    reconstruction: Tensor,
    weights: Stage1Weights,
    discriminator: nn.Module,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two scalars whose gradients `adaptive_weight` compares: the weighted likeness terms, and the adversarial one."""
    terms = stage1_terms(images, reconstruction, replace(weights, adversarial=0.0, kl=0.0), 0, perceptual=perceptual)
    with frozen(discriminator):
        return terms["total"], generator_loss(discriminator(reconstruction))


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Within the block, gradients flow through `module` but not into its parameters."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in wanted:
            p.requires_grad_(True)


def stage1_terms(
    images: Tensor,
    reconstruction: Tensor,
    weights: Stage1Weights,
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
    """The autoencoder's loss at a step: scalars by name, `total` among them (the only one to run backward from).

    images, reconstruction: [B, C, H, W]. moments: the posterior's (mean, logvar) of a KL autoencoder. commitment: the
    scalar that diffusers' VQModel.decode returns. perceptual: (reconstruction, images) -> [B]. discriminator: the bare
    module, not its DDP wrapper; its parameters receive no gradient here. last_layer: see `adaptive_weight`. factor: the
    adaptive weight, where it is known already, as of a batch that goes through in pieces. scale: see `adaptive_weight`.

    Terms: l1, l2, perceptual, kl (nats per image), commitment, adversarial, adaptive_weight (a factor, not a
    term). A term whose weight is 0, or that has not started, is absent; KL and commitment are present when what they
    are made of is given, and the others raise ValueError without it. Under no_grad the adaptive weight is 1.
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
                factor = adaptive_weight(likeness, terms["adversarial"], last_layer, weights.adaptive_max, reduce, scale)
            terms["adaptive_weight"] = factor
        else:
            factor = torch.ones_like(total)
        total = total + weights.adversarial * factor * terms["adversarial"]
    return {**terms, "total": total}


def discriminator_terms(discriminator: nn.Module, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """The discriminator's loss and mean logits: total, real_logits, fake_logits. No gradient to the autoencoder.

    Real and reconstructed images go through in one call, so a DDP wrapper sees one forward per backward.
    """
    _same_shape(reconstruction, images)
    fake = reconstruction.detach().to(images.dtype)
    real_logits, fake_logits = discriminator(torch.cat([images, fake])).chunk(2)
    return {
        "total": discriminator_loss(real_logits, fake_logits),
        "real_logits": real_logits.detach().float().mean(),
        "fake_logits": fake_logits.detach().float().mean(),
    }


def _weighted_sum(terms: dict[str, Tensor], weights: Stage1Weights) -> Tensor:
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
