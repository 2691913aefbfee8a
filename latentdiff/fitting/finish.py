"""The end of a fit: a grid of samples, the evaluation, the model card, and the three lines that say how it went."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, printable
from latentdiff.fitting.budget import in_words
from latentdiff.utils import atomic

GRID_ROWS, GRID_COLUMNS = 10, 8  # of samples.png
MOST_IMAGES = 1000  # of the evaluation
WEAK_DB = 24.0  # mean PSNR of reconstructions below which the autoencoder limits what is drawn
FEW, FEW_PER_CLASS = 300, 50  # pictures, below which more of them help most
BEGIN, END = "<!-- fit -->", "<!-- /fit -->"


def finish(output: Path, config: Any, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Draw, measure and describe the model of a fit.

    Args:
        output: the fit's folder; the model is in model/.
        config: of stage 2.
        record: the content of fit.json.
        seconds: what all of this may take.

    Returns:
        What goes into fit.json: "lines", the three last lines, and "result", the values that they are made of.
    """
    began = time.monotonic()
    pace = min(draw_samples(output, config), choosing_pace(record))
    left = seconds - (time.monotonic() - began)
    result = measure(output, config, pace, left)
    lines = last_three(output, config, record, result)
    write_card(output, config, record, result)
    return {"result": result, "lines": lines}


def draw_samples(output: Path, config: Any) -> float:
    """Write <output>/samples.png; returns the seconds that an image takes."""
    from latentdiff.generation import generate

    what, all_classes = shown(output, config)
    rows = len(what) or (GRID_ROWS if not all_classes else len(class_names(output)))
    columns = GRID_COLUMNS * GRID_ROWS // 2 if config.condition.type == "none" else GRID_COLUMNS
    began = time.monotonic()
    generate(
        output / "model", what=what, all_classes=all_classes, num_images=columns, out=output / "samples.png", progress=False
    )
    return (time.monotonic() - began) / (columns if config.condition.type == "none" else max(1, rows) * columns)


def choosing_pace(record: dict[str, Any]) -> float:
    """Seconds that a picture took while the best state was chosen, its share of everything else included."""
    choice = record.get("choice") or {}
    images = (choice.get("images") or 0) * len(choice.get("candidates") or [])
    return choice["seconds"] / images if images and choice.get("seconds") else float("inf")


def class_names(output: Path) -> list[str]:
    """The classes of the model of a fit; [] where it has none."""
    from latentdiff.checkpoints import read_meta

    return list(read_meta(output / "model").get("class_names") or [])


def shown(output: Path, config: Any) -> tuple[list[str | int], bool]:
    """(what to draw, whether every class): a few prompts, some classes of many, or all."""
    if config.condition.includes("text"):
        from latentdiff.training.images import Images

        images = Images(config.data, 8)
        captions = dict.fromkeys([*(images.held_out_captions(GRID_ROWS) or []), *config.sample.prompts])
        return [text for text in captions if text][:GRID_ROWS], False
    names = class_names(output)
    if config.condition.type == "none":
        return [], False
    if len(names) <= GRID_ROWS:
        return [], True
    step = len(names) / GRID_ROWS
    return [int(k * step) for k in range(GRID_ROWS)], False


def measure(output: Path, config: Any, pace: float, seconds: float) -> dict[str, Any]:
    """Evaluate the model into <output>/report, with as many images as fit into the time; returns the main values.

    pace: seconds that an image takes. Where nothing can be measured, the result says why, under "reason".
    """
    from latentdiff.evaluation import default_features
    from latentdiff.evaluation.evaluate import evaluate

    classes = len(class_names(output)) if config.condition.type == "class" else 1
    count = int(min(MOST_IMAGES, max(0.0, 0.6 * seconds) / max(pace, 1e-4)))
    count = max(classes, count // classes * classes, -(-2 // classes) * classes)
    try:
        evaluate(
            output / "model",
            config.data.source,
            num_images=count,
            features=default_features(config.data.channels),
            out=output / "report",
            cas_seeds=0,
            reference_cache=output / "report" / "features",
        )
    except UserError as error:
        reason = " ".join(str(error).split())
        print(printable(f"not measured: {reason}"), file=sys.stderr)
        return {"reason": reason}
    values = json.loads((output / "report" / "metrics.json").read_text(encoding="utf-8"))["values"]
    return {"images": count, "values": values}


def entry(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of a metric whose name begins so; {} where it was not measured."""
    return next((each for key, each in result.get("values", {}).items() if key.startswith(name)), {})


def last_three(output: Path, config: Any, record: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """How good the model is, what to type to see pictures, and what would make it better."""
    return [how_good(result, record), see_pictures(output, config), what_helps(output, config, record, result)]


def how_good(result: dict[str, Any], record: dict[str, Any]) -> str:
    """The first line: a word, and the numbers beside those of real images."""
    frechet, accuracy, copies = entry(result, "frechet["), accuracy_entry(result, record), copied(result)
    facts = []
    if accuracy:
        beside = f" (of real pictures in {accuracy['floor']:.0%})" if accuracy.get("floor") is not None else ""
        facts.append(f"the right class is seen in {accuracy['value']:.0%} of its pictures{beside}")
    if frechet:
        facts.append(f"Fréchet distance {frechet['value']:.3g} (real pictures {frechet['floor']:.3g})")
    if copies is not None:
        facts.append(f"{copies:.0%} are about copies of training pictures")
    if not facts:
        return f"The model draws pictures. How good they are was not measured: {result.get('reason', 'no time was left')}"
    count = f", over {result['images']} pictures" if result.get("images") else ""
    return f"{word_for(frechet, accuracy)}: {', '.join(facts)}{count}"


def accuracy_entry(result: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """{"value", "floor"} of the label accuracy: of the evaluation, else of the choice; {} where neither has one."""
    found = entry(result, "label_accuracy")
    if found:
        return found
    choice = record.get("choice") or {}
    kept = next((each for each in choice.get("candidates") or [] if each.get("step") == choice.get("step")), {})
    if kept.get("label_accuracy") is None:
        return {}
    return {"value": kept["label_accuracy"], "floor": (choice.get("real") or {}).get("label_accuracy")}


def copied(result: dict[str, Any]) -> float | None:
    """The share of pictures that are nearer to a training picture than nearly all held-out ones, where it stands out."""
    near = entry(result, "closer_to_training_than_1%_of_held_out[features]")
    if not near or near["value"] <= max(5 * (near.get("floor") or 0.0), 0.05):
        return None
    return near["value"]


def word_for(frechet: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """A word for the quality: by the share of real images' label accuracy, else by the distance."""
    if accuracy and accuracy.get("floor"):
        share = accuracy["value"] / accuracy["floor"]
        return "Good" if share >= 0.85 else "Recognisable" if share >= 0.6 else "Rough"
    if not frechet:
        return "Not compared with real pictures"
    times = frechet["value"] / max(frechet["floor"], 1e-9)
    return "Good" if times < 4 else "Fair" if times < 12 else "Rough"


def see_pictures(output: Path, config: Any) -> str:
    """The second line: the command that draws pictures."""
    if config.condition.includes("text"):
        what, _ = shown(output, config)
        words = shlex.quote(str(what[0] if what else "a prompt"))
    else:
        words = "--all-classes" if config.condition.type == "class" else ""
    model = shlex.quote(str(output / "model"))
    command = " ".join(filter(None, ["latentdiff generate", words, f"--model {model}", "--out samples.png"]))
    return f"See pictures: {command} (some are in {output / 'samples.png'})"


def what_helps(output: Path, config: Any, record: dict[str, Any], result: dict[str, Any]) -> str:
    """The third line: what would make the model better, from the facts, the weightiest first."""
    plan = record.get("plan") or {}
    facts, choice = plan.get("facts") or {}, record.get("choice") or {}
    images, classes = facts.get("images", 0), max(1, len(facts.get("classes") or []))
    advice = []
    psnr = entry(result, "reconstruction_psnr").get("value")
    if psnr is not None and psnr < WEAK_DB:
        advice.append(f"a better autoencoder (it reconstructs your pictures at {psnr:.0f} dB, and 25 are good)")
    few = classes > 1 and images / classes < FEW_PER_CLASS
    if images and (few or images < FEW or copied(result) is not None):
        advice.append(f"more pictures ({images}{f' in {classes} classes' if classes > 1 else ''} is few)")
    steps = [each["step"] for each in choice.get("candidates") or []]
    if choice.get("step") in steps and choice["step"] < max(steps):
        advice.append(f"hardly with more time: its state after {choice['step']} of {max(steps)} steps was the best")
    else:
        advice.append(f"more time: {more_time(output, record)}")
    return f"Better with {'; '.join(advice)}"


def more_time(output: Path, record: dict[str, Any]) -> str:
    """The command that trains for twice the hours."""
    from latentdiff.fitting.fit import default_name

    source = record["folder"]
    elsewhere = output.resolve() != (Path("runs") / default_name(source)).resolve()
    out = f" --out {shlex.quote(str(output))}" if elsewhere else ""
    return f"latentdiff fit {shlex.quote(source)}{out} --resume --hours {2 * record['hours']:.3g}"


def write_card(output: Path, config: Any, record: dict[str, Any], result: dict[str, Any]) -> None:
    """Put the facts of the fit, and the values of the evaluation, into the model's README.md."""
    from latentdiff.evaluation.model_card import card

    path = output / "model" / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "# A latent diffusion model\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    plan = record.get("plan") or {}
    lines = [f"Made by `latentdiff fit` from `{Path(record['folder']).name}` in {in_words(record['hours'] * 3600)}.", ""]
    lines += [f"- {line}" for line in plan.get("lines", [])]
    atomic.write_text(path, f"{before.rstrip()}\n\n{BEGIN}\n" + "\n".join(lines) + f"\n{END}\n{after}")
    if "values" in result:
        card(output / "model", output / "report")


def last_lines(model: Path) -> str:
    """What the command prints: the three lines that `fit` recorded. model: the folder that it returned."""
    record = json.loads((model.parent / "fit.json").read_text(encoding="utf-8"))
    return "\n".join(record["lines"])
