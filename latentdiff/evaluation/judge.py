"""`latentdiff judge`: does a text-to-image model draw what its prompts say, as a judge network sees it?"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.errors import UserError
from latentdiff.utils import processes, progress_bars

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.data.pairs import Pairs
    from latentdiff.models.codec import LatentCodec

GRID_COLUMNS, GRID_ROWS = 6, 2  # for each kind of prompt
DRAW_SEED = 0  # of the ceiling and of chance, so that they are the same whatever seed draws the pictures
PROMPT_FORM = "<style> style, <name>"
FREE_PROMPTS = (
    "a red apple",
    "a green apple",
    "grinning face",
    "blue heart",
    "yellow star",
    "red car",
    "dog",
    "smiling cat",
    "pizza",
    "rocket",
    "twemoji style, dog",
    "noto style, rocket",
)


def judge(
    model: str | Path,
    data: str | Path,
    judge: str | Path,
    num_prompts: int = 200,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    precision: str = "float32",
    seed: int = 0,
    batch_size: int = 64,
    out: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Measure whether a model draws what prompts say, as a judge trained on real pictures sees it.

    The model draws one picture of each pair of style and identity, from the prompt "<style> style, <name>", and the nearest
    real pictures are looked up. `evaluation.retrieval` says what the numbers are.

    Args:
        model: a checkpoint that reads text: a folder or a Hub name.
        data: pictures with styles and identities, such as those of latentdiff prepare emoji.
        judge: the folder that training a config with stage: judge made.
        num_prompts: pairs that training has seen; all held-out pairs are drawn besides.
        steps: steps of the sampler. By default the checkpoint's, or more where the sampler needs more.
        sampler: one of latentdiff's samplers (latentdiff.samplers.names()). By default the checkpoint's own scheduler.
        guidance: scale of classifier-free guidance; 1 is off. By default the checkpoint's.
        guidance_interval: guide only at times t from LOW to HIGH, where 0 is data and 1 is noise; 0 1 is everywhere. By
            default the checkpoint's.
        precision: of the U-Net: float32 or bfloat16.
        seed: an image depends on the seed, its prompt and its number, not on the batch size.
        batch_size: images made at a time.
        out: a folder for judge.json and judge.md, the record metrics.json and the picture grid.png, which shows free prompts
            too. Its pictures are not selected.
        device: of the model and the judge: auto, cpu, cuda, cuda:1, mps or another of torch's names.

    Returns:
        Scores, ceiling, chance, memorisation and the protocol. Several processes of a launcher share the drawing; the first
        one judges, and the others return None.

    Raises:
        UserError: a model that reads no text, data without styles and identities, or a judge trained on other data.
    """
    from latentdiff import samplers
    from latentdiff.checkpoints import load, resolve_model, weights_of
    from latentdiff.data.pairs import read_pairs, to_images
    from latentdiff.evaluation.records import make_judge_record, sampling_protocol, write_record
    from latentdiff.evaluation.retrieval import MILD, chosen_rows, index_pictures, judge_pictures
    from latentdiff.generation import place, refuse_second_image, set_precision
    from latentdiff.guidance import check_interval
    from latentdiff.models.codec import LatentCodec
    from latentdiff.models.judge_net import load_judge
    from latentdiff.utils.outputs import check_out_folder

    if num_prompts < 2 or batch_size < 1 or (steps is not None and steps < 1):
        raise UserError("judge: --num-prompts must be at least 2, --batch-size and --steps at least 1")
    if sampler is not None and sampler not in samplers.names():
        raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(samplers.names())}")
    check_interval(guidance_interval, "--guidance-interval")
    if out is not None:
        check_out_folder(out)
    processes.pick_device(device)
    started = time.perf_counter()

    # The judge, the model, and whether they go together
    net = load_judge(resolve_model(judge, "--judge", "model.safetensors"))
    folder = resolve_model(model)
    pipeline = load(folder)
    refuse_second_image(pipeline, "judge")
    if pipeline.text_encoder is None:
        raise UserError(f"{model}: reads no text, and a judge measures how well prompts are followed")
    chosen = place(pipeline, device, sampler)
    index = index_pictures(net.to(chosen), read_pairs(data), str(judge))
    codec = LatentCodec(pipeline.vae)
    _check_pictures(pipeline, codec, index.pairs)
    rows = chosen_rows(index, num_prompts)
    prompts = _prompts(index.pairs, rows)

    # Draw
    pipeline.set_progress_bar_config(disable=True)
    set_precision(pipeline, precision)
    call = {
        "num_inference_steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance,
        "guidance_interval": guidance_interval,
    }
    if out is not None:
        prompts["free"] = list(FREE_PROMPTS)
    processes.announce("judge", chosen, max(map(len, prompts.values())), batch_size)
    pictures = draw(pipeline, prompts, seed, batch_size, **call)
    if pictures is None:
        return None
    drawn = time.perf_counter()

    # Judge
    protocol = sampling_protocol(pipeline, str(model), seed=seed, **call) | {
        "precision": precision,
        "data": str(data),
        "prompts": PROMPT_FORM,
        "judge": net.fingerprint()[:16],
        "strength_of_augmentation": MILD,
        "trained_on_this_train_part": trained_on(folder, str(data)),
    }
    whole = all(side % codec.factor == 0 for side in index.pairs.pictures.shape[1:3])  # else training padded them
    generated = {kind: (to_images(pictures[kind]), rows[kind]) for kind in rows}
    table = {"protocol": protocol, **judge_pictures(index, generated, DRAW_SEED, codec.reconstruct if whole else None)}
    if out is not None:
        _write(Path(out), table, pictures, prompts)
        seconds = {"loading_and_drawing": drawn - started, "judging": time.perf_counter() - drawn}
        made = {**weights_of(folder), "device": str(chosen)}
        write_record(make_judge_record(table, index.pairs.fingerprint(), net.fingerprint(), made, seconds), out)
    return table


def draw(
    pipeline: Any, prompts: Mapping[str, list[str]], seed: int, batch_size: int, **call: Any
) -> dict[str, np.ndarray] | None:
    """Draw one picture of each prompt. A picture depends on seed and prompt alone.

    Args:
        pipeline: the checkpoint.
        prompts: {kind: prompts}.
        seed: of the pictures.
        batch_size: pictures in a batch.
        call: further arguments of the pipeline's call.

    Returns:
        {kind: uint8 [Q, H, W, C]}. Several processes share the work; on all but the first the result is None.
    """
    from latentdiff.generation import generate_share

    parts = [processes.share(len(texts), batch_size) for texts in prompts.values()]
    total, hidden = sum(part.stop - part.start for part in parts), processes.rank() > 0
    with progress_bars.bar(total=total, unit="image", desc="drawing", delay=0.5, disable=hidden) as bar:
        mine = [generate_share(pipeline, texts, 1, seed, batch_size, bar.update, **call) for texts in prompts.values()]
    # The processes meet when everything is drawn
    gathered = [processes.gather(images, len(texts), batch_size) for texts, images in zip(prompts.values(), mine, strict=True)]
    return None if hidden else dict(zip(prompts, gathered, strict=True))


def trained_on(folder: Path, data: str) -> bool:
    """Whether a checkpoint was trained on exactly the training part of `data`, and so on none of its held-out pairs.

    The checksum that the checkpoint recorded is compared with that of the images and captions. False where it has none.

    folder: of the checkpoint. data: the data set, as in `judge`. UserError where the data set cannot be opened.
    """
    from latentdiff.checkpoints import META, read_meta
    from latentdiff.data.datasets import ImageDataset
    from latentdiff.data.sources import open_source
    from latentdiff.data.transforms import Preprocess

    recorded = read_meta(folder).get("data", {}) if (folder / META).is_file() else {}
    source = open_source(data, "train", 3)
    return recorded.get("fingerprint") == ImageDataset(source, Preprocess()).fingerprint()


def _check_pictures(pipeline: Any, codec: LatentCodec, pairs: Pairs) -> None:
    """UserError where the model's pictures are not of the data's size and channels."""
    height, width = pipeline.config.image_size or [side * codec.factor for side in pipeline.latent_shape[1:]]
    shapes = (height, width, codec.image_channels), pairs.pictures.shape[1:]
    if shapes[0] != shapes[1]:
        made, expected = ("x".join(map(str, shape)) for shape in shapes)
        raise UserError(f"judge: the model's pictures are {made}, those of --data {pairs.name} are {expected}")


def _prompts(pairs: Pairs, rows: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """{kind: prompts of the pairs}. UserError for a pair without one."""
    prompts: dict[str, list[str]] = {}
    for kind, chosen in rows.items():
        texts = [pairs.prompts[row] for row in chosen.tolist()]
        if None in texts:
            identity = pairs.identity_names[int(pairs.identities[chosen[texts.index(None)]])]
            raise UserError(f"--data {pairs.name}: {identity} has no caption of the form '{PROMPT_FORM}'")
        prompts[kind] = [text for text in texts if text is not None]
    return prompts


def _write(out: Path, table: dict[str, Any], pictures: Mapping[str, np.ndarray], prompts: Mapping[str, list[str]]) -> None:
    """Write grid.png, judge.json and judge.md."""
    from latentdiff.evaluation.retrieval import judge_markdown
    from latentdiff.utils.atomic import write_text
    from latentdiff.utils.images import captioned_grid, save_png

    rows, captions, names = [], [], []
    for kind, images in pictures.items():
        count = min(len(images), GRID_COLUMNS * GRID_ROWS)
        chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
        for start in range(0, count, GRID_COLUMNS):
            part = chosen[start : start + GRID_COLUMNS]
            rows.append([images[k] for k in part])
            captions.append([prompts[kind][k] for k in part])
            names.append(kind if start == 0 else "")
    save_png(captioned_grid(rows, captions, names), out / "grid.png")
    write_text(out / "judge.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "judge.md", judge_markdown(table))
