"""The end of a fit: a grid of samples, the evaluation, the model card, and the three lines that say how it went."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, printable
from latentdiff.fitting.budget import in_words, read_clock
from latentdiff.fitting.page import choice_distances, comparable_floor
from latentdiff.utils import atomic, progress_bars

GRID_ROWS, GRID_COLUMNS = 10, 8  # of samples.png
GRID_SHARE = 0.2  # of the time, for samples.png
MOST_IMAGES = 1000  # of the evaluation
FEW_IMAGES, FEW_SECONDS = 64, 30.0  # of the evaluation, where there is hardly any time
SLOW = 1.0  # seconds that a picture is taken to need where nothing was measured
WORDS = ("Good", "Fair", "Rough")
BLURRED_DB = 16.0  # mean PSNR of reconstructions below which hardly anything can be recognised
WEAK_DB = 24.0  # mean PSNR of reconstructions below which the autoencoder limits what is drawn
BUSY = 0.6  # share of the planned steps below which the machine did other work
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
    known = choosing_pace(record)
    pace = min(draw_samples(output, config, GRID_SHARE * seconds / known), known)
    left = seconds - (time.monotonic() - began)
    result = measure(output, config, pace, left)
    lines = last_three(output, config, record, result)
    write_card(output, config, record, result)
    return {"result": result, "lines": lines}


def draw_samples(output: Path, config: Any, most: float = float("inf")) -> float:
    """Write <output>/samples.png; returns the seconds that an image takes, loading the model included.

    most: images for which there is time; two of each row are drawn in any case.
    """
    from latentdiff.generation import generate

    what, all_classes = shown(output, config)
    rows = len(what) or (len(class_names(output)) if all_classes else 1)
    largest = GRID_COLUMNS if what or all_classes else GRID_COLUMNS * GRID_ROWS // 2
    columns = int(max(2, min(largest, most / rows)))
    began = time.monotonic()
    generate(
        output / "model", what=what, all_classes=all_classes, num_images=columns, out=output / "samples.png", progress=False
    )
    return (time.monotonic() - began) / (rows * columns)


def choosing_pace(record: dict[str, Any]) -> float:
    """Seconds that a picture took while the best state was chosen, its share of everything else included."""
    choice = record.get("choice") or {}
    images = choice.get("generated")
    return choice["seconds"] / images if images and choice.get("seconds") else SLOW


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
    few = min(FEW_IMAGES, FEW_SECONDS / pace)  # these few are drawn also where no time is left
    count = int(min(MOST_IMAGES, max(0.6 * seconds / pace, few)))
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
        progress_bars.print_line(printable(f"not measured: {reason}"))
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
    found = numbers(result, record)
    facts = []
    if found.accuracy is not None:
        beside = "" if found.real_accuracy is None else f" (of real pictures in {found.real_accuracy:.0%})"
        facts.append(f"the right class is seen in {found.accuracy:.0%} of its pictures{beside}")
    if found.distance is not None:
        beside = "" if found.real_distance is None else f" (real pictures {found.real_distance:.3g})"
        facts.append(f"Fréchet distance {found.distance:.3g}{beside}")
    if found.copies is not None:
        facts.append(f"{found.copies:.0%} are about copies of training pictures")
    if not facts:
        return f"The model draws pictures. How good they are was not measured: {result.get('reason', 'no time was left')}"
    return f"{word_for(found)}: {', '.join(facts)}; over {found.images} pictures"


@dataclass
class Numbers:
    """What says how good a model is; None where it was not measured.

    Attributes:
        images: pictures that were measured.
        accuracy, real_accuracy: share of the pictures, and of real ones, whose class a classifier sees.
        distance, real_distance: Fréchet distance of the pictures, and of real ones.
        copies: share of the pictures that are about copies of training pictures; None also where it does not stand out.
        psnr: of the autoencoder's reconstructions, in dB.
        classes: of the model; 0 without.
    """

    images: int = 0
    accuracy: float | None = None
    real_accuracy: float | None = None
    distance: float | None = None
    real_distance: float | None = None
    copies: float | None = None
    psnr: float | None = None
    classes: int = 0


def numbers(result: dict[str, Any], record: dict[str, Any]) -> Numbers:
    """The numbers of the evaluation or, where it had less time for pictures, of the choice of the best state."""
    choice = record.get("choice") or {}
    classes = len(((record.get("plan") or {}).get("facts") or {}).get("classes") or [])
    psnr = entry(result, "reconstruction_psnr").get("value")
    kept, images = chosen(choice)
    if images > (result.get("images") or 0):
        real, limit, near = choice.get("real") or {}, choice.get("memorisation_limit"), kept.get("closer_to_training")
        return Numbers(
            images,
            kept.get("label_accuracy"),
            real.get("label_accuracy"),
            kept.get("distance"),
            real.get("distance"),
            near if near is not None and limit is not None and near > limit else None,
            psnr,
            classes,
        )
    frechet, accuracy = entry(result, "frechet["), entry(result, "label_accuracy")
    near = entry(result, "closer_to_training_than_1%_of_held_out[features]")
    distance, real_distance = frechet.get("value"), comparable_floor(frechet)
    if real_distance is None and (pair := choice_distances(choice, kept, images)):  # it holds out classes of any size
        distance, real_distance = pair
    stands_out = bool(near) and near["value"] > max(5 * (near.get("floor") or 0.0), 0.05)
    return Numbers(
        result.get("images") or 0,
        accuracy.get("value"),
        accuracy.get("floor"),
        distance,
        real_distance,
        near["value"] if stands_out else None,
        psnr,
        classes,
    )


def chosen(choice: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(the values of the state that was kept, at the guidance scale that was kept; the pictures that they are of)."""
    guidance = choice.get("guidance") or {}
    for each in guidance.get("scales") or []:
        if each.get("guidance") == guidance.get("scale"):
            return each, guidance.get("images") or 0
    kept = [each for each in choice.get("candidates") or [] if each.get("step") == choice.get("step")]
    return (kept[0], choice.get("images") or 0) if kept else ({}, 0)


def word_for(found: Numbers) -> str:
    """A word for the quality: the weaker one of what classes and distance say, and "Rough" where nothing can be seen.

    Of the label accuracy counts what is above chance, as a share of what real pictures have above it.
    """
    ranks = []
    if found.accuracy is not None and found.real_accuracy is not None:
        chance = 1 / max(2, found.classes)
        share = (found.accuracy - chance) / max(found.real_accuracy - chance, 1e-6)
        ranks.append(0 if share >= 0.85 else 1 if share >= 0.6 else 2)
    if found.distance is not None and found.real_distance:
        times = found.distance / found.real_distance
        ranks.append(0 if times <= 3 else 1 if times < 12 else 2)
    if found.psnr is not None and found.psnr < BLURRED_DB:
        ranks.append(2)
    return WORDS[max(ranks)] if ranks else "Not compared with real pictures"


def see_pictures(output: Path, config: Any) -> str:
    """The second line: the commands that draw pictures, and show them in the browser."""
    if config.condition.includes("text"):
        what, _ = shown(output, config)
        words = shlex.quote(str(what[0] if what else "a prompt"))
    else:
        words = "--all-classes" if config.condition.type == "class" else ""
    model = shlex.quote(str(output / "model"))
    command = " ".join(filter(None, ["latentdiff generate", words, f"--model {model}", "--out samples.png"]))
    page = f"latentdiff serve {shlex.quote(str(output))}"
    return f"See pictures: {command} (some are in {output / 'samples.png'}), or in the browser: {page}"


def what_helps(output: Path, config: Any, record: dict[str, Any], result: dict[str, Any]) -> str:
    """The third line: what would make the model better, from the facts, the weightiest first."""
    plan = record.get("plan") or {}
    facts, choice = plan.get("facts") or {}, record.get("choice") or {}
    images, classes = facts.get("images", 0), max(1, len(facts.get("classes") or []))
    advice = [busy] if (busy := fewer_steps(record)) else []
    found = numbers(result, record)
    if found.psnr is not None and found.psnr < WEAK_DB:
        advice.append(f"a better autoencoder (it reconstructs your pictures at {found.psnr:.0f} dB, and 25 are good)")
    few = classes > 1 and images / classes < FEW_PER_CLASS
    if images and (few or images < FEW or found.copies is not None):
        advice.append(f"more pictures ({images}{f' in {classes} classes' if classes > 1 else ''} is few)")
    steps = [each["step"] for each in choice.get("candidates") or []]
    if choice.get("step") in steps and choice["step"] < max(steps):
        advice.append(f"hardly with more time: its state after {choice['step']} of {max(steps)} steps was the best")
    else:
        advice.append(f"more time: {more_time(output, record)}")
    return f"Better with {'; '.join(advice)}"


def fewer_steps(record: dict[str, Any]) -> str | None:
    """Where other work slowed the machine down: how many of the planned steps of stage 2 were done; else None."""
    planned = ((record.get("plan") or {}).get("steps") or {}).get("diffusion")
    steps = [each["step"] for each in (record.get("choice") or {}).get("candidates") or []]
    if not planned or not steps or max(steps) > BUSY * planned:
        return None
    return f"a machine with less other work ({max(steps)} of about {planned} steps were done)"


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
    lines = [f"Made by `latentdiff fit` from `{Path(record['folder']).name}` in {in_words(read_clock(output)[0])}.", ""]
    lines += [f"- {line}" for line in plan.get("lines", [])]
    atomic.write_text(path, f"{before.rstrip()}\n\n{BEGIN}\n" + "\n".join(lines) + f"\n{END}\n{after}")
    if "values" in result:
        card(output / "model", output / "report")


def last_lines(model: Path) -> str:
    """What the command prints: the three lines that `fit` recorded. model: the folder that it returned."""
    record = json.loads((model.parent / "fit.json").read_text(encoding="utf-8"))
    return "\n".join(record["lines"])
