"""`latentdiff reconstruct`: images beside their reconstructions by an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.data.transforms import Preprocess


SHOWN = 256  # images in the picture at most


def reconstruct(
    model: str | Path,
    images: list[str | Path],
    out: str | Path = "reconstructions.png",
    own_size: bool = False,
    size: int | None = None,
    framing: Literal["crop", "letterbox", "resize"] = "crop",
) -> dict[str, Any]:
    """Show images beside their reconstructions by the model's autoencoder, in one PNG, with PSNR and SSIM of each.

    Images are read and brought to the model's size as in its training. Where training took images of one size alone, others
    are cropped to it.

    Args:
        model: a checkpoint, a run of stage 1 or an autoencoder's folder.
        images: image files, or folders whose image files are taken, those in sub-folders too.
        out: a .png file: each image on the left, its reconstruction on the right; of many images a selection.
        own_size: take each image at its file's size, cropped at the bottom and right to a multiple of the autoencoder's
            factor. So it is too where nothing says how the model was trained.
        size: bring each image to size x size pixels instead, whatever the model was trained on.
        framing: how images come to that size, as data.framing.

    Returns:
        {"out", "mean", "images": [{"image", "prepared", "psnr_db", "ssim"}], "unreadable"}; mean has images, psnr_db and
        ssim over all, prepared says how an image was brought to its size, ssim is None for images of fewer than 11 pixels,
        and unreadable names files of the folders that are left out.

    Raises:
        UserError: an image that cannot be read, by name, or a model that cannot be used.
    """
    from latentdiff.checkpoints import resolve_model
    from latentdiff.data.transforms import Preprocess
    from latentdiff.evaluation.image_quality import SSIM_MIN_SIDE, psnr, ssim
    from latentdiff.evaluation.reference_data import preprocessing
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.codec import LatentCodec
    from latentdiff.utils.images import save_png, tile, to_uint8
    from latentdiff.utils.outputs import check_out

    if size is not None and own_size:
        raise UserError("--size and --own-size exclude each other: leave one out")
    files, found = _image_files(images)
    path = check_out(out, min(len(files), SHOWN))
    if path.suffix != ".png":
        raise UserError(f"--out {out}: must end in .png")
    folder = resolve_model(model)
    codec = LatentCodec(load_autoencoder(str(folder)))
    if size is not None and (size < 1 or size % codec.factor):
        raise UserError(f"--size {size}: must be a multiple of {codec.factor}, the autoencoder's factor")
    data = None if own_size or size is not None else _data_of(folder)
    rule = None if data is None else preprocessing(data, codec)
    if size is not None:
        rule = Preprocess((size, size), codec.image_channels, framing, codec.factor)
    rows: list[list[np.ndarray]] = []
    scores: list[dict[str, Any]] = []
    unreadable: list[str] = []
    shown = set(np.linspace(0, len(files) - 1, min(len(files), SHOWN)).astype(int).tolist())
    for k, name in enumerate(files):
        try:
            x, content, prepared = _prepare_image(name, rule, codec)  # x: [1, C, H, W]
        except UserError:
            if name not in found:
                raise
            unreadable.append(str(name))
            continue
        y = codec.reconstruct(x).clamp(-1, 1)
        top, left, height, width = content
        x, y = (image[..., top : top + height, left : left + width] for image in (x, y))
        if k in shown:
            rows.append([np.concatenate([to_uint8(x)[0], to_uint8(y)[0]], axis=1)])
        score = ssim(y, x)[0].item() if min(height, width) >= SSIM_MIN_SIDE else None
        scores.append({"image": str(name), "prepared": prepared, "psnr_db": psnr(y, x)[0].item(), "ssim": score})
    if not rows:
        raise UserError(f"{files[0]}: cannot be read as an image, and no other in its folder")
    save_png(tile(rows, scale=1), path)
    similar = [score["ssim"] for score in scores if score["ssim"] is not None]
    mean = {
        "images": len(scores),
        "psnr_db": sum(score["psnr_db"] for score in scores) / len(scores),
        "ssim": sum(similar) / len(similar) if similar else None,
    }
    return {"out": str(path), "mean": mean, "images": scores, "unreadable": unreadable}


def _image_files(images: list[str | Path]) -> tuple[list[Path], set[Path]]:
    """(the image files, folders replaced by what they hold; which of them were found in folders)."""
    from latentdiff.data.folders import list_folder
    from latentdiff.data.image_source import Columns

    files: list[Path] = []
    found: set[Path] = set()
    for each in map(Path, images):
        inside = [each / name for name in list_folder(each, Columns(), with_captions=False).files] if each.is_dir() else []
        files += inside or [each]
        found.update(inside)
    return files, found


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
    from latentdiff.utils.json_files import read_json

    if (folder / META).is_file():
        config = read_meta(folder).get("config")
    else:
        records = [folder / "run.json", *([folder.parent / "run.json"] if folder.name == "autoencoder" else [])]
        config = next((read_json(record) for record in records if record.is_file()), None)
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) and "size" in data else None
