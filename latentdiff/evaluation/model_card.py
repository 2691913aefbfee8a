"""The numbers of a model card, filled from a record, so that none stands there without the protocol that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

from latentdiff.checkpoints import weights_of
from latentdiff.errors import UserError
from latentdiff.evaluation import guidance_curve
from latentdiff.evaluation.markdown_report import format_value
from latentdiff.evaluation.records import PROTOCOLS, read_record
from latentdiff.utils.atomic import write_text

CARD, BEGIN, END = "README.md", "<!-- evaluation -->", "<!-- /evaluation -->"
# Said in the line of how the samples were made; what only a machine compares (hashes) stays in the record
_MADE = ("sampler", "steps", "guidance", "guidance_interval", "seed", "precision", "weights")
_UNSAID = ("likelihood", "class_counts")


def card(model: str | Path, record: str | Path, metadata: bool = False) -> Path:
    """Put the values and protocol of a record between two comments of a model's README.md.

    They replace what stood between <!-- evaluation --> and <!-- /evaluation -->. A card without the comments gets them at its
    end, and one that is not there is made.

    Args:
        model: the checkpoint that was measured: a folder or a Hub name.
        record: metrics.json of evaluate or judge, or the folder that holds it.
        metadata: put the values into the card's YAML front matter too, as the model-index that the Hub reads.

    Returns:
        The path of README.md.

    Raises:
        UserError: the record is of other weights than the model's or names none, or the card has one comment without the
            other.
    """
    from latentdiff.checkpoints import resolve_model

    folder, found = resolve_model(model), read_record(record)
    ours, theirs = weights_of(folder)["weights_sha256"], found["made"].get("weights_sha256")
    if theirs != ours:
        said = f"is of other weights ({theirs[:12]}, not {ours[:12]})" if theirs and ours else "names no weights"
        raise UserError(f"--record {record}: {said}; give what latentdiff {found['kind']} {model} --out wrote")
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.resolve().name}\n"
    marks = text.count(BEGIN), text.count(END)
    if marks == (0, 0):
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    elif marks != (1, 1) or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path}: needs {BEGIN} and after it {END}, each once, or neither")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    text = f"{before}{BEGIN}\n{section(found)}{END}{after}"
    write_text(path, with_model_index(text, found, path) if metadata else text)
    return path


def with_model_index(text: str, record: Mapping[str, Any], path: Path) -> str:
    """A card with the values of a record in its front matter's model-index, in the place of those that were put there before.

    Each has its number of images, its floor and which command made it as arguments of the metric. The rest of the front
    matter stays, but for its comments. UserError, naming the card's path, where that is no YAML.
    """
    from huggingface_hub import EvalResult, ModelCard

    try:
        card = ModelCard(text if text.lstrip().startswith("---\n") else f"---\n{{}}\n---\n{text}")  # without one it warns
    except (ValueError, TypeError, AttributeError, YAMLError) as error:
        raise UserError(f"{path}: its front matter cannot be read ({' '.join(str(error).split())[:200]})") from None
    by, name = f"latentdiff {record['kind']}", Path(str(record["made"].get("data"))).name
    told = record["kind"] == "judge" or record["protocol"].get("prompts")
    data: Any = card.data
    task = "text-to-image" if told else "unconditional-image-generation"
    where: dict[str, Any] = {"task_type": task, "dataset_type": name, "dataset_name": name}
    others = [each for each in data.eval_results or [] if "'by': 'latentdiff " not in str(each.metric_args)]
    ours = [
        EvalResult(
            **where,
            metric_type=key.partition("[")[0],
            metric_name=key,
            metric_value=entry["value"],
            metric_args={side: entry[side] for side in ("images", "floor") if entry.get(side) is not None} | {"by": by},
        )
        for key, entry in record["values"].items()
    ]
    data.eval_results, data.model_name = [*others, *ours], data.model_name or path.resolve().parent.name
    return str(card)


def section(record: Mapping[str, Any]) -> str:
    """The values of a record as Markdown: each with its number of images, its floor, and below them the protocol."""
    made, protocol = record["made"], record["protocol"]
    lines = ["| | samples | real images | reconstructions | images |", "|---|---|---|---|---|"]
    for name, entry in record["values"].items():
        cells = [
            format_value(entry),
            format_value(entry, "floor"),
            format_value(entry, "reconstruction"),
            str(entry.get("images", "–")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if record.get("guidance_curve"):
        lines += ["", *guidance_curve.table(record["guidance_curve"])]
    how = "; ".join(f"{key.replace('_', ' ')} {_said(made[key])}" for key in _MADE if made.get(key) is not None)
    fields = (f for f in PROTOCOLS[record["kind"]] if not f.endswith("sha256") and f not in _UNSAID and protocol[f] != {})
    what = "; ".join(f"{field.replace('_', ' ')} {_said(protocol[field], '×')}" for field in fields)
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    lines += ["", f"Samples: {how}.", "", f"Protocol: data {made.get('data')}; {what}. Versions: {versions}."]
    left = record.get("left_out") or {}
    lines += ["", *(f"Left out: {name} ({why})." for name, why in left.items())] if left else []
    return "\n".join(lines) + "\n"


def _said(value: Any, between: str = " to ") -> str:
    if isinstance(value, Mapping):
        parts = ((key, each) for key, each in value.items() if each is not None and not key.endswith("sha256"))
        return ", ".join(f"{key.replace('_', ' ')} {_said(each, between)}" for key, each in parts)
    return between.join(map(str, value)) if isinstance(value, list) and len(value) == 2 else str(value)
