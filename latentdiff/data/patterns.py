"""FileNames of many files at once: shards-{000..127}.tar, {train,extra}-0.parquet."""

import re

from latentdiff.errors import UserError

MOST = 1_000_000  # a slip of the finger in a range must not fill the memory


def expand(pattern: str) -> list[str]:
    """The names that a pattern's braces stand for, in order: {a,b} and {000..127}, any number of them, not nested.

    A range keeps the width of its first number. A UserError for braces that are neither.
    """
    names = [""]
    for part in re.split(r"(\{[^{}]*\})", pattern):
        choices = _choices(part[1:-1], pattern) if part.startswith("{") and part.endswith("}") else [part]
        if len(names) * len(choices) > MOST:
            raise UserError(f"data '{pattern}': stands for more than {MOST} files")
        names = [name + choice for name in names for choice in choices]
    return list(dict.fromkeys(names))


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first) or int(last) - int(first) >= MOST:
            raise UserError(f"data '{pattern}': {{{inside}}} must run upwards, over {MOST} numbers at most")
        return [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
    if "," not in inside:
        raise UserError(f"data '{pattern}': {{{inside}}} is neither a range as {{000..127}} nor a choice as {{a,b}}")
    return inside.split(",")
