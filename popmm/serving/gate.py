"""The way in: what is too much is refused, what takes too long ends, and whoever goes away frees their place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable

from popmm.compat.serving import error_body
from popmm.serving.limits import Limits

ANSWERING = ("/v1/chat/completions", "/v1/completions")
GOODBYE = 5  # seconds that a client is given to read why its answer ends
STOPPING = "the server is shutting down"
TOO_SLOW = "this request has not come in whole in the time that it may take"


class Gate:
    """ASGI middleware around the app.

    Args:
        app: what answers.
        limits: see ``Limits``.
        most: requests at once, those that wait included.
        took: is told when each request that was answered came (``time.monotonic()``), after its end.

    Attributes:
        inside: requests that are being answered or wait.
        refused: how many were refused or ended, by status.
    """

    def __init__(self, app, limits: Limits, most: int, took: Callable[[float], None]) -> None:
        self._app, self._limits, self._most, self._took = app, limits, most, took
        self.inside = 0
        self.closing = False
        self.refused: dict[int, int] = {}
        self._tasks: dict[asyncio.Task, _Answer] = {}

    def close(self, grace: float) -> None:
        """Takes no more requests, and ends those that run after so many seconds. In the event loop."""
        self.closing = True
        asyncio.get_running_loop().call_later(grace, self._end_all)

    def _end_all(self) -> None:
        for task, answer in list(self._tasks.items()):
            answer.why = answer.why or (503, STOPPING)
            task.cancel()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] not in (*ANSWERING, "/health"):
            return await self._app(scope, receive, send)
        answer = _Answer(send)
        if self.closing:
            return await self._refuse(answer, 503, STOPPING)
        if scope["path"] == "/health":
            return await self._app(scope, receive, send)
        if self.inside >= self._most:
            return await self._refuse(
                answer, 429, f"{self.inside} requests are being answered or wait, as many as may: try again later"
            )
        self.inside += 1
        try:
            await self._answer(answer, scope, receive)
        finally:
            self.inside -= 1

    async def _answer(self, answer: _Answer, scope, receive) -> None:
        begun = time.monotonic()
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._limits.seconds)
        except (asyncio.TimeoutError, _Gone) as error:
            return await self._refuse(answer, 408, TOO_SLOW) if not isinstance(error, _Gone) else self._count(499)
        if body is None:
            return await self._refuse(answer, 413, f"this request is larger than {self._limits.megabytes:g} MB")
        gone = asyncio.Event()
        task = asyncio.create_task(self._app(scope, _replay(body, gone), answer.send))
        watch = asyncio.create_task(_watch(receive, gone, task, answer))
        self._tasks[task] = answer
        try:
            await asyncio.wait([task], timeout=begun + self._limits.seconds - time.monotonic())
            if not task.done():
                answer.why = (504, f"this request has taken the {self._limits.seconds:g} seconds that it may")
        finally:  # ours may be cancelled too
            watch.cancel()
            task.cancel()
            await asyncio.wait([task])
            self._tasks.pop(task)
        self._took(begun)
        if gone.is_set():
            self._count(499)
        elif answer.why is not None:
            await self._refuse(answer, *answer.why)
        else:
            task.result()

    async def _read(self, scope, receive) -> bytes | None:
        """The body; None if it is too large, of which the rest is then dropped, so that the client hears of it."""
        most = self._limits.megabytes * 1e6
        declared = dict(scope["headers"]).get(b"content-length", b"")
        parts, size, more = [], 0, True
        too_large = declared.isdigit() and int(declared) > most
        while more and size < 16 * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            size += len(message.get("body", b""))
            too_large = too_large or size > most
            parts.append(b"" if too_large else message.get("body", b""))
            more = message.get("more_body", False)
        return None if too_large else b"".join(parts)

    def _count(self, status: int) -> None:
        self.refused[status] = self.refused.get(status, 0) + 1

    async def _refuse(self, answer: _Answer, status: int, message: str) -> None:
        self._count(status)
        with contextlib.suppress(OSError, asyncio.TimeoutError):  # gone meanwhile, or it does not read
            await asyncio.wait_for(answer.end(status, message), GOODBYE)


class _Gone(Exception):
    """The client has gone before its request was whole."""


class _Answer:
    """What has been sent to a client so far, and how to end it."""

    def __init__(self, send) -> None:
        self._send = send
        self.why: tuple[int, str] | None = None  # it is to end
        self.ended = self._begun = self._streams = False

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self._streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self, status: int, message: str) -> None:
        """With an error: of its own, or the last event of a stream."""
        body = json.dumps(error_body(status, message)).encode()
        if self.ended:
            return
        if not self._begun:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            if status == 504:
                headers.append((b"x-should-retry", b"false"))  # OpenAI's client would ask again
            elif status == 429:
                headers.append((b"retry-after", b"1"))
            await self.send({"type": "http.response.start", "status": status, "headers": headers})
        else:
            body = b"data: " + body + b"\n\n" if self._streams else b""
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _replay(body: bytes, gone: asyncio.Event):
    """What the app receives: the body that was read, then nothing until the client has gone."""
    read = False

    async def receive():
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _watch(receive, gone: asyncio.Event, task: asyncio.Task, answer: _Answer) -> None:
    """Ends an answer whose client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not answer.ended:  # else it is told of the end of each
        gone.set()
        task.cancel()
