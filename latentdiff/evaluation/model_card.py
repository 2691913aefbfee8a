"""The numbers of a model card, filled in from a record, so that no number stands there without its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

CARD, BEGIN, END = "README.md", "<!-- evaluation -->", "<!-- /evaluation -->"
# Facts on the samples that a reader needs; hashes and the like stay in the record
MADE_FIELDS = (
    "sampler",
    "steps",
    "guidance",
    "guidance_interval",
    "guidance_rule",
    "guidance_rescale",
    "guidance_options",
    "seed",
    "precision",
    "weights",
)
HIDDEN_FIELDS = ("likelihood", "class_counts")


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
    from latentdiff.checkpoints import resolve_model, weights_of
    from latentdiff.evaluation.records import read_record
    from latentdiff.utils.atomic import write_text

    folder, current = resolve_model(model), read_record(record)
    expected, recorded = weights_of(folder)["weights_sha256"], current["made"].get("weights_sha256")
    if recorded != expected:
        reason = f"is of other weights ({recorded[:12]}, not {expected[:12]})" if recorded and expected else "names no weights"
        raise UserError(f"--record {record}: {reason}; give what latentdiff {current['kind']} {model} --out wrote")
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.resolve().name}\n"
    marks = text.count(BEGIN), text.count(END)
    if marks == (0, 0):
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    elif marks != (1, 1) or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path}: needs {BEGIN} and after it {END}, each once, or neither")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    text = f"{before}{BEGIN}\n{section(current)}{END}{after}"
    write_text(path, with_model_index(text, current, path) if metadata else text)
    return path


def with_model_index(text: str, record: Mapping[str, Any], path: Path) -> str:
    """A card's text with the values of a record in the model-index of its front matter.

    They replace the values that latentdiff put there before. Each value has its number of images, its floor and the command
    that made it as arguments of the metric. The rest of the front matter stays, except comments.

    Args:
        text: the card.
        record: of `read_record`.
        path: the card's path, for errors and for the model's name.

    Raises:
        UserError: the front matter is not valid YAML.
    """
    from huggingface_hub import EvalResult, ModelCard
    from yaml import YAMLError

    try:
        card = ModelCard(text if text.lstrip().startswith("---\n") else f"---\n{{}}\n---\n{text}")  # without one it warns
    except (ValueError, TypeError, AttributeError, YAMLError) as error:
        raise UserError(f"{path}: its front matter cannot be read ({' '.join(str(error).split())[:200]})") from None
    command, dataset = f"latentdiff {record['kind']}", Path(str(record["made"].get("data"))).name
    reads_text = record["kind"] == "judge" or record["protocol"].get("prompts")
    results = [
        EvalResult(
            task_type="text-to-image" if reads_text else "unconditional-image-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=key.partition("[")[0],
            metric_name=key,
            metric_value=entry["value"],
            metric_args={side: entry[side] for side in ("images", "floor") if entry.get(side) is not None} | {"by": command},
        )
        for key, entry in record["values"].items()
    ]
    data: Any = card.data
    others = [each for each in data.eval_results or [] if "'by': 'latentdiff " not in str(each.metric_args)]
    data.eval_results, data.model_name = [*others, *results], data.model_name or path.resolve().parent.name
    return str(card)


def section(record: Mapping[str, Any]) -> str:
    """The values of a record as Markdown: each with its number of images and its floor; below them the protocol."""
    from latentdiff.evaluation import guidance_curve
    from latentdiff.evaluation.records import PROTOCOLS
    from latentdiff.evaluation.tables import markdown_table, value_cells

    made, protocol = record["made"], record["protocol"]
    rows = [(name, *value_cells(entry)) for name, entry in record["values"].items()]
    lines = markdown_table(("", "samples", "real images", "reconstructions", "images"), rows)
    if record.get("guidance_curve"):
        lines += ["", *guidance_curve.table(record["guidance_curve"])]
    samples = "; ".join(f"{key.replace('_', ' ')} {_text(made[key])}" for key in MADE_FIELDS if made.get(key) is not None)
    fields = [field for field in PROTOCOLS[record["kind"]] if not field.endswith("sha256") and field not in HIDDEN_FIELDS]
    facts = "; ".join(f"{field.replace('_', ' ')} {_text(protocol[field], '×')}" for field in fields if protocol[field] != {})
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    lines += ["", f"Samples: {samples}.", "", f"Protocol: data {made.get('data')}; {facts}. Versions: {versions}."]
    if record.get("left_out"):
        lines += ["", *(f"Left out: {name} ({reason})." for name, reason in record["left_out"].items())]
    return "\n".join(lines) + "\n"


def _text(value: Any, between: str = " to ") -> str:
    """A fact as text: a mapping without its empty values and hashes, a pair as "a to b"."""
    if isinstance(value, Mapping):
        facts = {key: each for key, each in value.items() if each is not None and not key.endswith("sha256")}
        return ", ".join(f"{key.replace('_', ' ')} {_text(each, between)}" for key, each in facts.items())
    return between.join(map(str, value)) if isinstance(value, list) and len(value) == 2 else str(value)
