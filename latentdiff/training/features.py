"""Training of the feature network, which is also the classifier of the classification accuracy score."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.evaluation.features import FeatureNet, extract, match_channels, to_unit_range

WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
MAX_SHIFT = 2  # pixels


def shift_images(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each image [B, C, H, W] by its own offset in [-max_shift, max_shift]^2 pixels, edges repeated."""
    B, C, H, W = images.shape
    padded = F.pad(images, [max_shift] * 4, mode="replicate")  # [B, C, H+2m, W+2m]
    offset = torch.randint(0, 2 * max_shift + 1, (2, B), generator=generator)
    rows = (offset[0, :, None] + torch.arange(H))[:, None, :, None]  # [B, 1, H, 1]
    columns = (offset[1, :, None] + torch.arange(W))[:, None, None, :]  # [B, 1, 1, W]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(C)[None, :, None, None], rows, columns]


def train_features(
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    steps: int = 1800,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    widths: tuple[int, int, int] = (32, 64, 128),
    flips: bool = True,
    test: tuple[Tensor, Tensor] | None = None,
    name: str = "features",
    device: str | torch.device = "cpu",
    precision: str = "bf16",
    channels: int | None = None,
    log: Callable[[str], None] = print,
) -> FeatureNet:
    """Train a FeatureNet on images uint8 [N, C, H, W] with labels int64 [N]; return it in eval mode, frozen.

    AdamW with one cycle of learning rate (1708.07120) peaking at lr, label smoothing, and two mild augmentations:
    a shift of up to two pixels, and mirroring when flips. The result is a function of the arguments alone: weights
    and order are drawn from seed without touching the global generator's state.

    Args:
        test: held-out (images, labels); their accuracy is logged and kept in net.info["test_accuracy"].
        precision: "fp32", or "bf16" for bfloat16 autocast of the forward pass.
        channels: what the network takes, by default the images' own.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"images {list(images.shape)} and labels {list(labels.shape)} do not pair up")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(channels or images.shape[1], classes, widths, name)
    net.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(_parameter_groups(net), lr=lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    order = _order(len(images), batch, steps, generator)
    began = time.perf_counter()
    for step, index in enumerate(order, start=1):
        x = match_channels(to_unit_range(images[index]), net.channels)
        x = shift_images(x, MAX_SHIFT, generator)
        if flips:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(x.to(device))
        loss = F.cross_entropy(logits.float(), labels[index].to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        if step % max(1, steps // 10) == 0:
            log(f"features step {step}/{steps} loss {loss.item():.3f} {time.perf_counter() - began:.0f} s")
    net.eval().requires_grad_(False)
    seconds = time.perf_counter() - began
    net.info.update(
        images=len(images), image_size=list(images.shape[2:]), steps=steps, batch=batch, lr=lr, seed=seed, flips=flips,
        seconds=round(seconds, 1),
    )
    if test is not None:
        _, predicted = extract(net, test[0])
        net.info["test_accuracy"] = (predicted == test[1]).double().mean().item()
        log(f"features test accuracy {net.info['test_accuracy']:.4f} after {seconds:.0f} s of training")
    return net


def _parameter_groups(net: nn.Module) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels, none on gains and biases."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]


def _order(n: int, batch: int, steps: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Batches of indices: the concatenation of epochs, each a fresh permutation, cut into steps of batch."""
    epochs = -(-steps * batch // n)
    stream = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return stream[: steps * batch].split(batch)
