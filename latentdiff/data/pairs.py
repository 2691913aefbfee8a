"""Pictures of the same things in several styles: every picture is a pair (style, identity), as `prepare emoji` writes them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.image_files import DECODING_ERRORS, decode, leaves, one_line, reason_of
from latentdiff.errors import UserError

METADATA = "metadata.jsonl"
COLUMNS = ("file_name", "style", "identity", "name")
PARTS = ("train", "test")
NEEDED = "pictures need a style and an identity, as in what `latentdiff prepare emoji` makes"


@dataclass(frozen=True)
class Pairs:
    """All N pictures of a data set, those of train/ first, each part sorted by file name.

    pictures: uint8 [N, H, W, 3]. identities, styles: int64 [N], indices into identity_names and style_names, both
    sorted. held_out: bool [N], of test/. prompts: the caption "<style> style, <name>" of each, or None without one.
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
        """float32 [B, 3, H, W] in [-1, 1]."""
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

    Raises:
        UserError: a folder, file, column or picture is missing or not of the others' size; the message names it.
    """
    folder = Path(data).expanduser()
    rows, pictures = [], []
    for part in PARTS:
        for row in sorted(_rows(folder, part), key=lambda row: row["file_name"]):
            rows.append({**row, "held_out": part == "test"})
            pictures.append(_picture(folder / part / row["file_name"]))
            if pictures[-1].shape != pictures[0].shape:
                said = "x".join(map(str, pictures[-1].shape[:2]))
                raise UserError(f"{folder / part / row['file_name']}: is {said}, other pictures of the data are not")
    identities, styles = (sorted({row[column] for row in rows}) for column in ("identity", "style"))
    number = {name: k for k, name in enumerate(identities)}
    return Pairs(
        name=str(data),
        pictures=np.stack(pictures),
        identities=torch.tensor([number[row["identity"]] for row in rows]),
        styles=torch.tensor([styles.index(row["style"]) for row in rows]),
        held_out=torch.tensor([row["held_out"] for row in rows]),
        identity_names=identities,
        style_names=styles,
        prompts=[row["prompt"] for row in rows],
    )


def _rows(folder: Path, part: str) -> list[dict[str, Any]]:
    """The columns of one part's rows, and the prompt of each."""
    path = folder / part / METADATA
    if not path.is_file():
        raise UserError(f"data '{folder}': has no {part}/{METADATA}; {NEEDED}")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({one_line(error)})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: not JSON ({one_line(error)})") from error
        missing = [column for column in COLUMNS if not isinstance(row, dict) or not isinstance(row.get(column), str)]
        if missing:
            raise UserError(f"{path} line {number}: has no {missing[0]}; {NEEDED}")
        if leaves(path.parent, row["file_name"]):
            shown = repr(row["file_name"][:200])
            raise UserError(f"{path} line {number}: file_name {shown} is not inside {path.parent}; copy it there")
        text = row.get("text") or []
        wanted = f"{row['style']} style, {row['name']}"
        known = wanted in (text if isinstance(text, list) else [text])
        rows.append({**{column: row[column] for column in COLUMNS}, "prompt": wanted if known else None})
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _picture(path: Path) -> np.ndarray:
    try:
        return decode(path, 3)
    except DECODING_ERRORS as error:
        raise UserError(f"{path}: cannot be read as an image ({reason_of(path, error)})") from error
