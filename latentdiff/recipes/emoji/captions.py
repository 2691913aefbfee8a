"""Names and captions of emoji: a clean name, other names and tags of each emoji, and captions for each picture.

Everything is in lower case, with straight apostrophes and without quotation marks, as people type it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from latentdiff.data.shuffling import permutation
from latentdiff.utils.random import derive_seed

_PREPOSITIONS = set("of with in on at from without by for behind over to and up down showing facing holding pointing".split())
# Names whose main word is one of these take no "a": uncountable nouns, adjectives, names of persons and places
_NO_ARTICLE = set(
    "bacon badminton bread broccoli butter candy construction dizzy dna fire fog foggy food fruit garlic green hockey ice "
    "lacrosse lightning liquid locked luggage meat oden om polish pong popcorn rice sake salad salt soap spaghetti star-struck "
    "sushi tea tennis thread unlocked voltage wireless wood yarn fuji claus tower statue zzz".split()
)
_NO_ARTICLE_FIRST = set("no people men women skis tokyo".split())
_COUNTED_ING = set("building ring wing king earring".split())
_SINGULAR_S = set("rhinoceros gas iris".split())
_BEINGS = set("person man woman boy girl child baby face cat".split())
# Most names of symbols are not nouns ("prohibited", "multiply"). Those with one of these as their main word are
_SYMBOL_NOUNS = set("sign symbol button mark circle square diamond arrow cross star emblem badge menorah asterisk".split())
_AN, _A = ("hourglass", "hour", "x-ray", "honest"), ("uni", "eu", "ewe", "one", "uti", "use", "u.s.")


@dataclass(frozen=True)
class Words:
    """The words for one emoji. phrase: the name with its article, or the name alone where "a" would be wrong."""

    name: str
    phrase: str
    aliases: list[str]
    tags: list[str]


def words(label: str, tags: Iterable[str], short_names: Iterable[str], group: str) -> Words:
    """The words for one emoji, from emojibase's label, tags and group, and emoji-data's short names."""
    name = clean_name(label)
    tags = [_plain(tag) for tag in tags if not re.fullmatch("[A-Z]{2}", tag)]  # country codes: "in" and "no" are words
    aliases = [alias for short in short_names if group != "components" for alias in _alias(short)]
    if name.startswith("flag of "):
        country = name.removeprefix("flag of ")
        aliases, tags = [f"{country} flag", *aliases], [country, *tags]
    aliases.append(_without_accents(name))
    aliases = [alias for alias in dict.fromkeys(aliases) if len(alias) > 1 and alias != name]
    tags = [tag for tag in dict.fromkeys(tags) if len(tag) > 1 and tag != name]
    return Words(name, _with_article(name, group), aliases, tags)


def captions(words: Words, style: str, seed: int, identity: str) -> list[str]:
    """About ten captions of one picture, a fixed function of the arguments.

    At least half of them name the style, and at least three do not.
    """
    name, phrase = words.name, words.phrase
    tags, other_tags = (_some_tags(words.tags, seed, style, identity, part) for part in ("with name", "alone"))
    texts = [
        *(name, phrase, *words.aliases, f"{name} emoji", f"an emoji of {phrase}"),
        *(f"{name}, {text}" for text in tags),
        *(f"{style} style, {name}", f"{name}, {style} style", f"{style} emoji of {phrase}"),
        *(f"{style} style, {phrase}", f"{phrase} in {style} style"),
        *(f"{style} style, {alias}" for alias in words.aliases),
        *(f"{style} style, {name}, {text}" for text in tags),
        *(f"{style} style, {text}" for text in other_tags),
    ]
    return list(dict.fromkeys(texts))


def clean_name(label: str) -> str:
    """A label as people write it: "flag: Egypt" → "flag of egypt", "man: red hair" → "man with red hair"."""
    in_parentheses = "" if label.startswith("flag") else r", \1"  # Myanmar (Burma); A button (blood type)
    head, _, rest = _plain(re.sub(r"\s*\(([^)]*)\)", in_parentheses, label)).partition(": ")
    parts = rest.split(", ")
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    if not rest:
        return head
    if head in ("flag", "family", "kiss"):
        return f"{head} of {listed}"
    if rest == "bald":
        return f"bald {head}"
    if head == "keycap" or rest.startswith("facing "):
        return f"{head} {rest}"
    return f"{head}, {listed}" if len(parts) > 1 else f"{head} with {rest}"


def _plain(text: str) -> str:
    text = text.lower().replace("’", "'").replace("–", "-").replace("&", "and").replace(" - ", " ").replace("_", " ")
    return " ".join(re.sub("[“”!]", "", text).split())


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _alias(short: str) -> list[str]:
    """A short name as words: dog2 → dog, flag-eg → flag eg; none for code points (u7121) and clock130."""
    if re.fullmatch(r"u[0-9a-f]{4}|clock\d+", short):
        return []
    if not re.search("[a-z]", short):  # +1, -1, 100
        return [short]
    return [re.sub(r"(?<=[a-z])\s*\d+$", "", " ".join(re.split("[-_ ]+", short.lower())))]


def _with_article(name: str, group: str) -> str:
    if name.startswith("flag of "):
        return f"the {name}"
    tokens = name.replace(",", "").split()
    stop = next((i for i, token in enumerate(tokens) if i and token in _PREPOSITIONS), len(tokens))
    head = tokens[stop - 1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in _SINGULAR_S
    gerund = head.endswith("ing") and head not in _COUNTED_ING and tokens[0] not in _BEINGS
    bare = group == "symbols" and (head not in _SYMBOL_NOUNS or len(tokens[0]) < 4)  # "ok button" is spoken by letters
    hour = "o'clock" in name or name.endswith("-thirty")
    if plural or gerund or bare or hour or head in _NO_ARTICLE or tokens[0] in _NO_ARTICLE_FIRST or not name[0].isalpha():
        return name
    an = name.startswith(_AN) or (name[0] in "aeiou" and not name.startswith(_A))
    return f"{'an' if an else 'a'} {name}"


def _some_tags(tags: list[str], seed: int, *parts: str) -> list[str]:
    """One to three of the tags in a random order, as one string in a list; [] without tags."""
    if not tags:
        return []
    count = 1 + derive_seed(seed, "tag count", *parts) % 3
    return [", ".join(tags[i] for i in permutation(len(tags), seed, "tags", *parts)[:count].tolist())]
