"""`latentdiff tune`: search a checkpoint's sampler, steps, guidance and guidance interval, and confirm the choice.

Distances vary with the seed, so the best of many trials is partly the luckiest. So what a search finds is measured again,
beside the checkpoint's present default, with seeds that the search has not used. It is chosen only if it is better there too.
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
from latentdiff.evaluation.compare_samplers import (
    SCHEDULER,
    EvaluationCounter,
    SamplerBenchmark,
    check_samplers,
    open_table,
    write_table,
)
from latentdiff.evaluation.tables import markdown_table

TABLE, INDEX = "tuning", "model_index.json"
SAMPLERS = (SCHEDULER, "dpmpp_2m", "dpmpp_3m", "heun", "euler", "euler_maruyama")
STEPS = (3, 32)
GUIDANCE = (1.0, 3.0)
FINALISTS = 3
SETTING_KEYS = ("sampler", "steps", "guidance", "guidance_interval")
KIND = "guidance_kind"  # a fifth key, where more than plain guidance is searched or the default
OWN_KIND = "checkpoint"  # of a default whose rule of guidance is none of `KINDS`
PIPELINE = "pipeline.py"
# The arguments of the pipeline's call of each kind; "autoguidance" has the weaker U-Net besides
KINDS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "rescale": {"guidance_rescale": 0.7},  # the value of Lin et al., arXiv 2305.08891
    "apg": {"guidance_rule": "apg"},
    "cfg_zero": {"guidance_rule": "cfg_zero"},
    "autoguidance": {},
}

Setting = dict[str, Any]
# measure(setting, seed) -> (U-Net evaluations per image, Fréchet distance, label accuracy or None)
Measure = Callable[[Setting, int], tuple[float, float, float | None]]


def tune(
    model: str | Path,
    data: str,
    budget: float = 400.0,
    num_images: int = 1000,
    samplers: Sequence[str] | None = None,
    guidance_kinds: Sequence[str] = ("cfg",),
    confirm_seeds: int = 3,
    max_evaluations: float | None = None,
    out: str | Path = "tuning",
    write: bool = False,
    features: str | Path | None = None,
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
        budget: U-Net evaluations for an image, summed over the trials of the search; a guided step takes two.
        num_images: images of a trial, the same number of each class.
        samplers: the samplers to search; "scheduler" is the checkpoint's own. By default scheduler (where there is one),
            dpmpp_2m, dpmpp_3m, heun, euler and euler_maruyama.
        guidance_kinds: the kinds of guidance to search: cfg; rescale, by 0.7; apg; cfg_zero; autoguidance, for a model with a
            folder weak. Autoguidance cannot become a default.
        confirm_seeds: how many other seeds measure the finalists and the default again; two or more.
        max_evaluations: most U-Net evaluations for an image of the choice. By default what the present default takes.
        out: a folder.
        write: make the choice the checkpoint's default.
        features: the network whose features are compared: a feature network's folder, a vision encoder's folder or Hub name, or
            the file of Inception's weights. By default one that ships, for colour or for grey.
        seed: of the search and its images.
        precision: of the U-Net: float32 or bfloat16.
        batch_size: images made at a time.

    Returns:
        The table of trials, confirmed settings and the choice, with the protocol.

    Raises:
        UserError: an unknown sampler, a model or data that cannot be used, or a search with another protocol in `out`.
    """
    from latentdiff.utils.outputs import check_out_folder

    check_samplers(samplers or ())
    for kind in guidance_kinds:
        if kind not in KINDS:
            raise UserError(f"--guidance-kinds {kind}: unknown; valid: {', '.join(KINDS)}")
    if write and "autoguidance" in guidance_kinds:
        raise UserError("--write: autoguidance cannot become the default; leave it out of --guidance-kinds, or --write out")
    if num_images < 2 or batch_size < 1 or confirm_seeds < 2 or not 0 < budget < math.inf:
        raise UserError("tune: --num-images and --confirm-seeds must be at least 2, --batch-size at least 1, --budget above 0")
    from latentdiff.guidance.rules import default_call

    _require("optuna", "matplotlib")
    check_out_folder(out)
    benchmark, folder = SamplerBenchmark(model, data, num_images, features, precision, batch_size), Path(out)
    if write and not (benchmark.folder / INDEX).is_file():
        raise UserError(f"--write: {benchmark.folder} has no {INDEX} to write the choice to")
    pipeline = benchmark.pipeline
    default, has_scheduler = current_default(pipeline), pipeline.scheduler is not None
    if samplers is None:
        samplers = SAMPLERS if has_scheduler else SAMPLERS[1:]
    if SCHEDULER in samplers and not has_scheduler:
        raise UserError(f"--samplers {SCHEDULER}: {model} has none; it runs latentdiff's {default['sampler']}")
    guided = pipeline.config.null_class is not None and benchmark.rows != [None]
    kinds = tuple(dict.fromkeys(guidance_kinds))
    if not (guided or set(kinds) <= {"autoguidance"} or kinds == ("cfg",)):
        raise UserError(f"--guidance-kinds: {model} has no unconditional prediction; valid: autoguidance")
    own, weak, weak_counter = default_call(pipeline.config), None, None
    if "autoguidance" in kinds:
        from latentdiff.checkpoints import load_weak

        weak = load_weak(benchmark.folder, pipeline)
        weak_counter = EvaluationCounter(weak)
    space = SearchSpace(tuple(dict.fromkeys(samplers)), guided or "autoguidance" in kinds, kinds)
    protocol = benchmark.protocol | {"seed": seed, "default": default, "samplers": list(space.samplers)}
    if kinds != ("cfg",):
        protocol[KIND] = list(kinds)
    if default.get(KIND) == OWN_KIND:
        protocol["default_guidance"] = own
    table = open_table(folder, TABLE, protocol)
    table["floor"] = benchmark.reference.floor

    def measure(setting: Setting, measure_seed: int) -> tuple[float, float, float | None]:
        call = call_of(setting, own)
        if setting.get(KIND) == "autoguidance":
            call["weak_unet"] = weak
        before = weak_counter.rows if weak_counter else 0
        cell = benchmark.measure(setting["sampler"], measure_seed, call)
        if weak_counter:
            cell["evaluations"] += (weak_counter.rows - before) / num_images
        return cell["evaluations"], cell["frechet"], cell["label_accuracy"]

    def save() -> None:
        write_table(folder, TABLE, table, tuning_markdown(table))

    search(measure, space, default, budget, seed, table["cells"], save)
    most = table["cells"][0]["evaluations"] if max_evaluations is None else max_evaluations
    holdable = [cell for cell in table["cells"] if (cell["sampler"] == SCHEDULER) == has_scheduler]
    table["confirmed"] = confirm(measure, holdable, [seed + 1 + k for k in range(confirm_seeds)], most)
    table["chosen"] = setting_of(choose(table["confirmed"]))
    save()
    plot_front(table, folder / f"{TABLE}.png")
    if write:
        write_default(benchmark.folder, table["chosen"])
    return table


def call_of(setting: Setting, own: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call of a setting, but for its sampler and a weaker U-Net.

    own: the checkpoint's own rule of guidance, as of `latentdiff.guidance.rules.default_call`.
    """
    kind = setting.get(KIND, "cfg")
    return {
        "num_inference_steps": setting["steps"],
        "guidance_scale": setting["guidance"],
        # To the pipeline None is the checkpoint's own, so "everywhere" is given as (0, 1), and plain guidance by its name
        "guidance_interval": tuple(setting["guidance_interval"] or (0.0, 1.0)),
        "guidance_rule": "cfg",
        "guidance_rescale": 0.0,
        **(own if kind == OWN_KIND else KINDS[kind]),
    }


def setting_of(cell: dict[str, Any]) -> Setting:
    """The setting of a trial or a confirmed setting: what it was measured with."""
    return {key: cell[key] for key in (*SETTING_KEYS, KIND) if key in cell}


def _require(*packages: str) -> None:
    """UserError where a package of the extra `tune` is not installed."""
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"tune: needs {package}; install it by pip install 'latentdiff[tune]'") from None


def current_default(pipeline: Any) -> Setting:
    """The setting that a loaded checkpoint samples with by default."""
    from latentdiff.guidance.rules import default_call

    config = pipeline.config
    interval, own = config.default_guidance_interval, default_call(config)
    kinds = [kind for kind, arguments in KINDS.items() if arguments == own and kind != "autoguidance"]
    return {
        "sampler": SCHEDULER if pipeline.scheduler is not None else config.default_sampler,
        "steps": config.default_num_inference_steps,
        "guidance": config.default_guidance_scale,
        "guidance_interval": None if interval is None else list(interval),
        **({KIND: kinds[0] if kinds else OWN_KIND} if own else {}),
    }


@dataclass
class SearchSpace:
    """The settings that are searched.

    Attributes:
        samplers: names of samplers.
        guided: whether guidance is searched: the model has an unconditional prediction, or a weaker U-Net.
        kinds: of guidance.
    """

    samplers: Sequence[str]
    guided: bool
    kinds: Sequence[str] = ("cfg",)

    def suggest(self, trial: Any) -> Setting:
        """The setting that an optuna trial draws."""
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
        if len(self.kinds) > 1:
            setting[KIND] = trial.suggest_categorical(KIND, list(self.kinds))
        elif self.kinds[0] != "cfg":
            setting[KIND] = self.kinds[0]
        return setting

    @functools.cached_property
    def distributions(self) -> dict[str, Any]:
        """optuna's distributions of the parameters."""
        import optuna

        trial = optuna.create_study().ask()
        self.suggest(trial)
        return dict(trial.distributions)

    def parameters(self, setting: Setting) -> dict[str, Any] | None:
        """A setting as optuna's parameters; None where it is outside the space."""
        low, high = setting["guidance_interval"] or (0.0, 1.0)
        values = {"sampler": setting["sampler"], "steps": setting["steps"]}
        if self.guided:
            values |= {"guidance": setting["guidance"], "low": low, "high": high}
        elif setting["guidance"] != 1.0:
            return None
        kind = setting.get(KIND, "cfg")
        if kind not in self.kinds:
            return None
        values |= {KIND: kind} if len(self.kinds) > 1 else {}
        for name, distribution in self.distributions.items():
            choices = getattr(distribution, "choices", None)
            inside = values[name] in choices if choices else distribution.low <= values[name] <= distribution.high
            if not inside:
                return None
        return values


def search(
    measure: Measure,
    space: SearchSpace,
    default: Setting,
    budget: float,
    seed: int,
    cells: list[Setting],
    save: Callable[[], None],
) -> None:
    """Run trials until `budget` evaluations per image are spent, the default first.

    optuna's multi-objective TPE looks for few evaluations and a small distance.

    Args:
        measure: measures a setting.
        space: the settings to search.
        default: the first trial.
        budget: U-Net evaluations per image in all.
        seed: of the search and of all images.
        cells: the trials; those that are in it count, each new one is appended.
        save: called after each trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed + len(cells), n_startup_trials=12)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for cell in cells:
        _add_trial(study, space, cell)
    while (spent := sum(cell["evaluations"] for cell in cells)) < budget or not cells:
        setting, trial = default, None
        if cells:
            trial = study.ask()
            setting = space.suggest(trial)
        evaluations, distance, accuracy = measure(setting, seed)
        values = {"evaluations": evaluations, "frechet": distance, "label_accuracy": accuracy}
        cells.append(setting_of(setting) | values)
        if trial is None:
            _add_trial(study, space, cells[-1])
        else:
            study.tell(trial, [evaluations, distance])
        save()
        state = f"tune: {spent + evaluations:.0f} of {budget:.0f} evaluations an image: {json.dumps(cells[-1])}"
        print(printable(state), file=sys.stderr)


def _add_trial(study: Any, space: SearchSpace, cell: dict[str, Any]) -> None:
    """Add a finished trial to a study, where its setting is inside the space."""
    import optuna

    parameters = space.parameters(cell)
    if parameters is not None:
        values = [cell["evaluations"], cell["frechet"]]
        trial = optuna.trial.create_trial(params=parameters, distributions=space.distributions, values=values)
        study.add_trial(trial)


def pareto_front(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that no other cell equals or beats in both evaluations and distance, cheapest first."""
    front: list[dict[str, Any]] = []
    best = math.inf
    for cell in sorted(cells, key=lambda c: (c["evaluations"], c["frechet"])):
        if cell["frechet"] < best:
            front.append(cell)
            best = cell["frechet"]
    return front


def confirm(measure: Measure, cells: Sequence[dict[str, Any]], seeds: Sequence[int], most: float) -> list[dict[str, Any]]:
    """Measure the default and the best of the Pareto front again, with other seeds.

    Args:
        measure: measures a setting.
        cells: trials; the first one is the default.
        seeds: the other seeds.
        most: evaluations per image that a finalist may cost.

    Returns:
        The default, then FINALISTS cells at most, the best mean first. frechet has the distance for each seed; mean; spread,
        their standard deviation (n - 1).
    """
    affordable = [cell for cell in pareto_front(cells) if cell["evaluations"] <= most and cell is not cells[0]]
    measured = []
    for cell in [cells[0], *sorted(affordable, key=lambda c: c["frechet"])[:FINALISTS]]:
        values = [measure(cell, seed)[1] for seed in seeds]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        entry = setting_of(cell) | {"evaluations": cell["evaluations"], "frechet": values, "mean": mean, "spread": spread}
        measured.append(entry)
        print(f"tune: confirming {json.dumps(entry)}", file=sys.stderr)
    return [measured[0], *sorted(measured[1:], key=lambda m: m["mean"])]


def choose(confirmed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best finalist that is better than the default by twice the standard error of the difference; else the default.

    Both were measured with the same seeds, so differences are taken seed by seed. A finalist that costs less than four fifths
    may be worse by a fiftieth of the default's distance.
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
    """Make a setting the default of the checkpoint in `folder`. Its index file is the old or the new one, never half of it."""
    from latentdiff.guidance.rules import CALL_ARGUMENTS
    from latentdiff.utils.atomic import write_text
    from latentdiff.utils.json_files import read_json

    path, kind = folder / INDEX, setting.get(KIND, "cfg")
    index = read_json(path)
    if kind != OWN_KIND:
        rule = {f"default_{name}": KINDS[kind].get(name) for name in CALL_ARGUMENTS}
        index = {key: value for key, value in index.items() if key not in rule}
        index |= {key: value for key, value in rule.items() if value is not None}
        if KINDS[kind]:
            _renew_pipeline(folder / PIPELINE)
    index |= {
        "default_sampler": None if setting["sampler"] == SCHEDULER else setting["sampler"],
        "default_num_inference_steps": setting["steps"],
        "default_guidance_scale": setting["guidance"],
        "default_guidance_interval": setting["guidance_interval"],
    }
    write_text(path, json.dumps(dict(sorted(index.items())), indent=2) + "\n")


def _renew_pipeline(path: Path) -> None:
    """Replace a checkpoint's pipeline.py by the installed one, where it cannot read a default rule of guidance."""
    from latentdiff.pipelines import latent_diffusion
    from latentdiff.utils.atomic import write_text

    if path.is_file() and "default_guidance_rule" not in path.read_text(encoding="utf-8"):
        write_text(path, Path(latent_diffusion.__file__).read_text(encoding="utf-8"))
        print(f"tune: {printable(str(path))} could not read the default rule of guidance, and is replaced", file=sys.stderr)


def tuning_markdown(table: dict[str, Any]) -> str:
    """The result of `tune` as Markdown: the Pareto front, the confirmation, the choice, the protocol."""
    header = ("sampler", "steps", "guidance", "at t", "evaluations")
    rows = [(*_setting_cells(cell), f"{cell['frechet']:.4f}") for cell in pareto_front(table["cells"])]
    lines = markdown_table((*header, "Fréchet distance"), rows)
    lines += ["", f"The front of {len(table['cells'])} trials; real test images score {table['floor']:.4f}."]
    if table.get("confirmed"):
        rows = [(*_setting_cells(cell), f"{cell['mean']:.4f} ± {cell['spread']:.4f}") for cell in table["confirmed"]]
        lines += ["", *markdown_table((*header, "on other seeds"), rows)]
        same = table["chosen"] == setting_of(table["confirmed"][0])
        lines += ["", "The default (first row) stays." if same else f"Chosen: {json.dumps(table['chosen'])}."]
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in table["protocol"].items())]) + "\n"


def _setting_cells(cell: dict[str, Any]) -> tuple[str, ...]:
    interval = cell["guidance_interval"]
    where = "everywhere" if interval is None else f"{interval[0]:g} to {interval[1]:g}"
    kind = f" {cell[KIND]}" if KIND in cell else ""
    return cell["sampler"], str(cell["steps"]), f"{cell['guidance']:g}{kind}", where, f"{cell['evaluations']:.0f}"


def plot_front(table: dict[str, Any], path: Path) -> None:
    """Write a PNG of the Fréchet distance against the U-Net's evaluations for an image, on logarithmic axes.

    Trials are grey, the Pareto front is blue, the default is red. A green line is the distance of real images.

    table: what `tune` returns. path: of the PNG.
    """
    from matplotlib.figure import Figure

    from latentdiff.utils import atomic

    cells, front = table["cells"], pareto_front(table["cells"])

    def points(chosen: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
        return [cell["evaluations"] for cell in chosen], [max(cell["frechet"], 1e-6) for cell in chosen]

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(max(table["floor"], 1e-6), color="green", label=f"real images {table['floor']:.3f}")
    axes.plot(*points(cells), "o", color="grey", label="trials")
    axes.plot(*points(front), "o-", color="blue", label="Pareto front")
    axes.plot(*points(cells[:1]), "o", color="red", label="the default")
    for cell, x, y in zip(front, *points(front), strict=True):
        axes.annotate(f"{cell['sampler']} {cell['steps']}: {cell['frechet']:.3f}", (x, y), (5, 6), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="U-Net evaluations per image", ylabel="Fréchet distance")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend()
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
