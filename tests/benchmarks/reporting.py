"""Tables of the benchmarks: one value a round in each cell, and runs of a whole benchmark laid over each other.

Printed is the median of a cell and, where it holds more than one value, their range. Of one run the values are its
rounds'; of several (`--repeat N`, each in a process of its own) the medians of the runs, so that the range is their spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Table:
    """formats: column -> format of a value, as in str.format.  rows: name -> column -> values; a column may be missing.

    about: what else was found, by name: the machine's matrix rate, threads.
    """

    title: str
    formats: dict[str, str]
    rows: dict[str, dict[str, list[float]]]
    about: dict[str, float] = field(default_factory=dict)

    def middle(self, row: str, column: str) -> float | None:
        """The median of a cell; None where there is none."""
        values = self.rows.get(row, {}).get(column)
        return statistics.median(values) if values else None

    def cell(self, row: str, column: str) -> str:
        values, form = self.rows[row].get(column, []), self.formats[column]
        if not values:
            return "–"
        text, low, high = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
        return text if low == high else f"{text} ({low} to {high})"

    def markdown(self) -> str:
        said = ", ".join(
            f"{name} {value:.3g}" if value < 1000 else f"{name} {value:,.0f}" for name, value in self.about.items()
        )
        lines = [f"\n{self.title}{': ' if said else ''}{said}\n", f"| | {' | '.join(self.formats)} |"]
        lines.append("|---" * (len(self.formats) + 1) + "|")
        lines += [f"| {row} | {' | '.join(self.cell(row, column) for column in self.formats)} |" for row in self.rows]
        return "\n".join(lines)


def laid_over(runs: Sequence[list[Table]]) -> list[Table]:
    """The tables of several runs as one: in each cell the medians of the runs that have it."""
    found = []
    for tables in zip(*runs, strict=True):
        first = tables[0]
        rows: dict[str, dict[str, list[float]]] = {}
        for row in first.rows:
            middles = {column: [table.middle(row, column) for table in tables] for column in first.formats}
            rows[row] = {column: [m for m in some if m is not None] for column, some in middles.items()}
        about = {name: statistics.median(table.about[name] for table in tables) for name in first.about}
        found.append(Table(first.title, first.formats, rows, about))
    return found


def as_json(tables: list[Table]) -> str:
    return json.dumps([asdict(table) for table in tables])


def from_json(text: str) -> list[Table]:
    """The tables in the last line of what a benchmark printed: libraries may have printed before it."""
    return [Table(**table) for table in json.loads(text.strip().splitlines()[-1])]


def run_again(script: str, arguments: Sequence[str]) -> list[Table]:
    """The tables of a benchmark's run in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return from_json(done.stdout)


def command(parser: argparse.ArgumentParser, work: Callable[[Any], list[Table]], later: Sequence[str] = ()) -> None:
    """Parse, measure once or --repeat times, print.  later: arguments of all runs but the first, to leave out what is dear."""
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of it all, to see their spread")
    parser.add_argument("--json", action="store_true", help="print the tables for another program")
    arguments = parser.parse_args()
    if arguments.repeat > 1:
        once = [*sys.argv[1:], "--repeat", "1"]
        tables = laid_over([run_again(sys.argv[0], [*once, *(later if k else ())]) for k in range(arguments.repeat)])
    else:
        tables = work(arguments)
    print(as_json(tables) if arguments.json else "\n".join(table.markdown() for table in tables))
