"""A plan of fixed sizes, until `latentdiff.fitting.plan` measures and decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from latentdiff.checkpoints import resolve_config
from latentdiff.config import AutoencoderConfig, DiffusionConfig, load_config


@dataclass
class Plan:
    autoencoder: AutoencoderConfig | None
    diffusion: DiffusionConfig
    hours: float
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [f"{self.facts['images']} images, {len(self.facts['class_names'])} classes, {self.hours:g} hours"]


def make_plan(folder: str, hours: float | None, overrides: Sequence[str], out: str) -> Plan:
    from latentdiff.training.images import Images

    groups: dict[str, list[str]] = {"data": [], "stage1": [], "": []}
    for item in overrides:
        section = item.partition(".")[0]
        groups[section if section in groups else ""].append(item.removeprefix("stage1."))
    data = [f"data.source={folder}", *groups["data"]]
    trained = not any(item.startswith("autoencoder=") for item in groups[""])
    first: Any = None
    if trained:
        first = load_config(
            resolve_config("configs/folder/autoencoder.yaml"), [*data, *groups["stage1"], f"output={out}/autoencoder"]
        )
    second = load_config(resolve_config("configs/folder/diffusion.yaml"), data)
    images = Images(second.data, 8)  # type: ignore[union-attr]
    kind = "class" if images.class_names else "none"
    name = "diffusion"
    if images.train.captions() is not None:
        kind, name = "text", "text"
    from latentdiff.utils import processes

    more = [f"output={out}/diffusion", f"condition.type={kind}", *([f"autoencoder={out}/autoencoder"] if trained else [])]
    diffusion: Any = load_config(resolve_config(f"configs/folder/{name}.yaml"), [*data, *more, *groups[""]])
    batch = max(1, min(diffusion.train.batch_size, len(images.train)) // processes.count()) * processes.count()
    diffusion.train.batch_size = batch
    if first is not None:
        batch = max(1, min(first.train.batch_size, len(images.train)) // processes.count()) * processes.count()
        first.train.batch_size = batch
    hours = 1.0 if hours is None else hours
    total = hours * 3600
    tail = max(40.0, 0.1 * total)
    rest = max(10.0, total - tail - 20)
    seconds = {"look": 20.0, "autoencoder": 0.3 * rest if trained else 0.0, "diffusion": 0.7 * rest if trained else rest}
    seconds |= {"choose": tail / 2, "report": tail / 2}
    facts = {
        "images": len(images.train),
        "held_out": 0 if images.nothing_held_out else len(images.held_out),
        "class_names": images.class_names,
    }
    return Plan(first, diffusion, hours, seconds, facts)
