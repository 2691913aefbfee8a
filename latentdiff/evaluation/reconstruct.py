"""`latentdiff reconstruct`: images beside their reconstructions by an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.data.transforms import Preprocess


def reconstruct(
    model: str | Path, images: list[str | Path], out: str | Path = "reconstructions.png", own_size: bool = False
) -> dict[str, Any]:
    """Show images beside their reconstructions by the model's autoencoder, in one PNG, with PSNR and SSIM of each.

    Images are read and brought to the model's size as in its training. Where training took images of one size alone, others
    are cropped to it.

    Args:
        model: a checkpoint, a run of stage 1 or an autoencoder's folder.
        images: image files.
        out: a .png file: each image on the left, its reconstruction on the right.
        own_size: take each image at its file's size, cropped at the bottom and right to a multiple of the autoencoder's
            factor. So it is too where nothing says how the model was trained.

    Returns:
        {"out", "images": [{"image", "prepared", "psnr_db", "ssim"}]}; prepared says how an image was brought to its size,
        and ssim is None for images of fewer than 11 pixels.

    Raises:
        UserError: an image that cannot be read, by name, or a model that cannot be used.
    """
    from latentdiff.checkpoints import resolve_model
    from latentdiff.evaluation.image_quality import SSIM_MIN_SIDE, psnr, ssim
    from latentdiff.evaluation.reference_data import preprocessing
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.codec import LatentCodec
    from latentdiff.utils.images import save_png, tile, to_uint8
    from latentdiff.utils.outputs import check_out

    path = check_out(out, len(images))
    if path.suffix != ".png":
        raise UserError(f"--out {out}: must end in .png")
    folder = resolve_model(model)
    codec = LatentCodec(load_autoencoder(str(folder)))
    data = None if own_size else _data_of(folder)
    rule = None if data is None else preprocessing(data, codec)
    rows, scores = [], []
    for name in images:
        x, content, prepared = _prepare_image(Path(name), rule, codec)  # x: [1, C, H, W]
        y = codec.reconstruct(x).clamp(-1, 1)
        top, left, height, width = content
        x, y = (image[..., top : top + height, left : left + width] for image in (x, y))
        rows.append(np.concatenate([to_uint8(x)[0], to_uint8(y)[0]], axis=1))
        score = ssim(y, x)[0].item() if min(height, width) >= SSIM_MIN_SIDE else None
        scores.append({"image": str(name), "prepared": prepared, "psnr_db": psnr(y, x)[0].item(), "ssim": score})
    save_png(tile([[row] for row in rows], scale=1), path)
    return {"out": str(path), "images": scores}


def _prepare_image(file: Path, rule: Preprocess | None, codec: Any) -> tuple[Tensor, tuple[int, int, int, int], dict[str, Any]]:
    """One image file as float32 [1, C, H, W] in [-1, 1], its content as (top, left, height, width), and what was done to it."""
    from dataclasses import replace

    from latentdiff.data.framing import framing_facts
    from latentdiff.data.image_files import DECODING_ERRORS, WHITE, decode, reason_of
    from latentdiff.data.image_source import ImageSource
    from latentdiff.data.transforms import SCALED, Preprocess
    from latentdiff.utils.images import to_uint8

    try:
        array = decode(file, codec.image_channels, rule.background if rule else WHITE)
    except DECODING_ERRORS as error:
        raise UserError(f"{file}: cannot be read as an image ({reason_of(file, error)})") from None
    facts: dict[str, Any] = {"file_size": list(array.shape[:2])}
    if rule is None or rule.size is None:
        height, width = (side // codec.factor * codec.factor for side in array.shape[:2])
        if min(height, width) == 0:
            raise UserError(f"{file}: smaller than {codec.factor}x{codec.factor}, the least this autoencoder takes")
        array = array[:height, :width]
        rule, done = Preprocess((height, width), codec.image_channels), {"size": [height, width], "framing": "own size"}
    else:
        size = rule.content[2:]
        scaling = rule if rule.framing in SCALED else Preprocess(size, codec.image_channels, "crop")
        if array.shape[:2] == size:
            done = {"size": list(size), "framing": rule.framing}
        else:
            image = ImageSource(str(file), codec.image_channels, [], None, None, np.array([array.shape[:2]]))
            done = framing_facts(image, scaling)
        if rule.framing not in SCALED:
            array = to_uint8(scaling(array)[None])[0]
        rule = replace(rule, channels=codec.image_channels)
    return rule(array)[None], rule.content, facts | done


def _data_of(folder: Path) -> dict[str, Any] | None:
    """The data section of a model's training config: of a checkpoint, of a run, or of an autoencoder's run."""
    from latentdiff.checkpoints import META, read_meta
    from latentdiff.models.loading import read_json

    if (folder / META).is_file():
        config = read_meta(folder).get("config")
    else:
        records = [folder / "run.json", *([folder.parent / "run.json"] if folder.name == "autoencoder" else [])]
        config = next((read_json(record) for record in records if record.is_file()), None)
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) and "size" in data else None
