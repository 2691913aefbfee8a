"""What a visitor may ask of the server. gradio answers more than the page needs, and some of it fetches or starts things."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from latentdiff.errors import printable

Message = MutableMapping[str, Any]

API = "/gradio_api"
UPLOAD = f"{API}/upload"
# The addresses of the page and of gradio's client. All others are not found: among them those that fetch an address for the
# visitor, run ffmpeg, show what other visitors do, or change the page's own code
READ = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/[^\0]*"
    rf"|{API}/(theme\.css|info/?|openapi\.json|startup-events|app_id/?|user/?|login_check/?|token/?|upload_progress)"
    rf"|{API}/queue/(data|status)|{API}/heartbeat/[^/]+|{API}/call/(v2/)?[\w-]+/[\w-]+|{API}/file=(?![A-Za-z][\w+.-]*:)[^\0]+"
)
SENT = re.compile(rf"{API}/(queue/join|cancel|upload|component_server/?|reset/?|run/[\w-]+/?|call/(v2/)?[\w-]+/?)")
STORED = 100  # largest uploads that may be kept at a time
DRAINED = 1_000_000  # bytes of a refused request that are read
LOOK = 1.0  # seconds between two looks at what is kept


class Gate:
    """ASGI middleware that passes on what the page and gradio's client need; all else is not found.

    Uploads are refused while the uploads and results that are kept have more than `most` bytes.

    Args:
        app: what answers.
        scratch: the folder of uploads and results.
        most: bytes that may be kept in it before another upload.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], scratch: Path, most: int):
        self.app, self.scratch, self.most = app, scratch, most
        self._looked, self._kept = -LOOK, 0

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Pass a request on, or answer it with one line."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # the page uses no web sockets
        path, method = scope["path"], scope["method"]
        allowed = {"GET": READ, "HEAD": READ, "POST": SENT}.get(method)
        if allowed is None or allowed.fullmatch(path) is None:
            return await _answer(404, "Not Found", scope, receive, send)
        if path == UPLOAD and self.kept() > self.most:
            return await _answer(507, "upload: this server keeps as much as it may; try again in an hour", scope, receive, send)
        began, more = False, True

        async def read() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def noted(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self.app(scope, read, noted)
        except Exception as error:  # of gradio, about a request that no page sends
            print(printable(f"latentdiff: {method} {path}: {type(error).__name__}: {error}")[:300], file=sys.stderr)
            if not began:
                await _answer(400, "request: not understood", scope, receive, send, more)

    def kept(self) -> int:
        """Bytes of the uploads and results, as they were at the last look."""
        if time.monotonic() - self._looked >= LOOK:
            sizes = 0
            for folder, _, names in os.walk(self.scratch):
                for name in names:
                    try:
                        sizes += os.lstat(os.path.join(folder, name)).st_size
                    except OSError:  # removed meanwhile
                        continue
            self._kept, self._looked = sizes, time.monotonic()
        return self._kept


async def _answer(
    status: int,
    line: str,
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
    more: bool = True,
) -> None:
    """Answer with one line. What the visitor still sends is read, to some length, for else the answer may not arrive.

    more: whether the request has not been read to its end.
    """
    count = 0
    while more and count < DRAINED:
        message = await receive()
        more = message.get("more_body", False)
        count += len(message.get("body", b""))
    await JSONResponse({"detail": line}, status)(scope, receive, send)


def fetch_nothing() -> None:
    """Keep gradio from fetching addresses that a visitor gives in the place of a picture."""
    import gradio
    from gradio import processing_utils

    async def refused(url: str) -> Any:
        raise gradio.Error("picture: upload it as a file; this server fetches nothing", print_exception=False)

    processing_utils.async_ssrf_protected_get = refused  # its one way to fetch what comes from a visitor
