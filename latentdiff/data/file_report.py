"""The report on a data set's files: which were left out and why, and which were used with a remark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from latentdiff.errors import printable

LISTED = 100  # names kept for one reason; the others are only counted
SHOWN = 3  # names in a line on stderr
REASONS = 12  # lines on stderr


@dataclass
class FileNames:
    """How many files have one reason, and the first of their names."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(printable(name))

    def short(self) -> str:
        """The count with a few names, for a line of text."""
        rest = ", …" if self.count > SHOWN else ""
        return f"{self.count} ({', '.join(self.first[:SHOWN])}{rest})"

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "names": list(self.first)}


@dataclass
class FileReport:
    """The files of one data set that were not used, or were used in a way that one may not expect.

    left_out: {reason: files that are not used}. remarks: {remark: files that are used}. Names are relative to the
    data set's folder; a folder's name ends in a slash.
    """

    left_out: dict[str, FileNames] = field(default_factory=dict)
    remarks: dict[str, FileNames] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, FileNames()).add(name)

    def remark(self, what: str, name: str) -> None:
        self.remarks.setdefault(what, FileNames()).add(name)

    def with_unreadable(self, bad: dict[str, str]) -> FileReport:
        """This report with the images that could not be read added. bad: {file: reason}, as a source's `bad`."""
        left_out = dict(self.left_out)
        if bad:
            names = FileNames()
            for file, reason in bad.items():
                names.add(f"{file}: {reason}")
            left_out["cannot be read as an image"] = names
        return FileReport(left_out, self.remarks)

    def lines(self) -> list[str]:
        """One short line for each reason; of more than REASONS, those with the most files and a count of the others."""
        shown = _most(self.left_out, REASONS)
        texts = [f"not used, {reason}: {names.short()}" for reason, names in shown.items()]
        others = [names.count for reason, names in self.left_out.items() if reason not in shown]
        if others:
            texts.append(f"not used, for {len(others)} other reasons: {sum(others)} (latentdiff info DATA names more)")
        return texts + [f"{what}: {names.short()}" for what, names in _most(self.remarks, REASONS).items()]

    def as_json(self) -> dict[str, Any]:
        """{"left_out": {reason: {"count", "names"}}, "remarks": likewise}, of LISTED reasons and names each at most."""
        return {
            "left_out": {reason: names.as_json() for reason, names in _most(self.left_out, LISTED).items()},
            "remarks": {what: names.as_json() for what, names in _most(self.remarks, LISTED).items()},
        }


def _most(groups: dict[str, FileNames], limit: int) -> dict[str, FileNames]:
    """The groups in their order; the largest `limit` of them where there are more."""
    if len(groups) <= limit:
        return groups
    kept = sorted(groups, key=lambda reason: -groups[reason].count)[:limit]
    return {reason: names for reason, names in groups.items() if reason in kept}


def listed(names: Iterable[str], limit: int = SHOWN) -> str:
    """The first `limit` names, separated by commas, for a line of text. An ellipsis at the end stands for more of them."""
    names = list(names)
    return ", ".join(map(printable, names[:limit])) + (", …" if len(names) > limit else "")
