"""`latentdiff likelihood`: bits per dimension of a data set under a checkpoint."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.utils import progress_bars

if TYPE_CHECKING:
    from torch import Tensor


RTOL = 1e-2  # of the ODE


def measure_likelihood(
    model: str | Path,
    data: str,
    num_images: int = 200,
    probes: int = 1,
    seed: int = 0,
    rtol: float | None = None,
    split: str = "test",
    unconditional: bool = False,
    batch_size: int = 50,
    device: str = "auto",
) -> dict[str, Any]:
    """Bound the bits per dimension of a data set's pixels, through both stages.

    `latentdiff.evaluation.bits_per_dim` says what the terms are, and what in them is exact. A model that reads text measures
    every image under the empty prompt.

    Args:
        model: a checkpoint: a folder or a Hub name.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards.
        num_images: images of the split.
        probes: probes of Hutchinson's estimator for each image; of a model over codes, 64 evaluations each.
        seed: chooses the images and draws latents and probes.
        rtol: tolerance of the probability-flow ODE, relative and absolute; 0.01 by default. A model over codes has no ODE.
        split: test (or what training held out), or train.
        unconditional: measure each image under the null class instead of its own.
        batch_size: images measured at a time.
        device: auto, cpu, or torch's name of another device.

    Returns:
        The total in bits per dimension, its terms, their standard errors and the protocol.

    Raises:
        UserError: a model or data that cannot be used or do not go together, or numbers out of range.
    """

    from latentdiff.checkpoints import is_over_codes, load, resolve_model
    from latentdiff.denoiser import Denoiser
    from latentdiff.discrete import make_process
    from latentdiff.evaluation.bits_per_dim import pixel_bits
    from latentdiff.evaluation.reference_data import check_classes, data_rule, reference_sets
    from latentdiff.generation import place
    from latentdiff.guidance import ClassifierFree
    from latentdiff.models.codec import LatentCodec

    if split not in ("test", "train"):
        raise UserError(f"--split {split}: valid are test and train")
    if not 0 < (RTOL if rtol is None else rtol) < math.inf or min(num_images, probes, batch_size) < 1:
        raise UserError("likelihood: --rtol must be finite and above 0, --num-images, --probes and --batch-size at least 1")
    folder = resolve_model(model)
    pipeline = load(folder)
    place(pipeline, device, "dopri5")  # it integrates in float64
    codec = LatentCodec(pipeline.vae)
    train, test = reference_sets(data, *data_rule(folder, codec))
    images = test if split == "test" else train
    conditional = pipeline.num_classes > 0 and not unconditional
    if conditional:
        check_classes(pipeline, images, data, "; with --unconditional classes are not looked at")
    null = pipeline.config.null_class
    if unconditional and pipeline.num_classes > 0 and null is None:
        raise UserError("--unconditional: this model was trained without class dropout and has no null class")
    check_likelihood(pipeline, str(model))
    process = denoiser = None
    if is_over_codes(pipeline.config):
        if rtol is not None:
            raise UserError(f"--rtol {rtol:g}: is of the ODE of a model over latents, and this one is over codes; leave it out")
        made = pipeline.config.process
        process = make_process(made["name"], pipeline.num_codes, made["schedule"], made.get("levels", "together"))
    else:
        denoiser = Denoiser.from_pipeline(pipeline)

    def denoiser_for(labels: Tensor | None, count: int) -> Any:
        rows = labels.tolist() if conditional and labels is not None else [null] * count
        conditioning = pipeline.conditioning([None] * count, rows)
        if denoiser is None:
            return partial(pipeline.predict, **conditioning)
        return ClassifierFree(denoiser, conditioning, {}, 1.0)

    with progress_bars.bar(total=num_images, unit="image", desc="likelihood", delay=0.5) as bar:
        report = pixel_bits(
            codec,
            denoiser_for,
            train,
            images,
            num_images,
            probes,
            seed,
            RTOL if rtol is None else rtol,
            batch_size=batch_size,
            progress=bar.update,
            process=process,
        )
    protocol = {"model": str(model), "split": split, "density": "log p(x | class)" if conditional else "log p(x)"}
    return report | {"protocol": protocol | report["protocol"]}


def check_likelihood(pipeline: Any, model: str) -> None:
    """UserError for a bridge, a model with a second image, and one of text that always has a prompt. model: its name."""
    from latentdiff.checkpoints import refuse_bridge
    from latentdiff.generation import refuse_second_image

    refuse_bridge(pipeline, model)
    refuse_second_image(pipeline, "likelihood")
    if pipeline.text_encoder is not None and pipeline.config.null_prompt is None:
        raise UserError(f"{model}: was trained without text dropout, so it has no likelihood without prompts")
