"""Which sampler, how many steps, how much guidance and where: a search under a budget, its Pareto front, a confirmed choice.

Distances move with the seed, so the best of many trials is in part the luckiest. What a search finds is therefore measured
again beside the checkpoint's present default, with seeds that the search has not seen, and takes its place only if it is
better there too.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, printable
from latentdiff.evaluation import DEFAULT_FEATURES
from latentdiff.utils import atomic

TABLE, INDEX = "tuning", "model_index.json"
SAMPLERS = ("scheduler", "dpmpp_2m", "dpmpp_3m", "heun", "euler", "euler_maruyama")
STEPS = (3, 32)
GUIDANCE = (1.0, 3.0)
FINALISTS = 3
SETTING_KEYS = ("sampler", "steps", "guidance", "guidance_interval")

# measure(setting, seed) -> (U-Net evaluations an image, Fréchet distance, label accuracy or None)
Setting = dict[str, Any]
Measure = Callable[[Setting, int], tuple[float, float, float | None]]


def tune(
    model: str | Path,
    data: str,
    budget: float = 400.0,
    num_images: int = 1000,
    samplers: Sequence[str] | None = None,
    confirm_seeds: int = 3,
    max_evaluations: float | None = None,
    out: str | Path = "tuning",
    write: bool = False,
    features: str | Path = DEFAULT_FEATURES,
    seed: int = 0,
    precision: str = "float32",
    batch_size: int = 128,
) -> dict[str, Any]:
    """Search sampler, steps, guidance and its interval for the best images at a given cost.

    What the search finds is measured again, on other seeds, beside the checkpoint's present default, and is chosen only if it
    is better there too. A checkpoint with a scheduler keeps it, so that only its steps and guidance are chosen; one without
    may be given another of latentdiff's samplers. `out` gets tuning.json, tuning.md and tuning.png. A search that is there
    with the same protocol goes on.

    Args:
        model: a checkpoint: a folder or a Hub name.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards.
        budget: u-Net evaluations for an image, summed over the trials of the search; a guided step takes two.
        num_images: images of a trial, the same number of each class.
        samplers: the samplers to search; "scheduler" is the checkpoint's own. By default scheduler (where there is one),
            dpmpp_2m, dpmpp_3m, heun, euler and euler_maruyama.
        confirm_seeds: how many other seeds measure the finalists and the default again; two or more.
        max_evaluations: most U-Net evaluations for an image of the choice. By default what the present default takes.
        out: a folder.
        write: make the choice the checkpoint's default.
        features: the network whose features are compared: a feature network's folder, a vision encoder's folder or Hub name, or
            the file of Inception's weights.
        seed: of the search and its images.
        precision: of the U-Net: float32 or bfloat16.
        batch_size: images made at a time.

    Returns:
        The table of trials, confirmed settings and the choice, with the protocol.

    Raises:
        UserError: an unknown sampler, a model or data that cannot be used, or a search with another protocol in `out`.
    """
    from latentdiff.evaluation.compare_samplers import SCHEDULER, SamplerBenchmark, check_samplers, open_table, write_table
    from latentdiff.utils.outputs import check_out_folder

    check_samplers(samplers or ())
    if num_images < 2 or batch_size < 1 or confirm_seeds < 2 or not 0 < budget < math.inf:
        raise UserError("tune: --num-images and --confirm-seeds must be at least 2, --batch-size at least 1, --budget above 0")
    _require_optuna()
    check_out_folder(out)
    bench, folder = SamplerBenchmark(model, data, num_images, features, precision, batch_size), Path(out)
    if write and not (bench.folder / INDEX).is_file():
        raise UserError(f"--write: {bench.folder} has no {INDEX} to write the choice to")
    default, scheduled = current_default(bench.pipeline), bench.pipeline.scheduler is not None
    if samplers is None:
        samplers = SAMPLERS if scheduled else SAMPLERS[1:]
    if SCHEDULER in samplers and not scheduled:
        raise UserError(f"--samplers {SCHEDULER}: {model} has none; it runs latentdiff's {default['sampler']}")
    space = SearchSpace(tuple(dict.fromkeys(samplers)), bench.pipeline.config.null_class is not None and bench.rows != [None])
    table = open_table(folder, TABLE, bench.protocol | {"seed": seed, "default": default, "samplers": list(space.samplers)})
    table["floor"] = bench.yardstick.floor

    def measure(setting: Setting, at: int) -> tuple[float, float, float | None]:
        call = {"num_inference_steps": setting["steps"], "guidance_scale": setting["guidance"]}
        # An interval of none is the checkpoint's own to the pipeline, so everywhere is said as what it is
        call["guidance_interval"] = tuple(setting["guidance_interval"] or (0.0, 1.0))
        cell = bench.measure(setting["sampler"], at, call)
        return cell["evaluations"], cell["frechet"], cell["label_accuracy"]

    def save() -> None:
        write_table(folder, TABLE, table, tuning_markdown(table))

    search(measure, space, default, budget, seed, table["cells"], save)
    most = table["cells"][0]["evaluations"] if max_evaluations is None else max_evaluations
    kept = [cell for cell in table["cells"] if (cell["sampler"] == SCHEDULER) == scheduled]
    table["confirmed"] = confirm(measure, kept, [seed + 1 + k for k in range(confirm_seeds)], most)
    table["chosen"] = {key: choose(table["confirmed"])[key] for key in SETTING_KEYS}
    save()
    plot_front(table, folder / f"{TABLE}.png")
    if write:
        write_default(bench.folder, table["chosen"])
    return table


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("tune: needs optuna; install it by pip install 'latentdiff[tune]'") from None


def current_default(pipeline: Any) -> Setting:
    """What a loaded checkpoint does where a call says nothing."""
    config = pipeline.config
    interval = config.default_guidance_interval
    return {
        "sampler": "scheduler" if pipeline.scheduler is not None else config.default_sampler,
        "steps": config.default_num_inference_steps,
        "guidance": config.default_guidance_scale,
        "guidance_interval": None if interval is None else list(interval),
    }


@dataclass
class SearchSpace:
    """What is searched. guided: whether the model has an unconditional prediction to guide away from."""

    samplers: Sequence[str]
    guided: bool

    def suggest(self, trial: Any) -> Setting:
        """A setting drawn by an optuna trial. Where nothing is guided there is no interval to draw."""
        setting: Setting = {
            "sampler": trial.suggest_categorical("sampler", list(self.samplers)),
            "steps": trial.suggest_int("steps", *STEPS, log=True),
            "guidance": 1.0,
            "guidance_interval": None,
        }
        if self.guided:
            setting["guidance"] = round(trial.suggest_float("guidance", *GUIDANCE), 2)
            low, high = trial.suggest_float("low", 0.0, 0.5), trial.suggest_float("high", 0.6, 1.0)
            setting["guidance_interval"] = [round(low, 2), round(high, 2)]
        return setting

    @functools.cached_property
    def distributions(self) -> dict[str, Any]:
        import optuna

        study = optuna.create_study()
        trial = study.ask()
        self.suggest(trial)
        return dict(trial.distributions)

    def parameters(self, setting: Setting) -> dict[str, Any] | None:
        """A setting as optuna's parameters; None where it lies outside of the space."""
        low, high = setting["guidance_interval"] or (0.0, 1.0)
        values = {"sampler": setting["sampler"], "steps": setting["steps"]}
        if self.guided:
            values |= {"guidance": setting["guidance"], "low": low, "high": high}
        inside = self.guided or setting["guidance"] == 1.0
        for name, distribution in self.distributions.items():
            value = values[name]
            choices = getattr(distribution, "choices", None)
            inside &= value in choices if choices else distribution.low <= value <= distribution.high
        return values if inside else None


def search(
    measure: Measure,
    space: SearchSpace,
    default: Setting,
    budget: float,
    seed: int,
    cells: list[Setting],
    save: Callable[[], None],
) -> None:
    """Trials until `budget` evaluations an image are spent, the default first; each is appended to cells, then save().

    Multi-objective TPE (optuna): fewer evaluations and a smaller distance. cells: those that are there count as told.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed + len(cells), n_startup_trials=12)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for cell in cells:
        _tell(study, space, cell)
    while (spent := sum(cell["evaluations"] for cell in cells)) < budget or not cells:
        setting, trial = default, None
        if cells:
            trial = study.ask()
            setting = space.suggest(trial)
        evaluations, distance, accuracy = measure(setting, seed)
        values = {"evaluations": evaluations, "frechet": distance, "label_accuracy": accuracy}
        cells.append({key: setting[key] for key in SETTING_KEYS} | values)
        if trial is None:
            _tell(study, space, cells[-1])
        else:
            study.tell(trial, [evaluations, distance])
        save()
        state = f"tune: {spent + evaluations:.0f} of {budget:.0f} evaluations an image: {json.dumps(cells[-1])}"
        print(printable(state), file=sys.stderr)


def _tell(study: Any, space: SearchSpace, cell: dict[str, Any]) -> None:
    import optuna

    parameters = space.parameters(cell)
    if parameters is not None:
        values = [cell["evaluations"], cell["frechet"]]
        told = optuna.trial.create_trial(params=parameters, distributions=space.distributions, values=values)
        study.add_trial(told)


def pareto_front(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that no other one matches or beats in both evaluations and distance, cheapest first."""
    kept: list[dict[str, Any]] = []
    best = math.inf
    for cell in sorted(cells, key=lambda c: (c["evaluations"], c["frechet"])):
        if cell["frechet"] < best:
            kept.append(cell)
            best = cell["frechet"]
    return kept


def confirm(measure: Measure, cells: Sequence[dict[str, Any]], seeds: Sequence[int], most: float) -> list[dict[str, Any]]:
    """The default (the first cell) and the best of these cells' front that cost at most `most`, on other seeds.

    spread: of single seeds, the standard deviation (n - 1). Best mean first, but the default stands first of all.
    """
    affordable = [cell for cell in pareto_front(cells) if cell["evaluations"] <= most and cell is not cells[0]]
    measured = []
    for cell in [cells[0], *sorted(affordable, key=lambda c: c["frechet"])[:FINALISTS]]:
        values = [measure(cell, seed)[1] for seed in seeds]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        entry = {key: cell[key] for key in (*SETTING_KEYS, "evaluations")} | {"frechet": values, "mean": mean, "spread": spread}
        measured.append(entry)
        print(f"tune: confirming {json.dumps(entry)}", file=sys.stderr)
    return [measured[0], *sorted(measured[1:], key=lambda m: m["mean"])]


def choose(confirmed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best challenger that is better than the default by twice the error of that difference, else the default.

    The seeds are the same for both, so the differences are taken seed by seed. One that costs less than four fifths may be
    worse by a fiftieth of the default's distance.
    """
    default = confirmed[0]
    for challenger in confirmed[1:]:
        gains = [a - b for a, b in zip(default["frechet"], challenger["frechet"], strict=True)]
        mean = sum(gains) / len(gains)
        error = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains))
        cheaper = challenger["evaluations"] < 0.8 * default["evaluations"]
        if mean > 2 * error or (cheaper and mean > -0.02 * default["mean"]):
            return challenger
    return default


def write_default(folder: Path, setting: Setting) -> None:
    """Make a setting, of a sampler that it can hold, the default of the checkpoint in `folder`.

    The file is the old or the new one, never half of it.
    """
    from latentdiff.models.loading import read_json
    from latentdiff.utils.atomic import write_text

    path = folder / INDEX
    index = read_json(path)
    scheduler = setting["sampler"] == "scheduler"
    index |= {
        "default_sampler": None if scheduler else setting["sampler"],
        "default_num_inference_steps": setting["steps"],
        "default_guidance_scale": setting["guidance"],
        "default_guidance_interval": setting["guidance_interval"],
    }
    write_text(path, json.dumps(dict(sorted(index.items())), indent=2) + "\n")


def tuning_markdown(table: dict[str, Any]) -> str:
    """The front, the confirmation and the choice as tables, with the protocol below."""
    head = "| sampler | steps | guidance | at t | evaluations | {} |"
    rule = "|---|---|---|---|---|---|"
    lines = [head.format("Fréchet distance"), rule]
    lines += [f"| {_said(cell)} | {cell['frechet']:.4f} |" for cell in pareto_front(table["cells"])]
    lines += ["", f"The front of {len(table['cells'])} trials; real test images score {table['floor']:.4f}."]
    if table.get("confirmed"):
        lines += ["", head.format("on other seeds"), rule]
        lines += [f"| {_said(cell)} | {cell['mean']:.4f} ± {cell['spread']:.4f} |" for cell in table["confirmed"]]
        same = table["chosen"] == {key: table["confirmed"][0][key] for key in SETTING_KEYS}
        lines += ["", "The default (first row) stays." if same else f"Chosen: {json.dumps(table['chosen'])}."]
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in table["protocol"].items())]) + "\n"


def _said(cell: dict[str, Any]) -> str:
    interval = cell["guidance_interval"]
    where = "everywhere" if interval is None else f"{interval[0]:g} to {interval[1]:g}"
    return f"{cell['sampler']} | {cell['steps']} | {cell['guidance']:g} | {where} | {cell['evaluations']:.0f}"


def plot_front(table: dict[str, Any], path: Path) -> None:
    """Distance over evaluations, both on logarithmic axes: trials grey, the front blue, the default red, the floor a line."""
    from PIL import Image, ImageDraw

    width, height, edge = 720, 480, 60
    cells, best = table["cells"], pareto_front(table["cells"])
    across = [math.log(cell["evaluations"]) for cell in cells]
    values = [cell["frechet"] for cell in cells] + [table["floor"]]
    up = [math.log(max(value, 1e-6)) for value in values]
    spans = [(min(axis), max(max(axis) - min(axis), 1e-6)) for axis in (across, up)]

    def place(evaluations: float, distance: float) -> tuple[float, float]:
        x = (math.log(evaluations) - spans[0][0]) / spans[0][1]
        y = (math.log(max(distance, 1e-6)) - spans[1][0]) / spans[1][1]
        return edge + x * (width - 2 * edge), height - edge - y * (height - 2 * edge)

    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((edge, edge, width - edge, height - edge), outline="black")
    floor = place(cells[0]["evaluations"], table["floor"])[1]
    pen.line((edge, floor, width - edge, floor), fill="green")
    pen.text((edge + 4, floor - 14), f"real images {table['floor']:.3f}", fill="green")
    pen.line([place(c["evaluations"], c["frechet"]) for c in best], fill="blue")
    for cell in cells:
        x, y = place(cell["evaluations"], cell["frechet"])
        colour = "red" if cell is cells[0] else "blue" if cell in best else "grey"
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    for cell in best:
        x, y = place(cell["evaluations"], cell["frechet"])
        pen.text((x + 5, y - 12), f"{cell['sampler']} {cell['steps']}: {cell['frechet']:.3f}", fill="blue")
    least, most = min(cells, key=lambda c: c["evaluations"]), max(cells, key=lambda c: c["evaluations"])
    pen.text((edge, height - edge + 8), f"{least['evaluations']:.0f}", fill="black")
    pen.text((width - edge - 20, height - edge + 8), f"{most['evaluations']:.0f}", fill="black")
    pen.text((width // 2 - 80, height - edge + 24), "U-Net evaluations an image", fill="black")
    pen.text((edge, edge - 20), "Frechet distance (red: the default)", fill="black")
    with atomic.new_file(path) as temporary:
        image.save(temporary, format="PNG")
