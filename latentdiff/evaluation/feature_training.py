"""Train a feature network on labelled images. The classifiers of the classification accuracy score are trained so too."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import Batches
from latentdiff.errors import UserError
from latentdiff.evaluation.classification import label_accuracy
from latentdiff.models.feature_net import FeatureNet
from latentdiff.utils import progress_bars

WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
WARM_UP = 0.25  # share of the steps in which the learning rate rises
MAX_SHIFT = 1  # pixels


def train_features(
    dataset: ImageDataset,
    *,
    test: ImageDataset | None = None,
    steps: int = 2800,
    batch: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
    widths: Sequence[int] = (32, 64, 128),
    flips: bool = True,
    name: str = "features",
    device: str | torch.device = "cpu",
    precision: str = "float32",
    workers: int = 0,
) -> FeatureNet:
    """Train a FeatureNet to classify images; return it folded, frozen and in eval mode.

    AdamW with one cycle of the learning rate ("Super-Convergence", arXiv 1708.07120), label smoothing, and mild augmentation.
    Weights, order and augmentation are drawn from seed; torch's global generator is left alone.

    Args:
        dataset: labelled images.
        test: labelled images that are not trained on; the share classified correctly is kept in info["test_accuracy"].
        steps: optimiser steps.
        batch: images in a step.
        lr: the peak of the learning rate.
        seed: of all draws.
        widths: channels of the network's stages.
        flips: mirror images at random, besides shifting them by up to a pixel.
        name: of the network; it names the metrics measured in it.
        device: where to train.
        precision: of the forward pass: float32, or bfloat16 by autocast.
        workers: processes that read images.

    Raises:
        UserError: the data have no class labels.
    """
    if dataset.labels is None or not dataset.class_names:
        why = f": {dataset.source.unlabelled}" if dataset.source.unlabelled else ""
        raise UserError(f"data '{dataset.source.name}' has no class labels, which a feature network learns from{why}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(dataset.batch([0])[0].shape[1], len(dataset.class_names), widths, name, normed=True)
    began = time.perf_counter()
    data = Batches(dataset, batch, seed, workers=workers, flips=flips)
    _fit(net.to(device), data, steps, lr, torch.Generator().manual_seed(seed), precision)
    data.close()
    net.fold().requires_grad_(False)
    net.info = {
        "class_names": list(dataset.class_names),
        "data": dataset.source.name,
        "data_fingerprint": dataset.fingerprint(),
        "preprocessing": dataset.preprocess.describe(),
        "training": {"images": len(dataset), "steps": steps, "batch": batch, "lr": lr, "seed": seed, "flips": flips}
        | {"precision": precision, "seconds": round(time.perf_counter() - began, 1)},
    }
    if test is not None:
        net.info["test_accuracy"] = label_accuracy(net, test)
    return net


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int, warm_up: float) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle of the learning rate (arXiv:1708.07120) over `steps`; it rises to lr in the share `warm_up` of them."""
    # torch divides by zero where the rise is one step long
    share = warm_up if warm_up * steps != 1 else 2 * warm_up
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=share)


def _fit(net: FeatureNet, data: Batches, steps: int, lr: float, generator: torch.Generator, precision: str) -> None:
    """The training loop. generator: draws the shifts."""
    device = net.head.weight.device
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=lr)
    cycle = one_cycle(optimizer, lr, steps, WARM_UP)
    bar = tqdm(range(steps), desc=net.name, unit="step", **progress_bars.drawn(0.5))
    net.train()
    for _ in bar:
        images, labels = next(data)
        assert labels is not None  # train_features has refused unlabelled data
        images = shift_images(images, MAX_SHIFT, generator).to(device)  # [B, C, H, W]
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        bar.set_postfix({"loss": f"{loss.item():.3f}"}, refresh=False)


def train_classifier(dataset: ImageDataset, seed: int, *, steps: int = 800) -> FeatureNet:
    """Train a classifier for the classification accuracy score. The recipe is the same for generated and real images."""
    return train_features(dataset, steps=steps, seed=seed, name="classifier")


def shift_images(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each of the images [B, C, H, W] by a random offset in [-max_shift, max_shift]^2 pixels of its own; edges repeat."""
    B, C, H, W = images.shape
    padded = F.pad(images, [max_shift] * 4, mode="replicate")  # [B, C, H+2m, W+2m]
    offset = torch.randint(0, 2 * max_shift + 1, (2, B), generator=generator)
    rows = (offset[0, :, None] + torch.arange(H))[:, None, :, None]  # [B, 1, H, 1]
    columns = (offset[1, :, None] + torch.arange(W))[:, None, None, :]  # [B, 1, 1, W]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(C)[None, :, None, None], rows, columns]


def parameter_groups(net: nn.Module) -> list[dict[str, object]]:
    """Parameter groups for AdamW: with weight decay for matrices and kernels, without it for gains and biases."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
