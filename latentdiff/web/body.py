"""A limit on the bytes of every request. gradio limits its route for uploads alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

Message = MutableMapping[str, Any]


class BodyLimit:
    """ASGI middleware that refuses requests with more than `most` bytes, with status 413 and one line."""

    def __init__(self, app: Callable[..., Awaitable[None]], most: int):
        self.app, self.most = app, most
        self.line = f"request: at most {most:,} bytes are allowed"

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Pass a request on. A body whose length is not stated is counted while it is read."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self.most:
            return await JSONResponse({"detail": self.line}, 413)(scope, receive, send)
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise HTTPException(413, self.line)
            return message

        await self.app(scope, counted, send)
