"""The tab Measure: records of evaluations side by side, and the cards of models with their pictures.

A card is Markdown that somebody else may have written. It is rendered here, without any HTML of its own, and with no picture
but those that lie in the model's folder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from latentdiff.errors import UserError
from latentdiff.web import reading
from latentdiff.web.runs import LIST_PERIOD, LOOKS, STYLE

if TYPE_CHECKING:
    from latentdiff.web.context import Context

RECORD, CARD, INDEX = "metrics.json", "README.md", "model_index.json"
MOST_LISTED = 200  # records and cards
MOST_COMPARED = 8
MOST_RECORD = 2**23  # bytes of a record
MOST_CARD = 50_000  # letters of a card that are shown
MOST_PICTURES = 16  # of a card
WIDEST = 1024  # pixels of a picture
LINKS = ("https://", "http://", "mailto:")  # what a link of a card may begin with


class Place(NamedTuple):
    """A file in a folder that is shown: the folder, from which no link may lead away, and the file."""

    root: Path
    path: Path


class Listed:
    """The records and model cards that are shown, by name. The folders are looked through every few seconds at most.

    Args:
        models: {name: folder of a checkpoint}.
        root: the folder of runs; None for none.
    """

    def __init__(self, models: dict[str, Path], root: Path | None):
        self.models, self.root = models, root
        self._guard = threading.Lock()
        self._looked = -LIST_PERIOD
        self._records: dict[str, Place] = {}
        self._cards: dict[str, Place] = {}

    def records(self) -> dict[str, Place]:
        """{name: metrics.json}."""
        self._look()
        return self._records

    def cards(self) -> dict[str, Place]:
        """{name: README.md} of the models of the server, and of those in the folder of runs."""
        self._look()
        return self._cards

    def _look(self) -> None:
        with self._guard:
            if time.monotonic() - self._looked < LIST_PERIOD:
                return
            records: dict[str, Place] = {}
            cards = {name: Place(folder, folder / CARD) for name, folder in self.models.items()}
            for folder, files in reading.folders_below(self.root) if self.root is not None else ():
                if len(records) + len(cards) >= MOST_LISTED:
                    break
                name = reading.shown_name(self.root, folder)
                if RECORD in files:
                    records[name] = Place(self.root, folder / RECORD)
                if {CARD, INDEX} <= files:
                    cards.setdefault(name, Place(self.root, folder / CARD))
            self._records, self._cards, self._looked = records, cards, time.monotonic()


def _chosen(kind: str, name: Any, places: dict[str, Place]) -> Place:
    if not isinstance(name, str) or name not in places:
        raise UserError(f"{kind} {str(name)[:60]!r}: there is none of this name")
    return places[name]


# Records


def compare(names: Sequence[str], places: dict[str, Place], clean: Callable[[str], str]) -> str:
    """Records as Markdown: one by itself with its protocol, several side by side.

    Args:
        names: which.
        places: all there are.
        clean: takes paths of the server out of a text.

    Raises:
        UserError: no record, or more than MOST_COMPARED; an unknown or damaged one; records of unlike protocols.
    """
    from latentdiff.evaluation import model_card
    from latentdiff.evaluation.records import comparison_table, parse_record

    names = list(dict.fromkeys(names))
    if not 1 <= len(names) <= MOST_COMPARED:
        raise UserError(f"records: {len(names)} are chosen; choose 1 to {MOST_COMPARED}")
    records = []
    for name in names:
        place = _chosen("record", name, places)
        try:
            with reading.open_inside(*place, MOST_RECORD) as file:
                record = parse_record(file.read(), name)
        except OSError:
            raise UserError(f"{name}: its {RECORD} cannot be read") from None
        records.append(reading.bounded(record, clean))
    try:
        return model_card.section(records[0]) if len(records) == 1 else comparison_table(names, records)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{', '.join(names)}: not what latentdiff evaluate writes, so it cannot be shown") from None


# Cards


def card(name: str, places: dict[str, Place], clean: Callable[[str], str]) -> str:
    """A model's card as HTML. UserError for an unknown model, and for one without a card."""
    root, path = _chosen("model", name, places)
    try:
        with reading.open_inside(root, path) as file:
            text = file.read(4 * MOST_CARD).decode("utf-8", errors="replace")[:MOST_CARD]
    except OSError:
        raise UserError(f"{name}: it has no {CARD} that can be shown") from None

    def picture(source: str) -> str | None:
        """The address of a picture of the model's folder."""
        try:
            with reading.open_inside(root, path.parent / source) as file:
                return reading.picture_link(file, WIDEST)[0]
        except OSError:
            return None

    return render(clean_lines(without_front_matter(without_comments(text)), clean), picture)


def clean_lines(text: str, clean: Callable[[str], str]) -> str:
    """A text with `clean`, which makes one line of what it is given, done to each of its lines."""
    lines = text.expandtabs(4).splitlines()
    return "\n".join(line[: len(line) - len(line.lstrip())] + clean(line) for line in lines) + "\n"


def without_comments(text: str) -> str:
    """Markdown without HTML comments."""
    kept, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start)) >= 0:
        kept.append(text[at:start])
        at = end + 3
    return "".join([*kept, text[at:]])


def without_front_matter(text: str) -> str:
    """Markdown without the YAML that the Hub reads."""
    if not text.startswith("---\n"):
        return text
    end = text.find("\n---\n", 3)
    return text if end < 0 else text[end + 5 :]


def render(text: str, picture: Callable[[str], str | None] = lambda source: None) -> str:
    """Markdown as HTML in which nothing is active and nothing is asked of another server.

    HTML in the text is shown as text. A link may lead to a web page, and is only followed by a click.

    Args:
        text: the Markdown.
        picture: the data: address of a picture, by what the text calls it; None: its description is shown instead.
    """
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tokens = reader.parse(text)
    pictures = 0
    for token in _all_tokens(tokens):
        if token.type == "image":
            source = str(token.attrs.get("src", ""))
            pictures += 1
            address = picture(source) if pictures <= MOST_PICTURES and "://" not in source else None
            if address is None:
                token.type, token.tag, token.content = "text", "", f"[{token.content}]"
            else:
                token.attrs = {"src": address, "alt": token.content}
        elif token.type == "link_open":
            where = str(token.attrs.get("href", ""))
            token.attrs = {"rel": "noopener noreferrer nofollow", "target": "_blank"}
            if where.startswith(LINKS):
                token.attrs["href"] = where
    made = reader.renderer.render(tokens, reader.options, {})
    made = made.replace("<table>", '<div class="scroll" tabindex="0" role="group" aria-label="table"><table>')
    return f'<div class="run card">{made.replace("</table>", "</table></div>")}</div>'


def _all_tokens(tokens: Sequence[Any]) -> Iterator[Any]:
    """The tokens with those within them, except the description of a picture, which is text."""
    for token in tokens:
        yield token
        if token.children and token.type != "image":
            yield from _all_tokens(token.children)


# Drawing


def build(context: Context) -> None:
    """Fill the tab."""
    import gradio as gr
    from gradio.context import get_render_context

    models = {name: context.models.folder(name) for name in context.models.names}
    listed, clean = Listed(models, context.runs), context.work.without_paths
    gr.HTML(STYLE)
    with gr.Row():
        with gr.Column():
            chosen = gr.Dropdown(
                list(listed.records()),
                multiselect=True,
                max_choices=MOST_COMPARED,
                label="Records",
                info="What latentdiff evaluate and judge measured, from the folder of runs. Choose one or several.",
            )
            compares = gr.Button("Compare")
        with gr.Column():
            model = gr.Dropdown(list(listed.cards()), value=None, label="Model card", info="What a model is, and how good.")
    table = gr.HTML(label="Records")
    shown = gr.HTML(label="Model card")

    def show_table(names: list[str] | None) -> str:
        """The records side by side, as HTML."""
        try:
            return render(compare(names or [], listed.records(), clean))
        except Exception as error:
            raise context.work.error(error) from None

    def show_card(name: str | None) -> str:
        """The card of a model, as HTML."""
        try:
            return card(name, listed.cards(), clean) if name else ""
        except Exception as error:
            raise context.work.error(error) from None

    def look() -> Any:
        """The lists as they are now. What is chosen stays."""
        return gr.Dropdown(choices=list(listed.records())), gr.Dropdown(choices=list(listed.cards()))

    compares.click(show_table, chosen, table, api_name="compare_records", show_progress="minimal", **LOOKS)
    model.input(show_card, model, shown, api_name="model_card", show_progress="minimal", **LOOKS)
    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    tab.select(look, None, [chosen, model], show_progress="hidden", api_visibility="private", **LOOKS)
