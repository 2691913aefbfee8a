"""How the values of a report, a record or a card are written: as text, and as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"  # stands for a value that was not measured


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table. Every cell is written by str(); a "|" or a line break in it cannot end the cell."""

    def line(cells: Sequence[Any]) -> str:
        texts = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
        return "".join(f"| {text} " if text else "| " for text in texts) + "|"

    return [line(header), "|---" * len(header) + "|", *map(line, rows)]


def format_value(entry: Mapping[str, Any], side: str = "value") -> str:
    """One number of an entry with its error, "0.1234 ± 0.0005", or NONE.

    The error is the standard error, else the spread over seeds, else the spread over subsets, whichever is known.

    Args:
        entry: {"value", "floor", ..., "stderr", "floor_stderr", ...}.
        side: which number: value, floor, real, reconstruction.
    """
    value = entry.get(side)
    if value is None:
        return NONE
    prefix = "" if side == "value" else f"{side}_"
    errors = (entry.get(f"{prefix}{key}") for key in ("stderr", "seed_spread", "spread"))
    error = next((error for error in errors if error is not None), None)
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def value_cells(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The cells of a record's value: samples, real images, reconstructions, number of images."""
    return (
        format_value(entry),
        format_value(entry, "floor"),
        format_value(entry, "reconstruction"),
        str(entry.get("images", NONE)),
    )


def format_setting(value: Any) -> str:
    """A setting as text: "not stated" for None, "key value, key value" for a mapping."""
    if value is None:
        return "not stated"
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
