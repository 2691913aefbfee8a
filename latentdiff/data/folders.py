"""Folders of image files: which images a folder has, with their classes and captions, and what else lies in it.

Three forms: metadata.jsonl or metadata.csv names the images; or each sub-folder is a class; or all images are in one
folder. In the last two an image's caption may lie beside it, as a.png and a.txt. Every file is accounted for: what is not
used goes into the report.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latentdiff.data.file_report import FileReport, listed
from latentdiff.data.image_files import DECODING_ERRORS, decode, examine, hash_ends, image_suffixes, one_line, why_not_read
from latentdiff.data.image_source import (
    TEXT_COLUMNS,
    Annotations,
    Columns,
    EncodedImages,
    Reading,
    captions_of,
    class_names_of,
    in_threads,
    numbered,
)
from latentdiff.data.metadata import METADATA, Row, read_metadata, read_text
from latentdiff.errors import UserError

CAPTION_SUFFIXES = (".txt", ".caption")  # the first that lies beside an image is read
LONGEST_CAPTION = 1 << 16  # bytes of a caption's file
NO_CAPTION = ("",)  # of an image without one, where others have some: the empty prompt
SYSTEM_NAMES = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
    "icon\r",
}
HIDDEN = "hidden, or left by a system or an editor"
PART_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclass
class Listing:
    """The images of a folder: files relative to it, sorted; the class name and the captions of each, or None.

    unlabelled: why a folder that has sub-folders has no classes, for the message of whoever needs them.
    captions_ignored_before: whether earlier versions read the same images without these captions, which lie beside them or
    in a column other than text. pairs: the file of the picture paired with each image, or None.
    """

    files: list[str]
    labels: list[str] | None
    captions: list[tuple[str, ...]] | None
    report: FileReport = field(default_factory=FileReport)
    unlabelled: str | None = None
    captions_ignored_before: bool = False
    pairs: list[str] | None = None


class FolderSource(EncodedImages):
    """Image files below one folder, `root`."""

    def __init__(self, name: str, root: Path, listing: Listing, annotations: Annotations, reading: Reading):
        examined = in_threads(lambda file: examine(root / file), listing.files)
        super().__init__(name, f"{root}/", listing.files, [header for header, _ in examined], annotations, reading)
        self._captions_ignored_before = listing.captions_ignored_before
        self.root, self.report, self.unlabelled = root, listing.report, listing.unlabelled
        if listing.pairs is not None:
            self.pairs = [listing.pairs[i] for i in self.rows]
            self.pair_sizes = self._sizes_of_pairs()
        for file, (_, several) in zip(listing.files, examined, strict=True):
            if several:
                self.report.remark("has several frames or pages, of which the first is used", file)

    def open(self, i: int) -> Path:
        return self.root / self.files[i]

    def _sizes_of_pairs(self) -> np.ndarray:
        """Height and width of the paired pictures, int64 [N, 2]. UserError for one that cannot be read as a picture."""
        headers = in_threads(lambda file: examine(self.root / file)[0], self.pairs or [])
        for file, pair, header in zip(self.files, self.pairs or [], headers, strict=True):
            if isinstance(header, str):
                raise UserError(f"{self.root / pair}: the picture paired with {file} cannot be read ({header})")
        return np.array([header[1] for header in headers], dtype=np.int64).reshape(-1, 2)

    def read_pair(self, i: int) -> np.ndarray:
        if self.pairs is None:
            return super().read_pair(i)
        try:
            return decode(self.root / self.pairs[i], self.channels, self.background)
        except DECODING_ERRORS as error:
            where = self.root / self.pairs[i]
            raise UserError(f"{where}: the picture paired with {self.files[i]} cannot be read ({one_line(error)})") from error

    def pairs_fingerprint(self) -> str:
        if self.pairs is None:
            return super().pairs_fingerprint()
        ends = in_threads(lambda file: hash_ends(self.root / file), self.pairs)
        return hashlib.sha256(json.dumps([self.pairs, ends]).encode()).hexdigest()

    def latents_fingerprint(self) -> str:
        """Without captions of a kind that earlier versions did not read: their caches of the same images stay valid."""
        return self._digest(None if self._captions_ignored_before else self.captions)


def open_folder(data: str, split: str, columns: Columns, reading: Reading) -> FolderSource:
    """The images of a folder; with train/ and test/ inside it, those of one split, and the classes are those of train/.

    UserError: there is no such folder or split, it has no images, or its metadata cannot be read.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        others = "fashion-mnist, .parquet files, a Hub name owner/name, or .tar shards"
        raise UserError(f"data '{data}': no such folder, and none of {others}")
    parts = folder_splits(folder)
    if split not in parts:
        raise UserError(f"data '{data}' has no test/ folder: add one, or hold a share of its images out")
    root = folder / split if len(parts) == 2 else folder
    listing = list_folder(root, columns)
    if len(parts) == 2 and split == "train":
        for entry in sorted(folder.iterdir()):
            if entry.name not in parts:
                reason = HIDDEN if _is_hidden(entry.name) else "lies beside train/ and test/"
                listing.report.leave_out(reason, entry.name + ("/" if entry.is_dir() else ""))
    labels_of_train = listing.labels
    if split == "test":
        labels_of_train = list_folder(folder / "train", columns, with_captions=False).labels
    class_names = class_names_of(labels_of_train)
    annotations = Annotations(numbered(listing.labels, class_names, str(root)), class_names, listing.captions)
    return FolderSource(data, root, listing, annotations, reading)


def folder_splits(folder: Path) -> tuple[str, ...]:
    """("train", "test") where a folder has sub-folders of both names, else ("train",)."""
    return ("train", "test") if (folder / "train").is_dir() and (folder / "test").is_dir() else ("train",)


def list_folder(root: Path, columns: Columns, with_captions: bool = True) -> Listing:
    """The images of a folder in whichever form it has.

    columns: names of metadata columns other than the usual ones. with_captions: whether caption files are read.
    UserError: no images, or metadata that cannot be read; the message names the file and line.
    """
    metadata = [name for name in METADATA if (root / name).is_file()]
    if metadata:
        return _list_by_metadata(root, metadata, columns)
    if columns != Columns():
        raise UserError(
            f"{root}: image_column, label_column, text_column and pair_column name columns, and this folder has neither "
            "metadata.jsonl nor metadata.csv; leave them out"
        )
    contents = _Contents(root)
    if not contents.images:
        left_out = contents.report.left_out
        why = "; ".join(f"{reason}: {listed(names.first)}" for reason, names in left_out.items())
        usual = ".png, .jpg, .webp and other suffixes that Pillow reads"
        more = f"; it has files with {why}" if why else ""
        raise UserError(f"{root} has no images ({usual}), in it or in class sub-folders{more}")
    return _list_by_folders(root, contents, with_captions)


class _Contents:
    """What lies below a folder, sorted by name, at any depth.

    Attributes: images and texts (names relative to the folder), folders (the sub-folders directly in it), report (what is
    neither). named: files that metadata names, which are images whatever their suffix.

    Links to folders are followed directly in the folder, where classes are, and no deeper.
    """

    def __init__(self, root: Path, named: frozenset[str] = frozenset()):
        self.images: list[str] = []
        self.texts: list[str] = []
        self.folders: list[str] = []
        self.report = FileReport()
        self._root, self._named = root, named
        self._add_folder("")

    def _add_folder(self, inside: str) -> None:
        """inside: the folder's name relative to the root, with a slash at its end; empty for the root itself."""
        try:
            with os.scandir(self._root / inside) as unsorted:  # knows folders from files without a look at each
                entries = sorted(unsorted, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise UserError(f"{self._root}: cannot be listed ({error.strerror})") from error
            self.report.leave_out(f"folder that cannot be listed ({error.strerror})", inside)
            return
        for entry in entries:
            self._add(entry, inside)

    def _add(self, entry: os.DirEntry[str], inside: str) -> None:
        name, suffix = inside + entry.name, os.path.splitext(entry.name)[1].lower()
        directory = entry.is_dir()
        if name in self._named:
            self.images.append(name)
        elif _is_hidden(entry.name) or (directory and not inside and entry.name.startswith("__")):
            self.report.leave_out(HIDDEN, name + ("/" if directory else ""))
        elif directory and entry.is_symlink() and inside:
            self.report.leave_out("link to a folder, not followed", f"{name}/")
        elif directory:
            if not inside:
                self.folders.append(entry.name)
            self._add_folder(f"{name}/")
        elif not entry.is_file():
            self.report.leave_out("broken link, or not a file", name)
        elif suffix in image_suffixes():
            self.images.append(name)
        elif suffix in CAPTION_SUFFIXES:
            self.texts.append(name)
        elif inside or entry.name not in METADATA:
            self.report.leave_out(why_not_read(suffix), name)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def _list_by_folders(root: Path, contents: _Contents, with_captions: bool) -> Listing:
    """Classes by sub-folder, or none where images also lie beside the sub-folders; captions from files beside the images."""
    report, files = contents.report, sorted(contents.images)
    flat = [name for name in contents.images if "/" not in name]
    classes = {name.partition("/")[0] for name in files if "/" in name}
    for folder in contents.folders:
        if folder not in classes:
            report.leave_out("folder without images", f"{folder}/")
    labels, unlabelled = None, None
    if not flat:
        labels = [name.partition("/")[0] for name in files]
        # Sub-folders that look like the parts of a data set are classes, unless they are train/ and test/
        for folder in contents.folders if len(classes) <= 3 else ():
            if folder in classes and folder.lower() in PART_NAMES:
                report.remark("read as a class; for a part of the data, name the folders train/ and test/", f"{folder}/")
    elif len(flat) < len(files):
        where = f"{len(flat)} images lie beside its sub-folders ({listed(flat)})"
        unlabelled = f"{where}, so it has no classes; move each into a class folder"
        for name in flat:
            report.remark("used without classes, because images lie beside the sub-folders", name)
    captions = _captions_beside(root, files, contents) if with_captions else None
    return Listing(files, labels, captions, report, unlabelled, captions_ignored_before=True)


def _captions_beside(root: Path, files: list[str], contents: _Contents) -> list[tuple[str, ...]] | None:
    """The captions of the files, NO_CAPTION for those without, or None where none has one."""
    texts: dict[str, dict[str, str]] = {}  # {name without suffix: {suffix: name}}
    for name in contents.texts:
        stem, suffix = os.path.splitext(name)
        texts.setdefault(stem, {}).setdefault(suffix.lower(), name)
    first = {stem: next(names[suffix] for suffix in CAPTION_SUFFIXES if suffix in names) for stem, names in texts.items()}
    chosen = [first.get(os.path.splitext(file)[0]) for file in files]
    used = set(chosen)
    for name in contents.texts:
        if name not in used:
            stem, suffix = os.path.splitext(name)
            instead = first[stem] in used and suffix.lower() != CAPTION_SUFFIXES[0] and CAPTION_SUFFIXES[0] in texts[stem]
            reason = f"{CAPTION_SUFFIXES[0]} beside it is read instead" if instead else "text beside no image"
            contents.report.leave_out(reason, name)
    captions = in_threads(lambda name: None if name is None else _read_caption(root / name), chosen)
    if not any(captions):
        return None
    for file, caption in zip(files, captions, strict=True):
        if caption is None:
            contents.report.remark("no caption, used with an empty one", file)
    return [caption or NO_CAPTION for caption in captions]


def _read_caption(path: Path) -> tuple[str, ...] | None:
    """The whole text as one caption, its lines joined; None where there is none."""
    if path.stat().st_size > LONGEST_CAPTION:
        raise UserError(f"{path}: has more than {LONGEST_CAPTION} bytes, too many for a caption; shorten or move it")
    return captions_of(" ".join(read_text(path).split()), str(path))


def _list_by_metadata(root: Path, metadata: list[str], columns: Columns) -> Listing:
    """The images that the first of the metadata files names. metadata: those that the folder has."""
    report = FileReport()
    rows, text = read_metadata(root / metadata[0], columns, report)
    named = [file for row in rows for file in (row.file, row.pair) if file]
    contents = _Contents(root, frozenset(map(os.path.normpath, named)))
    contents.report.remarks |= report.remarks
    for name in metadata[1:]:
        contents.report.leave_out(f"{metadata[0]} is read instead", name)
    _resolve(root, rows, contents.images)
    rows.sort(key=lambda row: row.file)
    files = [row.file for row in rows]
    for file in sorted({file for file, other in zip(files, files[1:], strict=False) if file == other}):
        contents.report.remark(f"listed more than once in {metadata[0]}, and counted as often", file)
    used = {os.path.normpath(file) for file in files} | {os.path.normpath(row.pair) for row in rows if row.pair}
    for file in contents.images:
        if file not in used:
            contents.report.leave_out(f"not listed in {metadata[0]}", file)
    for file in contents.texts:
        contents.report.leave_out(f"{metadata[0]} is read instead", file)
    labels = [row.label for row in rows if row.label is not None]
    captions = [row.captions for row in rows if row.captions is not None]
    ignored = text != TEXT_COLUMNS[0]
    pairs = [row.pair for row in rows if row.pair is not None]
    return Listing(files, labels or None, captions or None, contents.report, None, ignored, pairs or None)


def _resolve(root: Path, rows: list[Row], images: list[str]) -> None:
    """Give rows the names that their files have on disk: macOS may spell one name in other code points, Windows by \\."""
    on_disk = set(images)
    normal = {unicodedata.normalize("NFC", name): name for name in images}
    for row in rows:
        if row.file in on_disk or os.path.lexists(root / row.file):
            continue
        spelling = unicodedata.normalize("NFC", row.file.replace("\\", "/").removeprefix("./"))
        row.file = normal.get(spelling, row.file)
