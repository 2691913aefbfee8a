"""Pictures that visitors upload. They reach the project's own decoder as they are, and gradio's decoding is left out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradio.components.base import server

from latentdiff.errors import UserError
from latentdiff.web.jobs.edit import LAYERS
from latentdiff.web.jobs.uploads import Upload

if TYPE_CHECKING:
    import gradio as gr

    from latentdiff.web.limits import Limits

PAINTINGS = 16  # painted pictures whose event has not come yet


def undecoded(component: gr.Image) -> gr.Image:
    """The same component, whose value in an event is an `Upload` or None. gradio would decode the file itself."""
    component.preprocess = lambda payload: _file(payload)  # type: ignore[method-assign]
    return component


def undecoded_editor(editor: gr.ImageEditor, limits: Limits) -> gr.ImageEditor:
    """The same component, whose value in an event is {"background", "composite": `Upload` or None, "layers": list of them}.

    The browser sends such a value in pieces before the event. What is kept of them is bounded by `limits`.
    """
    from fastapi import HTTPException
    from gradio.components.image_editor import EditorDataBlobs

    kept: OrderedDict[str, EditorDataBlobs] = OrderedDict()  # the last at the end
    guard = threading.Lock()

    def accept_blobs(data: Any) -> None:
        """In the place of gradio's own function, which keeps whatever comes."""
        try:
            kind, key, content = data.data["type"], str(data.data["id"]), data.files[0][1]
            layer = int(data.data.get("index") or 0) if kind == "layer" else 0
        except (LookupError, TypeError, ValueError):
            raise HTTPException(422, "picture: not what the editor sends") from None
        if len(content) > limits.upload or not 0 <= layer < LAYERS or len(key) > 100:
            raise HTTPException(413, f"picture: at most {limits.upload:,} bytes and {LAYERS} layers are allowed")
        with guard:
            pieces = kept.setdefault(key, EditorDataBlobs(background=None, layers=[], composite=None))
            kept.move_to_end(key)
            while len(kept) > PAINTINGS:
                kept.popitem(last=False)
            if kind == "layer":
                pieces.layers.extend([None] * (layer + 1 - len(pieces.layers)))
                pieces.layers[layer] = content
            elif kind in ("background", "composite"):
                setattr(pieces, kind, content)

    def preprocess(payload: Any) -> dict[str, Any] | None:
        if payload is not None and payload.id is not None:
            with guard:
                payload = kept.pop(payload.id, None)
        if payload is None:
            return None
        layers = [_file(layer) for layer in payload.layers or ()]
        return {
            "background": _file(payload.background),
            "layers": [layer for layer in layers if layer is not None],
            "composite": _file(payload.composite),
        }

    editor.accept_blobs = server(accept_blobs)  # type: ignore[method-assign]
    editor.preprocess = preprocess  # type: ignore[method-assign]
    return editor


def _file(payload: Any) -> Upload | None:
    """What was uploaded, of gradio's data: bytes, or a file that gradio has found to be in its folder of uploads."""
    if payload is None or isinstance(payload, bytes):
        return payload or None
    if getattr(payload, "path", None) is None:
        raise UserError("picture: upload it as a file")
    return Path(payload.path)
