"""`latentdiff compare`: records side by side, or the samplers of one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentdiff.errors import UserError


def compare(
    what: Sequence[str | Path],
    data: str | None = None,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (5, 10, 20, 50),
    num_images: int = 1000,
    features: str | Path | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    precision: str = "float32",
    seed: int = 0,
    batch_size: int = 128,
    out: str | Path = "comparison",
) -> str:
    """Put records of evaluate side by side; or one model's samplers: what they cost and how far their images are from the data.

    Records need nothing else. For a model, every sampler makes images at every number of steps. Each cell of the table is
    written to `out` when it is done (comparison.json and comparison.md), and a comparison that was stopped goes on.

    Args:
        what: metrics.json files that evaluate wrote, or their folders; or one checkpoint.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards. For a checkpoint.
        samplers: names of latentdiff's samplers; "scheduler" is the checkpoint's own. For a checkpoint.
        steps: numbers of steps.
        num_images: images of each sampler and number of steps, the same number of each class.
        features: the network whose features are compared: a feature network's folder, a vision encoder's folder or Hub name, or
            the file of Inception's weights. By default one that ships, for colour or for grey.
        guidance: scale of classifier-free guidance; 1 is off. By default the checkpoint's.
        guidance_interval: guide only at times t from LOW to HIGH, where 0 is data and 1 is noise; 0 1 is everywhere. By
            default the checkpoint's.
        precision: of the U-Net: float32 or bfloat16.
        seed: of the images; the same in every cell.
        batch_size: images made at a time.
        out: a folder for the table of a checkpoint's samplers.

    Returns:
        The table as Markdown.

    Raises:
        UserError: records that do not go together; an unknown sampler, a model or data that cannot be used, or a comparison
            with another protocol in `out`.
    """
    from latentdiff.evaluation.compare_samplers import compare_samplers, comparison_markdown
    from latentdiff.evaluation.records import compare_records, is_record

    if any(is_record(path) for path in what):
        return compare_records(what)
    if len(what) > 1:
        raise UserError(f"compare: {what[1]} is one argument too many; give one MODEL, or records that evaluate --out wrote")
    missing = [flag for flag, value in (("--data", data), ("--samplers", samplers)) if not value]
    if missing or data is None:
        raise UserError(f"compare: {what[0]} is no record, and a MODEL needs {' and '.join(missing)}")
    table = compare_samplers(
        what[0],
        data,
        samplers,
        steps,
        num_images=num_images,
        out=out,
        features=features,
        seed=seed,
        guidance=guidance,
        guidance_interval=guidance_interval,
        precision=precision,
        batch_size=batch_size,
    )
    return comparison_markdown(table)
