"""Which images a folder has, with their classes and captions, and what else lies in it.

Three forms: metadata.jsonl or metadata.csv names the images; or each sub-folder is a class; or all images are in one
folder. In the last two an image's caption may lie beside it, as a.png and a.txt. No file is passed over in silence: what
is not used goes into the report.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from latentdiff.data.file_report import FileReport, listed
from latentdiff.data.image_files import image_suffixes, why_not_read
from latentdiff.data.image_source import TEXT_COLUMNS, Columns, captions_of, in_threads
from latentdiff.data.metadata import METADATA, Row, read_metadata, read_text
from latentdiff.errors import UserError

Captions = list[tuple[str, ...]]
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
EMPTY = "folder without images"


@dataclass
class Listing:
    """The images of a folder: files relative to it, sorted; the class name and the captions of each, or None.

    unlabelled: why a folder that has sub-folders has no classes, for the message of whoever needs them.
    captions_ignored_before: whether earlier versions read the same images without these captions, which lie beside them or
    in a column other than text.
    """

    files: list[str]
    labels: list[str] | None
    captions: Captions | None
    report: FileReport = field(default_factory=FileReport)
    unlabelled: str | None = None
    captions_ignored_before: bool = False


@dataclass
class _Below:
    """What lies below a folder: images and texts by their names relative to it, and its own sub-folders."""

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    report: FileReport = field(default_factory=FileReport)


def list_folder(root: Path, columns: Columns, with_captions: bool = True) -> Listing:
    """The images of a folder in whichever form it has.

    columns: names of metadata columns other than the usual ones. with_captions: whether caption files are read.
    UserError: no images, or metadata that cannot be read; the message names the file and line.
    """
    metadata = [name for name in METADATA if (root / name).is_file()]
    if metadata:
        return _from_metadata(root, metadata, columns)
    if columns != Columns():
        raise UserError(
            f"{root}: image_column, label_column and text_column name columns, and this folder has neither metadata.jsonl nor "
            "metadata.csv; leave them out"
        )
    below = _walk(root)
    if not below.images:
        raise UserError(_no_images(root, below))
    return _from_tree(root, below, with_captions)


def report_beside(root: Path, parts: tuple[str, ...]) -> FileReport:
    """What lies beside the folders of a data set's parts, which no part reads."""
    report = FileReport()
    for entry in sorted(root.iterdir()):
        if entry.name not in parts:
            name = entry.name + ("/" if entry.is_dir() else "")
            report.leave_out(HIDDEN if _is_hidden(entry.name) else f"lies beside {' and '.join(f'{p}/' for p in parts)}", name)
    return report


def _walk(root: Path, named: frozenset[str] = frozenset()) -> _Below:
    """Every file below root, sorted by name. Links to folders are followed directly in root, where classes are, and no deeper.

    named: files that metadata names, which are images whatever their suffix.
    """
    below = _Below()

    def visit(folder: Path, inside: str) -> None:
        try:
            with os.scandir(folder) as found:  # tells folders from files without a look at each
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise UserError(f"{root}: cannot be listed ({error.strerror})") from error
            below.report.leave_out(f"folder that cannot be listed ({error.strerror})", inside)
            return
        for entry in entries:
            _sort_in(entry, inside, below, named, visit)

    visit(root, "")
    return below


def _sort_in(
    entry: os.DirEntry[str], inside: str, below: _Below, named: frozenset[str], visit: Callable[[Path, str], None]
) -> None:
    name, suffix = inside + entry.name, os.path.splitext(entry.name)[1].lower()
    directory = entry.is_dir()
    if name in named:
        below.images.append(name)
    elif _is_hidden(entry.name) or (directory and not inside and entry.name.startswith("__")):
        below.report.leave_out(HIDDEN, name + ("/" if directory else ""))
    elif directory and entry.is_symlink() and inside:
        below.report.leave_out("link to a folder, not followed", f"{name}/")
    elif directory:
        if not inside:
            below.folders.append(entry.name)
        visit(Path(entry.path), f"{name}/")
    elif not entry.is_file():
        below.report.leave_out("broken link, or not a file", name)
    elif suffix in image_suffixes():
        below.images.append(name)
    elif suffix in CAPTION_SUFFIXES:
        below.texts.append(name)
    elif inside or entry.name not in METADATA:
        below.report.leave_out(why_not_read(suffix), name)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def _no_images(root: Path, below: _Below) -> str:
    why = "; ".join(f"{reason}: {listed(names.first)}" for reason, names in below.report.left_out.items())
    usual = ".png, .jpg, .webp and other suffixes that Pillow reads"
    return f"{root} has no images ({usual}), in it or in class sub-folders" + (f"; it has files with {why}" if why else "")


def _from_tree(root: Path, below: _Below, with_captions: bool) -> Listing:
    """Classes by sub-folder, or none where images also lie beside the sub-folders; captions from files beside the images."""
    report = below.report
    flat = [name for name in below.images if "/" not in name]
    nested = {folder: 0 for folder in below.folders}
    for name in below.images:
        if "/" in name:
            nested[name.partition("/")[0]] += 1
    for folder, count in nested.items():
        if not count:
            report.leave_out(EMPTY, f"{folder}/")
    unlabelled = None
    if flat and len(flat) < len(below.images):
        where = f"{len(flat)} images lie beside its sub-folders ({listed(flat)})"
        unlabelled = f"{where}, so it has no classes; move each into a class folder"
        for name in flat:
            report.remark("used without classes, because images lie beside the sub-folders", name)
    labelled = not flat
    files = sorted(below.images)
    _note_parts(report, [folder for folder, count in nested.items() if count] if labelled else [])
    captions = _captions_beside(root, files, below) if with_captions else None
    labels = [name.partition("/")[0] for name in files] if labelled else None
    return Listing(files, labels, captions, report, unlabelled, captions_ignored_before=True)


def _note_parts(report: FileReport, classes: list[str]) -> None:
    """Sub-folders that look like the parts of a data set are classes unless they are train/ and test/."""
    parts = [name for name in classes if name.lower() in ("train", "training", "val", "valid", "validation", "test", "testing")]
    if parts and len(classes) <= 3:
        for name in parts:
            report.remark("read as a class; for a part of the data, name the folders train/ and test/", f"{name}/")


def _captions_beside(root: Path, files: list[str], below: _Below) -> Captions | None:
    """The captions of the files, NO_CAPTION for those without, or None where none has one."""
    if not below.texts:
        return None
    texts: dict[tuple[str, str], str] = {}
    for name in below.texts:
        texts.setdefault(_stem_and_suffix(name), name)
    beside: list[str | None] = []
    for file in files:
        stem, _ = _stem_and_suffix(file)
        beside.append(next((texts[stem, suffix] for suffix in CAPTION_SUFFIXES if (stem, suffix) in texts), None))
    used = set(beside)
    for name in below.texts:
        if name not in used:
            stem, suffix = _stem_and_suffix(name)
            other = suffix != CAPTION_SUFFIXES[0] and texts.get((stem, CAPTION_SUFFIXES[0])) in used
            reason = f"{CAPTION_SUFFIXES[0]} beside it is read instead" if other else "text beside no image"
            below.report.leave_out(reason, name)
    captions = in_threads(lambda name: None if name is None else _read_caption(root / name), beside)
    if not any(captions):
        return None
    for file, caption in zip(files, captions, strict=True):
        if caption is None:
            below.report.remark("no caption, used with an empty one", file)
    return [caption or NO_CAPTION for caption in captions]


def _stem_and_suffix(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def _read_caption(path: Path) -> tuple[str, ...] | None:
    """The whole text as one caption, its lines joined; None where there is none."""
    if path.stat().st_size > LONGEST_CAPTION:
        raise UserError(f"{path}: has more than {LONGEST_CAPTION} bytes, too many for a caption; shorten or move it")
    return captions_of(" ".join(read_text(path).split()), str(path))


def _from_metadata(root: Path, metadata: list[str], columns: Columns) -> Listing:
    report = FileReport()
    rows, text = read_metadata(root / metadata[0], columns, report)
    below = _walk(root, frozenset(os.path.normpath(row.file) for row in rows))
    below.report.remarks |= report.remarks
    for name in metadata[1:]:
        below.report.leave_out(f"{metadata[0]} is read instead", name)
    _resolve(root, rows, below.images)
    rows.sort(key=lambda row: row.file)
    files = [row.file for row in rows]
    for file in sorted({file for file, other in zip(files, files[1:], strict=False) if file == other}):
        below.report.remark(f"listed more than once in {metadata[0]}, and counted as often", file)
    used = {os.path.normpath(file) for file in files}
    for file in below.images:
        if file not in used:
            below.report.leave_out(f"not listed in {metadata[0]}", file)
    for file in below.texts:
        below.report.leave_out(f"{metadata[0]} is read instead", file)
    labels = [row.label for row in rows if row.label is not None]
    captions = [row.captions for row in rows if row.captions is not None]
    return Listing(files, labels or None, captions or None, below.report, captions_ignored_before=text != TEXT_COLUMNS[0])


def _resolve(root: Path, rows: list[Row], images: list[str]) -> None:
    """Give rows the names that their files have on disk: macOS may spell one name in other code points, Windows by \\."""
    there = set(images)
    normal = {unicodedata.normalize("NFC", name): name for name in images}
    for row in rows:
        if row.file in there or os.path.lexists(root / row.file):
            continue
        spelt = unicodedata.normalize("NFC", row.file.replace("\\", "/").removeprefix("./"))
        row.file = normal.get(spelt, row.file)
