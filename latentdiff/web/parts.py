"""What several tabs have alike: the fields of command and Python, the button that stops, and a request with a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from latentdiff.web.jobs.job import Update

if TYPE_CHECKING:
    from latentdiff.web.context import Context
    from latentdiff.web.facts import Facts

STOPPING = 120  # seconds that a stopped request is waited for, at most: its step may be a long one


def code_fields(what: str = "files", **shown: Any) -> tuple[gr.Code, gr.Code]:
    """(the field of the command, the field of the Python) that make the same `what`. shown: more arguments of both."""
    shown = {"interactive": False, "wrap_lines": True, "lines": 1, **shown}
    return (
        gr.Code(label=f"The command that makes the same {what}", language="shell", **shown),
        gr.Code(label=f"The Python that makes the same {what}", language="python", **shown),
    )


def facts_of_model(context: Context, name: str) -> Facts:
    """The facts of a model that a visitor has chosen; an error is one line, as gradio shows it."""
    try:
        return context.models.facts(name)
    except Exception as error:
        raise context.work.error(error) from None


def updates_of(context: Context, visitor: str | None, work: Callable[..., Any]) -> Iterator[Update]:
    """The updates of work(models, job, folder=folder), as of `Context.run`. The folder is empty, and is removed afterwards.

    gradio copies the files that are given to it before it asks for what comes next, so the folder is still there then.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield from context.run(visitor, partial(work, folder=Path(folder)))


def let_stop(context: Context, button: gr.Button, status: gr.Markdown, event: Any) -> None:
    """Have a button stop what a visitor's event does. status: where it is said."""

    def cancel(request: gr.Request) -> str:
        """Stop the visitor's work."""
        return "Stopping …" if context.work.cancel(request.session_hash) else "Stopped."

    def wait(request: gr.Request) -> Any:
        """Say so when it has stopped: the page does not listen to the event any more."""
        return "Stopped." if context.work.wait(request.session_hash, STOPPING) else gr.skip()

    # Those that run are stopped here, at their next step; those that wait are taken out of gradio's queue
    own: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    button.click(cancel, None, status, **own).then(wait, None, status, **own)
    button.click(None, None, None, cancels=[event], **own)
