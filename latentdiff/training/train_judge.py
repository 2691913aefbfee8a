"""Training of the judge: identities as classes, styles as a second head, on pictures augmented more than models distort."""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.config import JudgeConfig
from latentdiff.data.pairs import Pairs, read_pairs
from latentdiff.data.shuffling import permutation
from latentdiff.errors import UserError
from latentdiff.evaluation.augmentation import augment
from latentdiff.evaluation.feature_training import one_cycle, parameter_groups
from latentdiff.evaluation.retrieval import HELD_OUT, MILD, SEEN, augmented_scores, index_pictures
from latentdiff.models.judge_net import WIDTHS, JudgeNet
from latentdiff.training.accelerator import announcement, start_accelerator
from latentdiff.training.precision import OneProcess, Step, plain_steps, resolve
from latentdiff.training.run_folder import write_config
from latentdiff.utils import atomic, progress_bars
from latentdiff.utils.random import derive_seed

STYLE_WEIGHT = 1.0  # of the second head in the loss
WARM_UP = 0.2  # share of the steps in which the learning rate rises


def train_judge(config: JudgeConfig, resume: bool = False) -> Path:
    """Train the judge that a config describes, write it to <output>, whole or not at all, and return that folder.

    UserError for a mistake in the config or the data, for an output folder that is not empty, and for `resume`.
    """
    unknown = set(config.model) - {"widths", "dim"}
    if unknown:
        raise UserError(f"model.{sorted(unknown)[0]}: unknown key; a judge has only widths, four numbers, and dim")
    output = Path(config.output)
    if resume or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise UserError(f"output {output}: a judge trains in one go; leave --resume out and name a new folder")
    widths, dim = config.model.get("widths", WIDTHS), config.model.get("dim", 1)
    if not isinstance(widths, (list, tuple)) or len(widths) != len(WIDTHS) or not all(map(_is_size, widths)):
        raise UserError(f"model.widths: a judge has {len(WIDTHS)} stages, each at least 1 wide, got {widths}")
    if not _is_size(dim):
        raise UserError(f"model.dim: must be a number of at least 1, got {dim}")
    pairs = read_pairs(config.data.source)
    accelerator = start_accelerator(config.train)
    if accelerator.num_processes > 1:
        raise UserError("stage: judge trains in one process; start it without accelerate launch")
    config, precision = resolve(config, output, accelerator, partial(_trial_steps, config, pairs))
    announcement(accelerator, config.train, precision)()
    net = fit_judge(
        pairs,
        steps=config.train.steps,
        batch=config.train.batch_size,
        lr=config.lr,
        strength=config.strength,
        seed=config.seed,
        device=accelerator.device,
        precision=config.train.precision,
        **config.model,
    )
    _write(net, config, output)
    for name, score in net.info["augmented"].items():
        shares = ", ".join(f"{key} {score[key]:.4f}" for key in ("top1", "top5", "style"))
        print(
            f"judge: {name} pairs, augmented with strength {MILD:g}: {shares} ({score['pictures']} pictures)", file=sys.stderr
        )
    return output


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def fit_judge(
    pairs: Pairs,
    *,
    steps: int,
    batch: int = 96,
    lr: float = 4e-3,
    strength: float = 1.0,
    seed: int = 0,
    widths: Sequence[int] = WIDTHS,
    dim: int = 192,
    device: str | torch.device = "cpu",
    precision: str = "float32",
) -> JudgeNet:
    """Train a JudgeNet on all pictures, held-out pairs too; returns it folded, frozen and in eval mode.

    AdamW, with one cycle of the learning rate (arXiv:1708.07120). Initial weights, order and augmentation follow from
    `seed`; torch's global random numbers stay as they are.

    Args:
        pairs: the pictures, each with an identity and a style.
        steps, batch, lr: training steps, pictures a step, highest learning rate.
        strength: of the augmentation, above 0, at most 1.
        seed: of all random numbers.
        widths, dim: of the JudgeNet.
        device, precision: where it is trained, and in which floating-point type.

    Returns:
        The judge; its info has "augmented", its scores on mildly augmented real pictures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = JudgeNet(pairs.identity_names, pairs.style_names, widths, dim, normed=True).to(device)
    began = time.perf_counter()
    _fit(net, pairs, steps, batch, lr, strength, seed, precision)
    net.fold().requires_grad_(False)
    net.info = {
        "data_fingerprint": pairs.fingerprint(),
        "training": {"pictures": len(pairs), "steps": steps, "batch": batch, "lr": lr, "strength": strength, "seed": seed}
        | {"precision": precision, "seconds": round(time.perf_counter() - began, 1)},
    }
    net.info["augmented"] = _own_scores(net, pairs, seed)
    return net


def _fit(net: JudgeNet, pairs: Pairs, steps: int, batch: int, lr: float, strength: float, seed: int, precision: str) -> None:
    """The steps of optimisation."""
    device = net.prototypes.device
    optimizer = torch.optim.AdamW(parameter_groups(net), lr=lr)
    cycle = one_cycle(optimizer, lr, steps, WARM_UP)
    generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation"))
    batches = _batches(len(pairs), min(batch, len(pairs)), seed)
    net.train().to(memory_format=torch.channels_last)
    # In a log file the bar is refreshed rarely, to keep it readable
    bar = tqdm(range(steps), desc="judge", unit="step", **progress_bars.drawn(0.5))
    for _ in bar:
        rows = next(batches)
        # Each picture has a strength of its own, from 0 on: the strongest augmentation hides the shading that styles differ in
        strengths = strength * torch.rand(len(rows), 1, 1, 1, generator=generator)
        images = augment(pairs.images(rows), generator, strengths)  # [B, 3, H, W]
        images = images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            identity, style = net(images)
        loss = F.cross_entropy(identity.float(), pairs.identities[rows].to(device))
        loss = loss + STYLE_WEIGHT * F.cross_entropy(style.float(), pairs.styles[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        bar.set_postfix({"loss": f"{loss.item():.3f}"}, refresh=False)
    net.to(memory_format=torch.contiguous_format)


def _trial_steps(config: JudgeConfig, pairs: Pairs, alone: OneProcess) -> Step:
    """Training steps of such a network on pictures of the data without augmentation, to be timed."""
    net = JudgeNet(pairs.identity_names, pairs.style_names, normed=True, **{"widths": WIDTHS, "dim": 192, **config.model})

    def loss(module: nn.Module, batch: int) -> Tensor:
        rows = torch.randint(len(pairs), (batch,))
        images = pairs.images(rows).to(alone.device, memory_format=torch.channels_last)
        identity, style = module(images)
        first = F.cross_entropy(identity.float(), pairs.identities[rows].to(alone.device))
        return first + STYLE_WEIGHT * F.cross_entropy(style.float(), pairs.styles[rows].to(alone.device))

    return plain_steps(alone, net.to(memory_format=torch.channels_last), loss)


def _batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of rows [batch]: a new order each epoch, without its incomplete last batch."""
    epoch = 0
    while True:
        order = permutation(count, seed, f"judge {epoch}")
        yield from order[: count // batch * batch].split(batch)
        epoch += 1


def _own_scores(net: JudgeNet, pairs: Pairs, seed: int) -> dict[str, Any]:
    """The judge's scores on every real picture, mildly augmented, for seen and for held-out pairs."""
    index = index_pictures(net, pairs)
    parts = {SEEN: ~pairs.held_out, HELD_OUT: pairs.held_out}
    return {name: augmented_scores(index, part.nonzero().flatten(), seed) for name, part in parts.items()}


def _write(net: JudgeNet, config: JudgeConfig, output: Path) -> None:
    with atomic.new_folder(output) as new:
        write_config(new, config)
        net.save(new)
