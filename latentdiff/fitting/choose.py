"""Which state of stage 2 is kept: the one whose generated pictures are nearest to the data, and are no copies of it.

Candidates are the run's snapshots and its newest state, with averaged weights. From each the same pictures are generated:
same classes or captions, same noise. They are measured in the space of a feature network:

- The Fréchet distance to the training pictures (arXiv 1706.08500). It depends on the number of pictures, and all candidates
  have the same number, so it ranks them also where they are few. The kernel distance (KID) has no such bias, but with a
  small network's features it hardly sees how varied the pictures are.
- Label accuracy, by a linear probe on the training pictures.
- The share of pictures that are closer to a training picture than 1 % of held-out pictures are. A candidate above
  `memorisation_limit` is taken only where all are.

Then the time that is left goes to other guidance scales of the state that is kept.

The held-out loss stands beside them. It is lowest long before a small model draws well, so it decides nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from latentdiff.errors import NotFiniteError, UserError, printable
from latentdiff.utils import atomic, locks, progress_bars, signals

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.config import DiffusionConfig, DiscreteConfig
    from latentdiff.data.datasets import ImageDataset
    from latentdiff.evaluation.linear_probe import LinearProbe
    from latentdiff.models.feature_net import FeatureSpace
    from latentdiff.training.train_diffusion import DiffusionTrainer

K = TypeVar("K", bound=float)  # what names a candidate: the step of a state, or a guidance scale

FILE = "choice.json"
MOST_CANDIDATES = 8
LIKE_THE_LAST = 0.05  # of the last state's steps, by which others must be earlier
MOST_IMAGES = 1000  # of a candidate: more would not change the order
FEWEST_IMAGES = 32  # of a candidate, below which fewer candidates are compared
BATCH = 64  # pictures that are generated at a time, at most
FIRST = 4  # pictures of the first batch, which warms up
ROUNDS = 6  # at least so many rounds of pictures are planned, so that a slow machine ends in time
REFERENCE_SHARE = 0.2  # of the time, for features of real pictures
SAVING_SHARE = 0.1  # of the time, kept for publishing
GUIDANCE_SHARE = 0.4  # of the time for pictures, for other guidance scales of the state that is kept
GUIDANCE_STEP = 1.5  # the factor between scales
STRONGEST = 4.0  # scale that is tried: beyond it pictures of a model that is not done lose what little they show
ENOUGH = 0.8  # of real pictures' label accuracy, which guidance should reach
FOLDS = 10  # of the jackknife that says how much of a difference is noise
PERCENT = 1  # of held-out pictures that are closer to the training pictures than a copy's distance
LIMIT = 5.0  # times the share that real pictures would have
FEWEST_HELD_OUT = 10  # below, nothing says how close real pictures come


@dataclass
class Choice:
    """Which state is kept, and why; all values are JSON.

    Attributes:
        step: of the state.
        why: in words.
        candidates: of each candidate its step; distance (Fréchet), label_accuracy and closer_to_training, where they were
            measured; and held_out_loss, of the nearest step.
        real: the same values of held-out pictures, with their number as "images"; {} where there are too few.
        images: pictures that were measured of each candidate; 0 where none were.
        generated: pictures in all.
        reference_images: training pictures that they were compared with.
        features: name of the feature network; None where nothing was measured.
        memorisation_limit: the largest closer_to_training that is allowed; None where there are too few held-out pictures.
        guidance: {"scale": what became the default, "images", "scales": values at each scale}; {} where only one was tried.
        seconds: what it took.
    """

    step: int
    why: str
    candidates: list[dict[str, Any]] = field(default_factory=list)
    real: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    reference_images: int = 0
    features: str | None = None
    memorisation_limit: float | None = None
    generated: int = 0
    guidance: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return asdict(self)


def choose_state(
    config: DiffusionConfig | DiscreteConfig,
    seconds: float,
    out: str | Path,
    features: str | Path | None = None,
    most_candidates: int = MOST_CANDIDATES,
    guidance: bool = True,
) -> Choice:
    """Publish the best state of a stage-2 run, with the best of some guidance scales as its default.

    Also written: choice.json in the run's folder.

    Args:
        config: of the run, whose output folder holds its states and snapshots.
        seconds: what all of it may take. Fewer pictures and fewer candidates are compared where there is less.
        out: the folder of the checkpoint: a new one, or one that this run has published.
        features: a feature network, as of `evaluate`; None: the one that ships for so many channels.
        most_candidates: compare at most so many states.
        guidance: try other guidance scales than the config's.

    Returns:
        The choice.

    Raises:
        UserError: the run has no state that can be read, its data have changed, or `out` holds something else.
    """
    from latentdiff.training import publish, state
    from latentdiff.training.accelerator import torch_settings_restored
    from latentdiff.training.run_folder import recorded_config

    began = time.monotonic()
    output, folder = Path(config.output), Path(out)
    recorded: Any = recorded_config(output, type(config))
    publish.check_out(folder, recorded)
    held = locks.locked(folder, "wait for it, or give another folder", beside=True)
    with torch_settings_restored(), signals.watched(signals.again), held:
        folders = whole_states(output, most_candidates)
        trainer = publish.open_diffusion(recorded)
        saving = max(SAVING_SHARE * seconds, 1.0)
        try:
            choice = _compare(trainer, folders, began + seconds - saving, features, guidance)
        except (UserError, ValueError) as error:
            step = max(folders)
            choice = Choice(step, f"The newest state, of step {step}, is kept: nothing was compared ({_line(error)}).")
        tensors, meta = state.load_folder(folders[choice.step], only="ema")
        publish.load_averages(trainer, tensors, meta)
        trainer.publish(folder, choice.step)
    choice.seconds = round(time.monotonic() - began, 1)
    atomic.write_json(output / FILE, choice.as_json())
    progress_bars.print_line(printable(choice.why))
    return choice


def whole_states(output: Path, most: int) -> dict[int, Path]:
    """{step: folder} of a run's snapshots and newest state that are whole, evenly spread where there are more than `most`.

    Those shortly before the last one are left out. UserError where there is none.
    """
    from latentdiff.training import publish, state

    folders = [*state.state_folders(output), *state.step_folders(output, "snapshots")]
    newest = max((folder for folder in state.state_folders(output) if state.damage(folder) is None), key=_step, default=None)
    kept = [folder for folder in folders if folder == newest or folder.parent.name == "snapshots"]
    whole = {_step(folder): folder for folder in kept if state.damage(folder) is None}
    if not whole:
        folder = publish.state_to_publish(output, None, best=False)  # says what is wrong
        whole = {_step(folder): folder}
    last = max(whole)
    apart = [step for step in sorted(whole) if step == last or step < (1 - LIKE_THE_LAST) * last]
    return {step: whole[step] for step in thinned(apart, most)}


def _step(folder: Path) -> int:
    """The step of the folder of a state or a snapshot."""
    return int(folder.name.removeprefix("step-"))


def thinned(candidates: Sequence[K], most: int) -> list[K]:
    """At most so many of the candidates: the last one, and others evenly spread before it."""
    if len(candidates) <= most:
        return list(candidates)
    places = {round((k + 1) * len(candidates) / most) - 1 for k in range(most)}
    return [candidates[place] for place in sorted(places)]


# What is measured


class Space(NamedTuple):
    """Real pictures in the space of a feature network.

    Attributes:
        net: the network.
        reference: features of training pictures, [N, D].
        mirrored: of the same pictures mirrored, where training mirrors them; else [0, D].
        distance: the Fréchet distance of features [n, D] to the reference.
        probe: tells the classes; None without classes.
        real: values of held-out pictures, see `Choice.real`.
        limit: see `Choice.memorisation_limit`.
        near: the distance to a training picture below which a picture counts as a copy; None without a limit.
    """

    net: FeatureSpace
    reference: Tensor
    mirrored: Tensor
    distance: Callable[[Tensor], float]
    probe: LinearProbe | None
    real: dict[str, Any]
    limit: float | None
    near: float | None

    def closest(self, features: Tensor) -> Tensor:
        """The distance of features [n, D] to the nearest training picture, float64 [n]."""
        import torch

        from latentdiff.evaluation.memorization import nearest_by_features

        return nearest_by_features(features, torch.cat([self.reference, self.mirrored])).distances

    def copies(self, features: Tensor) -> float | None:
        """The share of pictures that count as copies; None without a limit."""
        return None if self.near is None else (self.closest(features) < self.near).double().mean().item()


def open_space(trainer: DiffusionTrainer, features: str | Path | None, until: float) -> Space:
    """Measure the real pictures. until: when to stop reading them (of time.monotonic), with the pictures read so far."""
    import torch

    from latentdiff.evaluation import default_features
    from latentdiff.evaluation.feature_spaces import open_features
    from latentdiff.evaluation.frechet import Moments, frechet_distance_to
    from latentdiff.evaluation.linear_probe import fit_probe

    images, device = trainer.latents.images, trainer.accelerator.device
    net = open_features(default_features(trainer.config.data.channels) if features is None else features).to(device)
    train = images.train
    held_out = None if images.nothing_held_out else images.held_out
    began = time.monotonic()
    apart, apart_rows = _features(net, held_out, began + (until - began) / 4) if held_out else (torch.empty(0, net.dim), [])
    reference, rows = _features(net, train, until if not trainer.config.data.flips else (until + time.monotonic()) / 2)
    mirrored = reference[:0]
    if trainer.config.data.flips:
        mirrored = _features(net, train, math.inf, rows, flips=True)[0]
    if len(reference) < 2:
        raise UserError(f"{len(reference)} training picture, and a distance needs two")

    def moments(rows: Tensor) -> Moments:
        return Moments(net.dim).update(rows)

    to_reference = frechet_distance_to(moments(reference))
    probe = None
    if trainer.conditions.classes is not None and train.labels is not None:
        probe = fit_probe(reference, train.labels[rows], len(train.class_names))
    space = Space(net, reference, mirrored, lambda rows: to_reference(moments(rows)), probe, {}, None, None)

    # The same values of held-out pictures
    count = len(apart)
    real: dict[str, Any] = {"images": count} if count else {}
    if count >= 2:
        real["distance"] = space.distance(apart)
    labels = held_out.labels if held_out is not None and held_out.class_names == train.class_names else None
    if count and probe is not None and labels is not None:
        real["label_accuracy"] = probe.accuracy_for(apart, labels[apart_rows], torch.arange(len(train.class_names)))[0]
    if count < FEWEST_HELD_OUT:
        return space._replace(real=real)
    distances = space.closest(apart)
    near = distances.quantile(PERCENT / 100).item()
    real["closer_to_training"] = (distances < near).double().mean().item()
    return space._replace(real=real, limit=memorisation_limit(count), near=near)


def memorisation_limit(held_out: int) -> float:
    """The largest share of pictures that may be closer to a training picture than 1 % of held-out ones are.

    Pictures that are no copies have a share of 1 %, or of 1 / (n + 1) where the 1 % of n held-out pictures is hardly one of
    them. The limit is LIMIT times that, for samples are smoother than photographs, and smooth pictures are all close.
    """
    return LIMIT * max(PERCENT / 100, 1 / (held_out + 1))


def _features(
    net: FeatureSpace, dataset: ImageDataset, until: float, rows: list[int] | None = None, flips: bool = False
) -> tuple[Tensor, list[int]]:
    """(features [n, D], which images they are of) of a data set's images, without padding, in a fixed random order.

    until: no batch is begun after that time, but the first. rows: these images. flips: mirrored.
    """
    import torch

    from latentdiff.data.shuffling import permutation
    from latentdiff.evaluation.sample_sets import without_padding
    from latentdiff.models.feature_net import extract

    plain, parts = without_padding(dataset), []
    order = permutation(len(plain), 0, "choose").tolist() if rows is None else rows
    for start in range(0, len(order), BATCH):
        if start and time.monotonic() > until:
            order = order[:start]
            break
        parts.append(extract(net, plain.batch(order[start : start + BATCH], flips=flips)[0])[0].float())
    features = torch.cat(parts) if parts else torch.empty(0, net.dim)
    if not bool(features.isfinite().all()):
        raise NotFiniteError(f"feature network {net.name}: its features are not finite")
    return features, order


class Wanted(NamedTuple):
    """What the pictures are to show: subjects, as of `generate_batches`, and the class of each, None without classes."""

    subjects: list[Any]
    labels: list[int] | None


def wanted(trainer: DiffusionTrainer, count: int) -> Wanted:
    """What `count` pictures show, so that any first part of them is a fair draw: classes in turn, or held-out captions."""
    from latentdiff.data.shuffling import permutation
    from latentdiff.evaluation.sample_sets import draw_prompts

    images, conditions = trainer.latents.images, trainer.conditions
    if conditions.text:
        part, dataset = ("train", images.train) if images.nothing_held_out else ("test", images.held_out)
        if not any(any(texts) for texts in dataset.captions() or []):
            part, dataset = "train", images.train
        drawn = draw_prompts(dataset, count, part, trainer.config.data.source)
        order = permutation(count, 0, "choose captions").tolist()
        labels = drawn.labels[order].tolist() if conditions.classes is not None and drawn.labels is not None else None
        return Wanted([drawn.texts[k] for k in order], labels)
    if conditions.classes is None:
        return Wanted([None] * count, None)
    classes = permutation(len(images.class_names), 0, "choose classes").tolist()
    rows = [classes[k % len(classes)] for k in range(count)]
    return Wanted(rows, rows)


def draw(trainer: DiffusionTrainer, what: Wanted, part: slice) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1], in 8 bits, of the weights in `ema_model`; always the same noise for the same part."""
    import torch

    from latentdiff.generation import generate_batches
    from latentdiff.training.monitor import sampling_pipeline
    from latentdiff.utils.random import derive_seed

    config = trainer.config
    pipeline = sampling_pipeline(config, trainer.pipeline_parts(), refuse_non_finite=True)
    with trainer.accelerator.autocast():
        batches = generate_batches(
            pipeline,
            what.subjects,
            1,
            derive_seed(config.seed, "choose"),
            BATCH,
            label=what.labels if trainer.conditions.text else None,
            part=part,
            guidance_interval=config.sample.guidance_interval,
            num_inference_steps=config.sample.steps,
        )
        pictures = [torch.from_numpy(images) for images, _ in batches]
    return torch.cat(pictures).permute(0, 3, 1, 2) / 127.5 - 1


class Contest(Generic[K]):
    """Generates pictures of several candidates in rounds, the same for each, until the time is over.

    Args:
        candidates: their keys, in order; the last one is drawn first.
        prepare: prepare(key) puts a candidate into the trainer's `ema_model` and config.
        trainer: the run.
        space: the real pictures.
        until: when it is to end, of time.monotonic.

    Attributes:
        candidates: those that there was time for.
        done: pictures of each.
        drawn: pictures of all.
    """

    def __init__(
        self, candidates: Sequence[K], prepare: Callable[[K], None], trainer: DiffusionTrainer, space: Space, until: float
    ):
        import torch

        self.candidates, self.prepare, self.trainer, self.space, self.until = list(candidates), prepare, trainer, space, until
        self.what = wanted(trainer, MOST_IMAGES)
        self.most, self.done, self.drawn = MOST_IMAGES, 0, 0
        self.pace = 0.0  # seconds that a picture takes
        self.features = {key: torch.empty(0, space.net.dim) for key in self.candidates}
        self.broken: set[K] = set()  # candidates whose pictures are not finite

    def run(self) -> None:
        """Generate. The first two batches say how many candidates and pictures there is time for."""
        first, size = self.candidates[-1], FIRST
        self._draw(first, slice(0, size))  # warms up, so its pace is too slow
        if time.monotonic() < self.until:
            more = min(BATCH, self.most - size, max(FIRST, int(0.2 * (self.until - time.monotonic()) / self.pace)))
            self._draw(first, slice(size, size + more))
            size += more
        left = self.until - time.monotonic()
        affordable = int(left / (max(self.pace, 1e-6) * FEWEST_IMAGES))
        self.candidates = thinned(self.candidates, max(1, min(len(self.candidates), affordable)))
        if len(self.candidates) == 1:
            self.done = size
        self.rounds()

    def affords(self, count: int, until: float) -> bool:
        """Whether so many other candidates could be compared with one of these until a time."""
        least = max(2 * FOLDS, min(FEWEST_IMAGES, self.done))
        return self.done >= 2 * FOLDS and (until - time.monotonic()) / max(self.pace, 1e-6) >= count * least

    def rounds(self) -> None:
        """Rounds of pictures, in each of which every candidate draws as many; the last one that fits ends it.

        The only candidate has no need of more.
        """
        if len(self.candidates) == 1:
            return
        with progress_bars.bar(total=None, unit="image", desc="choosing", delay=0.5) as bar:
            while self.done < self.most:
                left, count = self.until - time.monotonic(), len(self.candidates)
                affordable = int(left / (max(self.pace, 1e-6) * count))
                size = min(BATCH, self.most - self.done, max(affordable // ROUNDS, min(affordable, 4 * FIRST)))
                if size < 1 and self.done:
                    break
                size = max(size, FIRST)  # of the first round, which there must be
                for key in self.candidates:
                    before = self.drawn
                    self._draw(key, slice(len(self.features[key]), self.done + size))
                    bar.update(self.drawn - before)
                self.done += size

    def _draw(self, key: K, part: slice) -> None:
        """Generate a part of a candidate's pictures, and keep their features. Nothing where it is empty."""
        import torch

        from latentdiff.models.feature_net import extract

        count = part.stop - part.start
        if count < 1 or key in self.broken:
            return
        began = time.monotonic()
        self.prepare(key)
        try:
            features = extract(self.space.net, draw(self.trainer, self.what, part))[0].float()
            self.features[key] = torch.cat([self.features[key], features])
        except NotFiniteError:
            self.broken.add(key)
        self.drawn += count
        self.pace = (time.monotonic() - began) / count

    def entries(self) -> list[dict[str, Any]]:
        """The values of each candidate: distance, label_accuracy and closer_to_training, as in `Choice.candidates`."""
        import torch

        table, space = list[dict[str, Any]](), self.space
        labels = None if self.what.labels is None else torch.tensor(self.what.labels[: self.done])
        for key in self.candidates:
            rows, entry = self.features[key][: self.done], dict[str, Any](distance=None)
            if key not in self.broken and len(rows) >= 2:
                entry["distance"] = space.distance(rows)
                if space.probe is not None and labels is not None:
                    entry["label_accuracy"] = space.probe.accuracy(rows, labels[: len(rows)])
                if space.near is not None:
                    entry["closer_to_training"] = space.copies(rows)
            table.append(entry)
        return table

    def noise(self, key: K, other: K) -> float:
        """The standard error of the difference between two candidates' distances; inf for very few pictures.

        A jackknife over groups of pictures. Both have pictures from the same noise, which takes much of the error away.
        """
        import torch

        if key == other:
            return 0.0
        if self.done < 2 * FOLDS:
            return math.inf
        group = torch.arange(self.done) % FOLDS
        rows = [self.features[each][: self.done] for each in (key, other)]
        distances = [[self.space.distance(each[group != fold]) for fold in range(FOLDS)] for each in rows]
        differences = torch.tensor(distances[0]).double() - torch.tensor(distances[1]).double()
        return ((FOLDS - 1) / FOLDS * (differences - differences.mean()).square().sum()).sqrt().item()


def _compare(
    trainer: DiffusionTrainer, folders: dict[int, Path], until: float, features: str | Path | None, guidance: bool
) -> Choice:
    """The choice among candidates, made until about a time of time.monotonic; its guidance is left in the trainer's config."""
    from latentdiff.training import publish, state

    trainer.ema_model.to(trainer.accelerator.device)
    began = time.monotonic()
    space = open_space(trainer, features, began + REFERENCE_SHARE * max(0.0, until - began))
    now = time.monotonic()
    if now > until and len(folders) > 1:
        raise UserError("there was no time left")

    def prepare(step: int) -> None:
        tensors, meta = state.load_folder(folders[step], only="ema")
        publish.load_averages(trainer, tensors, meta)

    # The state
    scales = other_scales(trainer.config) if guidance else []
    share = GUIDANCE_SHARE if scales else 0.0
    contest = Contest(sorted(folders), prepare, trainer, space, now + (1 - share) * (until - now))
    contest.run()
    if scales and not contest.affords(len(scales), until):
        scales, contest.until = [], until  # so the states have the time
        contest.rounds()
    losses = held_out_losses(Path(trainer.config.output))
    table = [
        {"step": step, **entry, "held_out_loss": nearest_loss(losses, step)}
        for step, entry in zip(contest.candidates, contest.entries(), strict=True)
    ]
    step, reason = decide(table, contest.noise, space.limit, contest.done)
    if len(table) < len(folders):
        reason += f"; there was time for {len(table)} of {len(folders)} states"
    choice = Choice(step, "", table, space.real, contest.done, len(space.reference), space.net.name, space.limit)
    choice.why = in_words(choice, reason)
    choice.generated = contest.drawn

    # The guidance scale, of this state
    if scales and step not in contest.broken:
        prepare(step)
        kept = next(entry for entry in table if entry["step"] == step)
        if not enough(kept, space.real.get("label_accuracy")):
            scales = other_scales(trainer.config, stronger=True)
        if scales:
            _guide(trainer, space, contest, step, scales, until, choice)
    return choice


def _guide(
    trainer: DiffusionTrainer,
    space: Space,
    of_states: Contest[int],
    step: int,
    scales: list[float],
    until: float,
    choice: Choice,
) -> None:
    """Try other guidance scales on the state that is kept, and put the best one into the trainer's config and the choice.

    of_states: the contest in which the state's pictures were drawn, at the config's own scale; they are compared here too.
    """
    from latentdiff.training.conditioning import guidance_scale

    own, sample = guidance_scale(trainer.config), trainer.config.sample

    def prepare(scale: float) -> None:
        sample.guidance = scale

    contest = Contest([*scales, own], prepare, trainer, space, until)
    contest.features[own] = of_states.features[step]
    contest.pace = of_states.pace
    contest.rounds()
    table = [{"guidance": key, **entry} for key, entry in zip(contest.candidates, contest.entries(), strict=True)]
    scale = decide_guidance(table, contest.noise, space.limit, contest.done, space.real.get("label_accuracy"))
    sample.guidance = scale
    choice.generated += contest.drawn
    choice.guidance = {"scale": scale, "images": contest.done, "scales": sorted(table, key=lambda entry: entry["guidance"])}
    choice.why += f" Guidance {scale:g} is its default" + (
        ": of the scales tried it is the best." if scale != own else ", as planned: no other scale tried is better."
    )


def other_scales(config: DiffusionConfig, stronger: bool = False) -> list[float]:
    """Two guidance scales beside the config's own that are worth a try; [] for a model without guidance.

    stronger: only such, as classes are not recognised often enough.
    """
    from latentdiff.training.conditioning import guidance_scale

    if config.condition.type == "none":
        return []
    try:
        guidance_scale(config.model_copy(update={"sample": config.sample.model_copy(update={"guidance": 2.0})}))
    except UserError:
        return []  # training never drops the condition
    own = guidance_scale(config)
    scales = (own * GUIDANCE_STEP**power for power in ((1, 2) if stronger else (-1, 1)))
    return [scale for scale in (min(max(1.0, round(each, 2)), max(STRONGEST, own)) for each in scales) if scale != own]


# The decision


def decide(
    table: Sequence[dict[str, Any]], noise: Callable[[int, int], float], limit: float | None, images: int
) -> tuple[int, str]:
    """(the step that is kept, why) among the entries of `Choice.candidates`.

    The lowest distance wins among those within the limit. Those that are further only by noise count as equal. Of equals
    those with the highest label accuracy stay, up to its own noise, and of these the latest is kept.

    Args:
        table: the candidates.
        noise: of two steps, the standard error of the difference of their distances.
        limit: of closer_to_training; None: none.
        images: pictures of each candidate.
    """
    measured = [entry for entry in table if entry["distance"] is not None]
    if not measured:
        return max(entry["step"] for entry in table), "no candidate's pictures could be measured"
    if len(measured) == 1:
        return measured[0]["step"], "it is the only one whose pictures were measured"
    fair = within(measured, limit)
    if not fair:
        least = min(measured, key=lambda entry: (entry["closer_to_training"], entry["distance"]))
        return least["step"], "all are above the limit of memorisation, and it copies least"
    nearest = min(fair, key=lambda entry: entry["distance"])
    equal = [e for e in fair if e["distance"] - nearest["distance"] <= noise(e["step"], nearest["step"])]
    reason = "it has the lowest distance"
    if len(equal) > 1:
        reason = f"its distance and that of {len(equal) - 1} more differ by noise only, and it is the latest of them"
        best = max(entry.get("label_accuracy", 0.0) for entry in equal)
        clear = [entry for entry in equal if best - entry.get("label_accuracy", 0.0) <= accuracy_noise(best, images)]
        if len(clear) < len(equal):
            reason = (
                f"its distance and that of {len(equal) - 1} more differ by noise only, and it has the highest label accuracy"
            )
        equal = clear
    if len(fair) < len(measured):
        reason += f", among the {len(fair)} of {len(measured)} within the limit of memorisation"
    return max(entry["step"] for entry in equal), reason


def within(table: Sequence[dict[str, Any]], limit: float | None) -> list[dict[str, Any]]:
    """The entries within the limit of memorisation; None: all."""
    return [entry for entry in table if limit is None or entry.get("closer_to_training", 0.0) <= limit]


def enough(entry: dict[str, Any], real_accuracy: float | None) -> bool:
    """Whether pictures show their class often enough; True where that is not measured."""
    return real_accuracy is None or "label_accuracy" not in entry or entry["label_accuracy"] >= ENOUGH * real_accuracy


def decide_guidance(
    table: Sequence[dict[str, Any]],
    noise: Callable[[float, float], float],
    limit: float | None,
    images: int,
    real_accuracy: float | None,
) -> float:
    """The guidance scale that is kept, of entries whose last one is of the scale that was planned.

    Guidance trades distance for label accuracy. So the lowest distance wins among the scales whose pictures show their class
    at ENOUGH of the rate of real ones. Where none does, the highest accuracy wins. Up to noise the planned scale stays, unless
    another is better in both.

    table, noise, limit, images: as in `decide`, with "guidance" for "step". real_accuracy: of held-out pictures.
    """
    planned = table[-1]
    fair = [entry for entry in within(table, limit) if entry["distance"] is not None]
    if planned["distance"] is None or not fair:
        return planned["guidance"]
    recognised = [entry for entry in fair if enough(entry, real_accuracy)]
    if not recognised:
        best = max(fair, key=lambda entry: entry["label_accuracy"])
        gain = best["label_accuracy"] - planned["label_accuracy"]
        by_noise = gain <= accuracy_noise(best["label_accuracy"], images) and best["distance"] > planned["distance"]
        return planned["guidance"] if planned in fair and by_noise else best["guidance"]
    fair = recognised
    nearest = min(fair, key=lambda entry: entry["distance"])
    stays = planned in fair and planned["distance"] - nearest["distance"] <= noise(planned["guidance"], nearest["guidance"])
    return planned["guidance"] if stays else nearest["guidance"]


def accuracy_noise(accuracy: float, images: int) -> float:
    """The standard error of a label accuracy over so many pictures. It is not taken for 0 where all or none are right."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.01) / max(images, 1))


def in_words(choice: Choice, reason: str) -> str:
    """The choice as a sentence or three."""
    kept = next(entry for entry in choice.candidates if entry["step"] == choice.step)
    count = len(choice.candidates)
    words = f"The state of step {choice.step} is kept{f', of {count}' if count > 1 else ''}: {reason}."
    if kept["distance"] is None:
        return words
    real = choice.real
    facts = [f"Fréchet distance {kept['distance']:.3g}" + _beside(real, "distance", ".3g")]
    if "label_accuracy" in kept:
        facts.append(f"the right class in {kept['label_accuracy']:.0%}" + _beside(real, "label_accuracy", ".0%"))
    if "closer_to_training" in kept:
        facts.append(
            f"{kept['closer_to_training']:.1%} closer to a training picture than {PERCENT} % of real ones are "
            f"(limit {choice.memorisation_limit:.0%})"
        )
    if kept["held_out_loss"] is not None:
        facts.append(f"held-out loss {kept['held_out_loss']:.3g}")
    words += f" Over {choice.images} pictures: {', '.join(facts)}."
    if choice.memorisation_limit is None:
        words += f" Copies cannot be told from likeness: {real.get('images', 0)} held-out pictures are too few."
    return words


def _beside(real: dict[str, Any], name: str, form: str) -> str:
    return f" ({real[name]:{form}} for {real['images']} real ones)" if name in real else ""


def held_out_losses(output: Path) -> dict[int, float]:
    """{step: held-out loss of the averaged weights} of a run's metrics.jsonl."""
    losses = {}
    try:
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            losses[int(entry["step"])] = float(entry["validation/loss_ema"])
        except (ValueError, LookupError, TypeError):
            continue
    return losses


def nearest_loss(losses: dict[int, float], step: int) -> float | None:
    """The loss of the step that is nearest to a step; None where there is none."""
    near = min(losses, key=lambda each: (abs(each - step), each), default=None)
    return None if near is None or not math.isfinite(losses[near]) else losses[near]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
