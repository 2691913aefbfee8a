"""Pictures of the same things in several styles: each picture is a pair (style, identity), as `prepare emoji` writes them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.image_files import DECODING_ERRORS, decode, reason_of
from latentdiff.data.metadata import check_inside, json_rows
from latentdiff.errors import UserError

METADATA = "metadata.jsonl"
COLUMNS = ("file_name", "style", "identity", "name")
PARTS = ("train", "test")
NEEDED = "pictures need a style and an identity, as in what `latentdiff prepare emoji` makes"


@dataclass(frozen=True)
class Pairs:
    """All N pictures of a data set, those of train/ first, each part sorted by file name.

    pictures: uint8 [N, H, W, 3]. identities, styles: int64 [N], indices into identity_names and style_names, which are
    sorted. held_out: bool [N], True for those of test/. prompts: the caption "<style> style, <name>" of each picture, or
    None where it has no such caption.
    """

    name: str
    pictures: np.ndarray
    identities: Tensor
    styles: Tensor
    held_out: Tensor
    identity_names: list[str]
    style_names: list[str]
    prompts: list[str | None]

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The pictures of these rows [B], float32 [B, 3, H, W] in [-1, 1]."""
        return to_images(self.pictures[np.asarray(rows)])

    def fingerprint(self) -> str:
        """Hex sha256 of pictures, pairs and parts: the same wherever the same data lie."""
        facts = [self.identity_names, self.style_names, list(self.pictures.shape)]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for column in (self.identities, self.styles, self.held_out):
            digest.update(column.numpy().tobytes())
        digest.update(self.pictures.tobytes())
        return digest.hexdigest()


def to_images(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def read_pairs(data: str | Path) -> Pairs:
    """The data set in a folder with train/ and test/, each with metadata.jsonl of file_name, style, identity and name.

    UserError: a folder, file, column or picture is missing, or a picture has another size; the message names it.
    """
    folder = Path(data).expanduser()
    rows, pictures = [], []
    for part in PARTS:
        for row in sorted(_rows(folder, part), key=lambda row: row["file_name"]):
            path = folder / part / row["file_name"]
            try:
                pictures.append(decode(path, 3))
            except DECODING_ERRORS as error:
                raise UserError(f"{path}: cannot be read as an image ({reason_of(path, error)})") from error
            if pictures[-1].shape != pictures[0].shape:
                size = "x".join(map(str, pictures[-1].shape[:2]))
                raise UserError(f"{path}: is {size}, other pictures of the data are not")
            rows.append(row)
    identities, styles = (sorted({row[column] for row in rows}) for column in ("identity", "style"))
    number = {name: k for k, name in enumerate(identities)}
    return Pairs(
        name=str(data),
        pictures=np.stack(pictures),
        identities=torch.tensor([number[row["identity"]] for row in rows]),
        styles=torch.tensor([styles.index(row["style"]) for row in rows]),
        held_out=torch.tensor([row["part"] == "test" for row in rows]),
        identity_names=identities,
        style_names=styles,
        prompts=[row["prompt"] for row in rows],
    )


def _rows(folder: Path, part: str) -> list[dict[str, Any]]:
    """The columns of one part's rows, with the part and the prompt of each."""
    path = folder / part / METADATA
    if not path.is_file():
        raise UserError(f"data '{folder}': has no {part}/{METADATA}; {NEEDED}")
    rows = []
    for line, row in json_rows(path, ", ".join(COLUMNS)):
        missing = [column for column in COLUMNS if not isinstance(row.get(column), str)]
        if missing:
            raise UserError(f"{path} line {line}: has no {missing[0]}; {NEEDED}")
        check_inside(path, line, "file_name", row["file_name"])
        text, prompt = row.get("text") or [], f"{row['style']} style, {row['name']}"
        has_prompt = prompt in (text if isinstance(text, list) else [text])
        rows.append({column: row[column] for column in COLUMNS} | {"part": part, "prompt": prompt if has_prompt else None})
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows
