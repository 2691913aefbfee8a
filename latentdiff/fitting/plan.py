"""Decides how a model of a folder is trained within some hours: the plan of `latentdiff fit`, and its two configs.

The networks are those of configs/folder, in three sizes. What is decided here is which of them, on which pictures, and for
how long; each decision has a reason, which the plan prints.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from latentdiff.checkpoints import resolve_config
from latentdiff.config import (
    AutoencoderConfig,
    DataConfig,
    DiffusionConfig,
    DiscreteConfig,
    override,
    parse_config,
    parse_data,
)
from latentdiff.errors import UserError, printable
from latentdiff.fitting.budget import in_words
from latentdiff.fitting.facts import COPIED, GENERALISED, Facts
from latentdiff.fitting.first_stage import LATENT_NOISE
from latentdiff.fitting.machine import Machine, Timing, time_encoding, time_steps
from latentdiff.utils import atomic
from latentdiff.utils.safe_yaml import read_yaml

SIZES = ("small", "medium", "large")
AUTOENCODER = "weights/autoencoder-rgb"  # comes with latentdiff
TRAIN = "train"  # as in autoencoder=train: no pretrained one is tried
LATENTS = ("continuous", "discrete")  # as in latents=discrete: a model over the codes of a VQ autoencoder
CODES = 512  # of its codebook
CODE_CHANNELS = 8  # of its codes
# What of a config of stage diffusion is none of a config of stage discrete
CONTINUOUS = ("schedule", "prediction", "noise_levels", "weighting", "min_snr_gamma", "normaliser", "bridge")
CONTINUOUS_SAMPLE = ("scheduler", "scheduler_config", "sampler")
FIXED = {
    "stage": "a plan has both stages; write stage1.KEY=value for a key of stage 1",
    "output": "give --out DIR",
    "data.source": "it is FOLDER",
    "train.minutes": "give --hours H",
    "stage1.train.minutes": "give --hours H",
    "stage1.output": "give --out DIR",
    "stage1.stage": "it is autoencoder",
}
# Resolution
LARGE_SIDE = 256  # from here on, pictures need a pretrained autoencoder that was made for them
BRIEF = 0.08  # hours: less leaves too few steps at 64 pixels on a CPU
ALIKE = 1.3  # the widest tenth of the pictures may be so many times as wide as the narrowest, for the same height
CUT = 0.45  # share of the median picture that a crop may cut off
VANISHING = 0.03  # share of the transparent pictures that may vanish on the background
# Steps of stage 2 that a size is worth: with fewer, the next smaller one draws better. Of few pictures a large network
# mostly remembers more, so it is not taken for them
WORTH = {"small": 0, "medium": 5_000, "large": 15_000}
LEAST_PICTURES = {"small": 0, "medium": 0, "large": 5 * COPIED}
ENOUGH_STEPS = {"cpu": (8_000, 12_000, 20_000), "gpu": (20_000, 30_000, 60_000)}  # few pictures, some, many
HOURS = (0.25, 12.0)  # the least and the most that a plan recommends
SHORT = 2.0  # times the hours that were given, from which on the plan says what it would recommend
# Shares of the hours
REST_SHARE, REST_LEAST, REST_MOST = 0.1, 40.0, 1800.0  # choosing and measuring: the share, and its bounds in seconds
FIRST_SHARE, DECODER_SHARE = 0.28, 0.15  # stage 1, and its decoder alone
LOOK = 30.0  # seconds of looking, measuring and trying the autoencoder
MOST_PATIENCE = 5.0  # seconds of timing the steps of one network
SPEED = 0.9  # of the steps that the timing promises: pictures, validation and saved states take the rest
MOST_ENCODING = 0.25  # share of stage 2 that encoding the pictures may take; of more pictures, a part is trained on
LEAST_LIMIT = 50  # pictures; of many, training on fewer is refused
PICTURES, SNAPSHOTS = 12, 5  # over stage 2
PICTURE_SHARE = 0.05  # of the time that drawing these pictures may take
DRAWN = 16  # pictures at a time, where there are no classes
# Copies of the pictures of small folders
VARIANTS, MOST_COPIES = 4 * COPIED, 8  # so many pictures and copies in all, and so many of each at most
SHIFT, ZOOM = 0.05, 0.1
# A picture may be seen so often before there is a copy more of it. Until then little is learnt by heart, and copies and dropout
# only slow the learning down: of 483 drawings, each seen 230 times, they took the label accuracy from 37 % to 23 %
PASSES = 400
COPYING = 0.1  # share of stage 2 that encoding the copies may take
LEAST_BATCH = 4
SLOWER = 2.0  # the upper bound of the steps is so many times what is expected, should the machine turn out faster

# measure(config, trial, device, precision, patience): how long a training step takes, or None where it does not fit in memory
Measure = Callable[[Any, Any, str, str | None, float], Timing | None]


@dataclass
class Plan:
    """What a fit will do.

    Attributes:
        hours: of the whole.
        facts, machine: what the plan was made for.
        autoencoder: the config of stage 1; None where it is not trained.
        diffusion: the config of stage 2.
        seconds: of each phase: look, autoencoder, diffusion, choose, report.
        size: of the U-Net, a name of SIZES; None for one that goes on from a base.
        steps: expected in each stage.
        reasons: {what was decided: why}, in words.
        notes: what else one has to know, as lines.
    """

    hours: float
    facts: Facts
    machine: Machine
    autoencoder: AutoencoderConfig | None
    diffusion: DiffusionConfig | DiscreteConfig
    seconds: dict[str, float]
    size: str | None = None
    steps: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.time)

    def lines(self) -> list[str]:
        """The plan for people, one thought a line, with reasons."""
        lines = [f"data: {line}" for line in self.facts.lines()[:2]]
        lines += [f"note: {line}" for line in (*self.facts.lines()[2:], *self.notes)]
        lines.append(f"machine: {self.machine.line()}")
        lines += [f"{what}: {why}" for what, why in self.reasons.items()]
        parts = [("stage 1", "autoencoder"), ("stage 2", "diffusion")]
        each = [f"{name} {in_words(self.seconds[key])}" for name, key in parts if self.seconds[key]]
        rest = self.seconds["choose"] + self.seconds["report"]
        done = time.strftime("%H:%M", time.localtime(self.began + self.hours * 3600))
        late = time.strftime(" on %d %B", time.localtime(self.began + self.hours * 3600)) if self.hours > 12 else ""
        lines.append(f"time: {', '.join(each)}, choosing and measuring {in_words(rest)}; done by {done}{late}")
        return [printable(line) for line in lines]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "hours": self.hours,
            "seconds": self.seconds,
            "size": self.size,
            "steps": self.steps,
            "reasons": self.reasons,
            "notes": self.notes,
            "lines": self.lines(),
            "facts": self.facts.as_json(),
            "machine": self.machine.as_json(),
        }


# What a user may set


@dataclass
class Asked:
    """The key=value words of a fit, sorted by what they are for. Each is a list of key=value.

    Attributes:
        data: `data.` keys, of both stages.
        stage1, stage2: keys of either config.
        autoencoder: a pretrained one, TRAIN, or None for the one that comes with latentdiff.
        latents: a name of LATENTS.
    """

    data: list[str]
    stage1: list[str]
    stage2: list[str]
    autoencoder: str | None = None
    latents: str = LATENTS[0]


def sort_overrides(overrides: Sequence[str]) -> Asked:
    """The words of a fit by what they are for, each checked to be a key of its config.

    Raises:
        UserError: an unknown key, with the nearest valid one; a value that is not valid; or a key that fit sets itself.
    """
    asked = Asked([], [], [])
    for item in overrides:
        key = item.partition("=")[0]
        if key in FIXED:
            raise UserError(f"{item}: fit sets {key}; {FIXED[key]}")
        if key == "autoencoder":
            tree: dict[str, Any] = {}
            override(tree, item)
            asked.autoencoder = str(tree["autoencoder"])
        elif key == "latents":
            asked.latents = item.partition("=")[2]
            if asked.latents not in LATENTS:
                raise UserError(f"{item}: valid: latents={', latents='.join(LATENTS)}")
        elif key.startswith("data."):
            asked.data.append(item)
        elif key.startswith("stage1."):
            asked.stage1.append(item.removeprefix("stage1."))
        else:
            asked.stage2.append(item)
    _config("autoencoder-small", [*asked.data, *asked.stage1], "stage1")
    kind = "text-small" if any(item.startswith("condition.text.") for item in asked.stage2) else "diffusion-small"
    _config(kind, [*asked.data, *asked.stage2], "fit", asked.latents)
    if asked.latents == "discrete" and asked.autoencoder is None:
        asked.autoencoder = TRAIN  # the one that comes with latentdiff has no codebook
    return asked


def preset(name: str) -> dict[str, Any]:
    """One of the configs in configs/folder, as nested dicts."""
    return read_yaml(resolve_config(f"configs/folder/{name}.yaml").read_text(encoding="utf-8"))


def _over_codes(tree: dict[str, Any]) -> dict[str, Any]:
    """The same config of stage diffusion as one of stage discrete."""
    kept = {key: value for key, value in tree.items() if key not in CONTINUOUS}
    sample = {key: value for key, value in tree.get("sample", {}).items() if key not in CONTINUOUS_SAMPLE}
    return kept | {"stage": "discrete", "schedule": "cosine", "sample": sample}


def _config(name: str, overrides: Sequence[str], where: str, latents: str = LATENTS[0]) -> Any:
    tree = _over_codes(preset(name)) if latents == "discrete" else preset(name)
    for item in overrides:
        override(tree, item)
    return parse_config(tree, where)


# What the pictures become


def choose_data(
    facts: Facts,
    machine: Machine,
    hours: float | None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> tuple[DataConfig, dict[str, str]]:
    """(the data section of both stages, reasons in words).

    Args:
        facts: of the folder.
        machine: what it is trained on.
        hours: of the whole fit; None: as many as are needed.
        overrides: the key=value words of the fit; those of `data.` win over what is decided here.
        base: settings that an existing model asks for; its data section wins over what is decided here too.

    Raises:
        UserError: an override is not valid, or the pictures are too large for the autoencoder that ships.
    """
    asked = sort_overrides(overrides)
    given = parse_data({"source": facts.source}, asked.data).model_fields_set
    values: dict[str, Any] = {"source": facts.source, "workers": min(2, machine.cores)}
    reasons: dict[str, str] = {}
    framing, why = _framing(facts)
    values["framing"] = framing
    side, why_size = _side(facts, machine, hours, framing)
    values["size"] = [side, side]
    reasons["pictures"] = f"{side}x{side} pixels, {why_size}; {why}"
    values["channels"] = 3
    values["background"], ground = _background(facts, framing)
    if ground:
        reasons["background"] = ground
    values["held_out"] = _held_out(facts)
    values["flips"], why_flips = _flips(facts)
    reasons["mirrored"] = why_flips
    copies = min(MOST_COPIES, VARIANTS // max(1, facts.images))
    if copies > 1:
        values |= {"copies": copies, "shift": SHIFT, "zoom": ZOOM}
    bad = len(facts.unreadable) / max(1, facts.images + len(facts.unreadable))
    if bad > 0.01:
        values["max_bad_share"] = min(0.99, round(bad + 0.01, 3))
    if base is not None and base.get("data"):
        values |= base["data"]
        height, width = values["size"]
        reasons["pictures"] = f"{width}x{height} pixels, as the base draws; {why}"
    data = parse_data(values, asked.data)
    if data.copies == 1:
        data = data.model_copy(update={key: 0.0 for key in ("shift", "zoom") if key not in given})
    if data.size is not None and "size" in given:
        reasons["pictures"] = f"{data.size[1]}x{data.size[0]} pixels, as asked; data.framing is {data.framing}"
    if "flips" in given:
        reasons["mirrored"] = f"data.flips={str(data.flips).lower()}, as asked"
    if "background" in given:
        reasons.pop("background", None)
    if data.size is not None and max(data.size) >= LARGE_SIDE and asked.autoencoder is None and base is None:
        raise UserError(
            f"data.size={list(data.size)}: {LARGE_SIDE} pixels and more need an autoencoder made for them; "
            "name one, such as autoencoder=FOLDER_OR_HUB_NAME of Stable Diffusion, or autoencoder=train"
        )
    return data, reasons


def _framing(facts: Facts) -> tuple[str, str]:
    low, _, high = facts.aspect
    if facts.transparent >= 0.5:
        return "letterbox", "shown whole, as most have a transparent ground"
    if high > ALIKE * low:
        return "letterbox", "shown whole with borders, as their shapes differ"
    if facts.cropped > CUT:
        return "letterbox", f"shown whole with borders, as a square would cut {facts.cropped:.0%} off"
    cut = (
        f"the middle square of each, which cuts {facts.cropped:.0%} off"
        if facts.cropped > 0.02
        else "nearly square as they are"
    )
    return "crop", cut


def _side(facts: Facts, machine: Machine, hours: float | None, framing: str) -> tuple[int, str]:
    """The side of the square pictures in pixels, and why."""
    own = max(facts.median) if framing == "letterbox" else min(facts.median)
    if own < 40:
        return 32, f"as theirs are small (median side {own})"
    if machine.gpu:
        if own >= 96 and (hours is None or hours >= 0.25):
            return 128, "which a GPU can afford"
        return 64, "as theirs are no larger" if own < 96 else "as the time is short"
    if hours is not None and hours < BRIEF:
        return 32, "as the time is very short"
    return 64, "which a CPU can afford"


def _background(facts: Facts, framing: str) -> tuple[list[int], str | None]:
    """The colour under transparency and around a letterbox, and why it is not white."""
    from latentdiff.fitting.facts import GROUNDS

    if facts.transparent > TRANSPARENT_SHARE and facts.hidden:
        good = [name for name in GROUNDS if facts.hidden[name] <= VANISHING]
        name = good[0] if good else min(facts.hidden, key=facts.hidden.__getitem__)
        if name != "white":
            share = facts.hidden["white"]
            return list(GROUNDS[name]), f"{name}, as {share:.0%} of the transparent pictures would vanish on white"
    elif framing == "letterbox" and facts.dark_border > 0.5:
        return [0, 0, 0], "black, as most pictures have dark borders"
    return [255, 255, 255], None


def _held_out(facts: Facts) -> float:
    """The share of the pictures that is kept from training: enough to measure by, and no more than training can spare."""
    for below, share in ((20, 0.2), (60, 0.1), (2_000, 0.15), (10_000, 0.1)):
        if facts.images < below:
            return share
    return 0.05 if facts.images < 100_000 else round(5_000 / facts.images, 6)


def _flips(facts: Facts) -> tuple[bool, str]:
    """Whether pictures are mirrored left-right, and why.

    A mirrored photograph is another photograph. A mirrored icon, letter or arrow is a wrong one, and the model would draw it.
    """
    if facts.sided:
        return False, "no, as names or captions speak of sides or writing"
    if facts.transparent >= 0.5:
        return False, "no, as icons may hold writing and arrows; data.flips=true does"
    return True, "at random, as nothing speaks of sides or writing; data.flips=false does not"


# The plan


def make_plan(
    facts: Facts,
    machine: Machine,
    hours: float | None,
    verdict: Any,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    out: str | Path = "runs/my-images",
    measure: Measure | None = None,
) -> Plan:
    """Decide how a model of the pictures is made within the hours.

    Args:
        facts: of the pictures.
        machine: where it is trained.
        hours: of the whole; None: what the plan recommends.
        verdict: on the pretrained autoencoder, a `first_stage.Verdict`; None where none is to be tried (autoencoder=train).
        overrides: key=value words; see `sort_overrides`.
        base: what `base.base_settings` gave for an existing model. Its U-Net and autoencoder are then used.
        out: the fit's folder; the configs write their runs into it.
        measure: measure(config, trial, device, precision, patience) times a training step; None: `time_steps` does.

    Raises:
        UserError: an override is not valid, or the time does not suffice for these pictures.
    """
    asked = sort_overrides(overrides)
    data, reasons = choose_data(facts, machine, hours, overrides, base)
    return _Planning(facts, machine, asked, data, reasons, verdict, base, Path(out), measure or _measure).plan(hours)


class _Planning:
    """The making of one plan. Attributes as the arguments of `make_plan`; data: of both stages."""

    def __init__(
        self,
        facts: Facts,
        machine: Machine,
        asked: Asked,
        data: DataConfig,
        reasons: dict[str, str],
        verdict: Any,
        base: Mapping[str, Any] | None,
        out: Path,
        measure: Measure,
    ):
        self.facts, self.machine, self.asked, self.data, self.reasons = facts, machine, asked, data, reasons
        self.verdict, self.base, self.out, self.measure = verdict, base, out, measure
        self.notes: list[str] = list(base.get("notes", [])) if base is not None else []
        self.decision = "train" if verdict is None else str(verdict.decision)
        if base is not None and base.get("autoencoder"):
            self.decision = "skip"
        self.channels = data.channels
        self.over_codes = asked.latents == "discrete"
        if self.over_codes and base is not None:
            raise UserError("latents=discrete: a base is a model of latents; leave --base or latents=discrete out")

    def plan(self, hours: float | None) -> Plan:
        from latentdiff.training.latents import code_shape

        # Stage 1: what is trained, and the latents that follow from it
        first, codec = self._first_stage(hours)
        height, width = self.data.size or (64, 64)
        latent_shape = codec.latent_shape(height, width)
        if self.over_codes:
            if codec.num_codes is None:
                raise UserError(f"autoencoder={self.autoencoder}: has no codebook, which latents=discrete needs; leave it out")
            latent_shape = code_shape(codec, height, width)
        each = time_encoding(codec, (height, width)) * (1 + self.data.flips)
        encoding = self._encoding(each, hours)

        # Stage 2: the largest U-Net that gets enough steps
        size, tree, timing = self._choose_size(hours, first, encoding, codec, latent_shape)
        if hours is None:
            hours = self._recommended(size, timing, encoding)
            self.reasons["hours"] = f"{hours:g}, as none were given (--hours H): {self._why_hours(timing)}"
            encoding = self._encoding(each, hours)
        elif (enough := self._recommended(size, timing, encoding)) > SHORT * hours:
            self.notes.append(f"{hours:g} hours are short: {enough:g} would suit these pictures on this machine")
        seconds = self._seconds(hours, first is not None)
        steps = self._steps(seconds["diffusion"] - encoding, timing)
        encoding = self._regularise(tree, steps, each, hours)
        if "train.steps" in _keys(self.asked.stage2):
            steps = min(steps, int(tree["train"]["steps"]))
        diffusion = self._finish_diffusion(tree, timing, steps, seconds["diffusion"], hours)
        self.reasons["U-Net"] = self._why_size(size, timing, steps, latent_shape, diffusion)
        expected = {"diffusion": steps}
        if first is not None:
            first, expected["autoencoder"] = self._finish_autoencoder(first, seconds["autoencoder"], hours)
        if encoding > 0.1 * seconds["diffusion"]:
            self.notes.append(f"encoding the pictures takes about {in_words(encoding)} of stage 2")
        return Plan(
            hours,
            self.facts,
            self.machine,
            first,
            diffusion,
            seconds,
            size,
            expected,
            _ordered(self.reasons),
            self.notes,
        )

    def _encoding(self, each: float, hours: float | None) -> float:
        """Seconds to encode what is trained on. Where that would take too long, there are fewer copies, or fewer pictures.

        each: seconds to encode a picture. hours: of the whole; None: not known yet, so nothing is left out.
        """
        own, data = _keys(self.asked.data), self.data
        whole = math.inf if hours is None else self._seconds(hours, self.decision != "skip")["diffusion"]
        count = min(data.limit or self.facts.images, self.facts.images)
        if data.copies > 1 and "data.copies" not in own and each * count * data.copies > COPYING * whole:
            data = _with_copies(data, max(1, int(COPYING * whole / (each * count))))
        if "data.limit" not in own and each * count * data.copies > MOST_ENCODING * whole:
            limit = int(MOST_ENCODING * whole / (each * data.copies))
            if limit < LEAST_LIMIT:
                raise UserError(
                    f"--hours {hours:g}: a picture takes {each:.2g} s to encode here, which leaves no time to train on "
                    f"{self.facts.images} of them; give more hours, or a smaller data.size"
                )
            data = data.model_copy(update={"limit": limit})
        if data.limit is not None and data.limit < self.facts.images:
            why = "as asked" if "data.limit" in own else f"as encoding all would take {in_words(each * count)}"
            self.reasons["limit"] = f"{data.limit} of the {self.facts.images} pictures, spread evenly, are trained on, {why}"
        if data.copies > 1:
            moved = f"moved by up to {data.shift:.0%} and scaled by up to {data.zoom:.0%}"
            self.reasons["copies"] = f"{data.copies} of each picture, {moved}, so that fewer are learnt by heart"
        else:
            self.reasons.pop("copies", None)
        self.data = data
        return each * self._variants()

    def _regularise(self, tree: dict[str, Any], steps: int, each: float, hours: float) -> float:
        """No more copies, and no dropout, where the pictures are seen too seldom to be learnt by heart. In place.

        tree: of stage 2. steps: of it. each, hours: as in `_encoding`. Returns the seconds of the encoding.
        """
        passes = steps * tree["train"]["batch_size"] / max(1, self._variants() // self.data.copies)
        most = max(1, round(passes / PASSES))
        asked = {"data.copies", "data.shift", "data.zoom"} & _keys(self.asked.data)
        if most < self.data.copies and not asked:
            self.data = _with_copies(self.data, most)
        if most == 1 and "model.config.dropout" not in _keys(self.asked.stage2) and self.base is None:
            tree["model"]["config"].pop("dropout", None)
        encoding = self._encoding(each, hours)
        tree["data"] = tree["data"] | {key: value for key, value in self._data().items() if key in ("copies", "shift", "zoom")}
        return encoding

    # Stage 1

    def _first_stage(self, hours: float | None) -> tuple[AutoencoderConfig | None, Any]:
        """(the config of stage 1, or None where it is not trained; the codec that gives the latents' shape)."""
        from latentdiff.models.autoencoder import load_autoencoder
        from latentdiff.models.codec import LatentCodec
        from latentdiff.training.train_autoencoder import make_autoencoder

        if self.decision == "train":
            config = self._autoencoder_config(hours)
            why = "trained on these pictures"
            if self.verdict is not None:
                why += f": {self.verdict.reason}"
            elif self.over_codes:
                why += f", with {CODES} codes, as latents=discrete needs"
            elif self.asked.autoencoder == TRAIN:
                why += ", as asked"
            self.reasons["autoencoder"] = why
            return config, LatentCodec(make_autoencoder(config).to(self.machine.device))
        if self.base is not None and self.base.get("autoencoder"):
            self.autoencoder, self.normaliser = str(self.base["autoencoder"]), None
            self.reasons["autoencoder"] = "the base model's"
            codec = LatentCodec(load_autoencoder(self.autoencoder).to(self.machine.device))
            return None, codec
        self.autoencoder, self.normaliser = str(self.verdict.where), str(getattr(self.verdict, "normaliser", "stored"))
        codec = LatentCodec(load_autoencoder(self.autoencoder).to(self.machine.device))
        if self.decision == "decoder" and hours is not None and hasattr(self.verdict, "within"):
            self.verdict = self.verdict.within(DECODER_SHARE * hours * 3600)
            self.decision = self.verdict.decision
        self.reasons["autoencoder"] = str(self.verdict.reason)
        if self.decision == "skip":
            if self.asked.stage1:
                self.notes.append(f"stage1.{self.asked.stage1[0]} has no effect, as stage 1 is not trained (autoencoder=train)")
            return None, codec
        tree = preset("autoencoder-small")
        tree["model"] = {"pretrained": self.autoencoder}
        tree |= {"freeze_encoder": True, "latent_noise": LATENT_NOISE, "optimizer": tree["optimizer"] | {"lr": 3e-4}}
        return self._parse_autoencoder(tree), codec

    def _autoencoder_config(self, hours: float | None) -> AutoencoderConfig:
        """A new autoencoder: the small one on a CPU with less than two hours, else the medium one; a large one on a GPU."""
        long = hours is not None and hours >= 2
        name = ("large" if long else "medium") if self.machine.gpu else ("medium" if long else "small")
        tree = preset(f"autoencoder-{name}")
        blocks = tree["model"]["config"]["block_out_channels"]
        if max(self.data.size or (64, 64)) <= 32:  # at factor 8 their latents would be 4x4, which is little to draw on
            tree["model"]["config"] |= {"block_out_channels": [blocks[0], *blocks[2:]], "latent_channels": 8}
        if self.over_codes:
            # One code says less than a latent of many channels, so there are more of them: at factor 4
            network = tree["model"]["config"] | {"block_out_channels": [blocks[0], *blocks[2:]]}
            network |= {"latent_channels": CODE_CHANNELS, "num_vq_embeddings": CODES}
            tree["model"] = {"type": "VQModel", "config": network}
            tree["loss"].pop("kl", None)
        batch = 32 if self.machine.gpu else 16
        _batch(tree, batch, self._variants(), self.machine.processes, _keys(self.asked.stage1))
        return self._parse_autoencoder(tree)

    def _variants(self) -> int:
        """Pictures and copies that are trained on, about."""
        kept = self.facts.images if self.facts.test_images else int(self.facts.images * (1 - self.data.held_out))
        return min(self.data.limit or kept, kept) * self.data.copies

    def _parse_autoencoder(self, tree: dict[str, Any]) -> AutoencoderConfig:
        data = self.data.model_dump(mode="json", exclude_unset=True)
        if self.decision == "train" and self.facts.grey > 0.995 and "data.channels" not in _keys(self.asked.data):
            data["channels"] = 1
            self.channels = 1
        self.autoencoder_folder = str(self.out / "autoencoder")
        tree |= {"output": self.autoencoder_folder, "data": data}
        for item in self.asked.stage1:
            override(tree, item)
        self.autoencoder = self.autoencoder_folder
        if self.decision == "train":
            self.normaliser = "stored"  # stage 1 measures it. Where the encoder is kept, so is its normaliser
        self.first_tree = tree
        return parse_config(tree, "stage1")  # type: ignore[return-value]

    def _finish_autoencoder(self, config: AutoencoderConfig, seconds: float, hours: float) -> tuple[AutoencoderConfig, int]:
        """(the config with its times and precision, the steps that are expected)."""
        from latentdiff.training import train_autoencoder

        vae = train_autoencoder.make_autoencoder(config)
        height, width = self.data.size or (64, 64)
        trial = partial(train_autoencoder.trial_steps, config, vae, (config.data.channels, height, width))
        timing = self.measure(config, trial, self.machine.device, None, self._patience(hours))
        steps = self._steps(seconds, timing)
        tree = self.first_tree
        tree["data"] = self._data()
        own = _keys(self.asked.stage1)
        _set_times(tree["train"], steps, seconds, hours, own)
        _set(tree, "train.precision", timing.precision if timing else "auto", own)
        _set(tree, "optimizer.warmup_steps", max(1, min(tree["optimizer"].get("warmup_steps", 100), steps // 20)), own)
        _set(tree, "ema.decay", round(min(tree["ema"]["decay"], max(0.5, 1 - 30 / max(steps, 1))), 5), own)
        start = tree["loss"].get("adversarial_start")
        if start:
            _set(tree, "loss.adversarial_start", steps // 2, own)
        return parse_config(tree, "stage1"), steps  # type: ignore[return-value]

    # Stage 2

    def _data(self) -> dict[str, Any]:
        """The data section of both stages, as JSON values."""
        return self.data.model_dump(mode="json", exclude_unset=True) | {"channels": self.channels}

    def _tree(self, size: str) -> dict[str, Any]:
        """The config of stage 2 with a U-Net of a size, as nested dicts, overrides included."""
        condition = self.facts.condition
        tree = preset(f"{'text' if 'text' in condition else 'diffusion'}-{size}")
        data = self._data()
        tree |= {"output": str(self.out / "diffusion"), "autoencoder": self.autoencoder, "data": data}
        if self.normaliser == "measured":
            tree["normaliser"] = "measured"
        tree["condition"]["type"] = condition
        if condition == "none":
            tree["sample"].pop("guidance", None)
        network = tree["model"]["config"]
        side = max(self.data.size or (64, 64)) // self.factor
        for _ in range(int(math.log2(max(1, side / 16)))):  # larger latents get levels without attention before the others
            network["block_out_channels"].insert(0, network["block_out_channels"][0])
            network["down_block_types"].insert(0, "DownBlock2D")
            network["up_block_types"].append("UpBlock2D")
        if self.facts.images < 5 * COPIED:
            network["dropout"] = 0.1
        if self.base is not None:
            rest = {key: value for key, value in self.base.items() if key not in ("data", "notes")}  # used already
            tree = _merged(tree, rest, whole=("model", "schedule", "noise_levels", "condition"))
        if self.over_codes:
            tree = _over_codes(tree)
        for item in self.asked.stage2:
            override(tree, item)
        return tree

    def _choose_size(
        self, hours: float | None, first: AutoencoderConfig | None, encoding: float, codec: Any, shape: tuple[int, int, int]
    ) -> tuple[str | None, dict[str, Any], Timing | None]:
        """(the size, its config as nested dicts, how long its steps take)."""
        from latentdiff.training.train_diffusion import check_unet_size
        from latentdiff.training.train_discrete import of_stage

        self.factor = codec.factor
        chosen: tuple[str | None, dict[str, Any], Timing | None] | None = None
        fixed = self.base is not None or any(x.startswith("model.config.block_out_channels=") for x in self.asked.stage2)
        precision = None
        classes = max(1, len(self.facts.classes))
        for size in ("medium",) if fixed else SIZES:
            if chosen is not None and not self._worth(size, chosen[2], hours, first, encoding):
                break
            tree = self._tree(size)
            _batch(tree, 128 if self.machine.gpu else 32, self._variants(), self.machine.processes, _keys(self.asked.stage2))
            config: Any = parse_config(copy.deepcopy(tree), "fit")
            check, trainer_class = of_stage(config)
            check(config)
            check_unet_size(config, shape, codec.factor)
            trial = partial(trainer_class.trial_steps, config, codec, None, shape, classes)
            timing = self.measure(config, trial, self.machine.device, precision, self._patience(hours))
            if timing is None and chosen is not None:
                break  # it does not fit in memory
            precision = timing.precision if timing else None
            if chosen is None or self._worth(size, timing, hours, first, encoding):
                chosen = (None if fixed else size, tree, timing)
            else:
                break
        assert chosen is not None
        return chosen

    def _worth(self, size: str, timing: Timing | None, hours: float | None, first: Any, encoding: float) -> bool:
        """Whether a size gets the steps that it needs, if a step takes as long as `timing` says."""
        if self.facts.images < LEAST_PICTURES[size] or timing is None:
            return False
        if hours is None:
            hours = HOURS[1] if self.machine.gpu else 2.0
        seconds = self._seconds(hours, first is not None)["diffusion"] - encoding
        return self._steps(seconds, timing) >= WORTH[size]

    def _finish_diffusion(
        self, tree: dict[str, Any], timing: Timing | None, steps: int, seconds: float, hours: float
    ) -> DiffusionConfig | DiscreteConfig:
        """The config with what follows from the number of steps and the time."""
        own = _keys(self.asked.stage2)
        _set_times(tree["train"], steps, seconds, hours, own)
        _set(tree, "train.precision", timing.precision if timing else "auto", own)
        if "class" in self.facts.condition:
            _set(tree, "sample.per_class", max(1, min(4, 40 // len(self.facts.classes))), own)
        _set(tree, "validation_images", 256 if self.machine.gpu else 128, own)
        least = self._picture_seconds(tree, timing) / PICTURE_SHARE / 60
        _set(tree, "train.picture_minutes", round(max(tree["train"]["picture_minutes"], least), 2), own)
        _set(tree, "train.snapshot_minutes", round(seconds / 60 / (SNAPSHOTS + 1), 3), own)
        _set(tree, "optimizer.warmup_steps", max(1, min(300, steps // 20)), own)
        # An average over the last thirtieth of the steps: longer ones lag behind, shorter ones keep the noise of the steps
        _set(tree, "ema.decay", round(min(0.9998, max(0.98, 1 - 30 / max(steps, 1))), 5), own)
        return parse_config(tree, "fit")  # type: ignore[return-value]

    def _picture_seconds(self, tree: dict[str, Any], timing: Timing | None) -> float:
        """About how long it takes to draw the pictures of a training run once, and to validate."""
        if timing is None:
            return 0.0
        sample = tree["sample"]
        drawn = len(self.facts.classes) * sample.get("per_class", 4) if "class" in self.facts.condition else DRAWN
        # With guidance each step takes two passes of the network; a training step takes about three
        passes = 2 * sample["steps"] * drawn + tree["validation_images"]
        return passes / timing.batch * timing.seconds / 3

    # Time

    def _patience(self, hours: float | None) -> float:
        """Seconds that one timing may take, about: a hundredth of the whole, as there are up to four."""
        return MOST_PATIENCE if hours is None else min(MOST_PATIENCE, max(1.0, 36 * hours))

    def _seconds(self, hours: float, trains_first: bool) -> dict[str, float]:
        """Seconds of each phase of a fit of some hours."""
        whole = hours * 3600
        rest = min(max(REST_SHARE * whole, REST_LEAST), REST_MOST)
        look = min(LOOK, 0.1 * whole)
        left = max(whole - rest - look, 0.1 * whole)
        share = FIRST_SHARE if self.decision == "train" else DECODER_SHARE
        first = share * left if trains_first else 0.0
        seconds = {"look": look, "autoencoder": first, "diffusion": left - first, "choose": rest / 2, "report": rest / 2}
        return {name: round(value, 1) for name, value in seconds.items()}

    def _steps(self, seconds: float, timing: Timing | None) -> int:
        """Steps that are expected in some seconds."""
        if timing is None:
            return 1000
        return max(10, int(SPEED * max(seconds, 0.0) / timing.seconds))

    def _recommended(self, size: str | None, timing: Timing | None, encoding: float) -> float:
        """Hours that are worth it for these pictures on this machine, in quarters."""
        needed = self._enough() * (timing.seconds if timing else 1.0) / SPEED + encoding
        share = {"skip": 1.0, "decoder": 1 - DECODER_SHARE}.get(self.decision, 1 - FIRST_SHARE)
        hours = (needed / share + LOOK) / (1 - REST_SHARE) / 3600
        return min(HOURS[1], max(HOURS[0], math.ceil(hours * 4) / 4))

    def _enough(self) -> int:
        few, some, many = ENOUGH_STEPS["gpu" if self.machine.gpu else "cpu"]
        return few if self.facts.images < COPIED else some if self.facts.images < GENERALISED else many

    def _why_hours(self, timing: Timing | None) -> str:
        return f"{self._enough()} steps of stage 2 are worth it for {self.facts.images} pictures"

    def _why_size(
        self,
        size: str | None,
        timing: Timing | None,
        steps: int,
        shape: tuple[int, int, int],
        config: DiffusionConfig | DiscreteConfig,
    ) -> str:
        latents = f"{'codes' if self.over_codes else 'latents'} of {'x'.join(map(str, shape))}"
        what = f"{size} (configs/folder)" if size else "the base model's" if self.base is not None else "of the widths given"
        if timing is None:
            return f"{what}, {latents}; its steps could not be timed"
        passes = steps * config.train.batch_size / max(1, self._variants() // self.data.copies)
        each = f"{timing.seconds:.2g} s a step of {config.train.batch_size} in {timing.precision}"
        seen = f"about {steps} steps, each picture {passes:.0f} times" if passes >= 1 else f"about {steps} steps"
        return f"{what}, {latents}; {each}, so {seen}"


TRANSPARENT_SHARE = 0.05  # of the pictures; of fewer, the background is white whatever they need


def _ordered(reasons: dict[str, str]) -> dict[str, str]:
    order = ("pictures", "background", "mirrored", "limit", "copies", "autoencoder", "U-Net", "hours")
    return {key: reasons[key] for key in order if key in reasons}


def _with_copies(data: DataConfig, copies: int) -> DataConfig:
    """The data section with another number of copies; a single one stays where and as large as it is."""
    return data.model_copy(update={"copies": copies} | ({} if copies > 1 else {"shift": 0.0, "zoom": 0.0}))


def _measure(config: Any, trial: Any, device: str, precision: str | None, patience: float) -> Timing | None:
    """How long a training step takes here; None where it does not fit in memory."""
    share = max(1, config.train.batch_size // int(os.environ.get("WORLD_SIZE", "1")))
    return time_steps(trial, device, share, precision, patience)


def _batch(tree: dict[str, Any], batch: int, variants: int, processes: int, own: set[str]) -> None:
    """The batch, in place: no larger than what there is to train on, and shared alike by the processes of the launch."""
    batch = min(batch, max(LEAST_BATCH, variants))
    _set(tree, "train.batch_size", -(-batch // processes) * processes, own)


def _set_times(train: dict[str, Any], steps: int, seconds: float, hours: float, own: set[str]) -> None:
    """What goes by the clock, in place. The steps are an upper bound. own: keys that the user gave."""
    bound = math.ceil(SLOWER * steps / 100) * 100
    minutes = seconds / 60
    values = {
        "steps": bound,
        "minutes": round(minutes, 2),
        "picture_every": bound,
        "picture_minutes": round(min(5.0, max(0.5, minutes / PICTURES)), 2),
        "save_minutes": round(min(2.0, max(0.5, 0.02 * hours * 60)), 2),
    }
    for key, value in values.items():
        if f"train.{key}" not in own:
            train[key] = value


def _keys(items: Sequence[str]) -> set[str]:
    return {item.partition("=")[0] for item in items}


def _set(tree: dict[str, Any], key: str, value: Any, own: set[str]) -> None:
    """Set a dotted key, in place, unless the user gave it."""
    if key in own:
        return
    *parents, last = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _merged(tree: dict[str, Any], changes: Mapping[str, Any], whole: Sequence[str] = ()) -> dict[str, Any]:
    """The tree with changes, section by section; the sections in `whole` are replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), dict) and key not in whole
        merged[key] = _merged(merged[key], value) if inner else copy.deepcopy(value)
    return merged


# The files


def write_configs(plan: Plan, out: str | Path) -> list[Path]:
    """Write the configs of a plan to OUT/configs, as files that `latentdiff train` runs; returns their paths."""
    written = []
    for name, config in (("autoencoder", plan.autoencoder), ("diffusion", plan.diffusion)):
        if config is None:
            continue
        path = Path(out) / "configs" / f"{name}.yaml"
        head = [f"# Written by latentdiff fit {plan.facts.source}: `latentdiff train {path}` runs it.", "#"]
        head += [f"# {line}" for line in plan.lines()]
        tree = config.model_dump(mode="json", exclude_unset=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, "\n".join(head) + "\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        written.append(path)
    return written
