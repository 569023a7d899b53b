"""A proxy before an S3 store that misbehaves as its owner says, while it runs.

It reads each request, asks its :class:`Behaviour` what to do, and counts what it did. It runs in a thread of
the process that owns it, so the owner can act at an exact stage of a request, such as kill the client in the
middle of an upload: see :attr:`Proxy.watch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

#: What a request is for. ``begin``, ``part`` and ``complete`` are an upload in several parts.
Kind = Literal[
    "upload", "begin", "part", "complete", "term", "beat", "end", "write", "list", "download", "read", "head",
    "delete",
]  # fmt: skip
#: How far it has come: the store has not seen it, has half of its body, or has done it.
Stage = Literal["arrived", "half", "done"]

_MAX_BODY = 256 << 20  # bytes; the body of a request or an answer is in memory
_PIECE = 16 << 10  # bytes passed on at a time where a transfer is slow
_ERRORS = {
    503: ("SlowDown", "Please reduce your request rate."),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    403: ("ExpiredToken", "The provided token has expired."),
}
UPLOADS: frozenset[Kind] = frozenset(("upload", "begin", "part", "complete"))


class Request(NamedTuple):
    """A request of a client."""

    number: int  #: from 1, among all requests to the proxy
    kind: Kind
    key: str  #: of the object, with the bucket
    creates: bool  #: whether it says If-None-Match
    head: bytes
    body: bytes


class Action(NamedTuple):
    """What happens to a request; by default it is passed on."""

    name: str = ""  #: for the counts; empty for one that is passed on
    answer: int = 0  #: a status code, instead of passing it on
    is_lost: bool = False  #: the store does it, and the client is not told
    cut_body: bool = False  #: the connection ends in the middle of the request
    hangs: bool = False  #: neither an answer nor an end, until the behaviour changes
    is_late: bool = False  #: passed on once the behaviour changes, also if its client is dead by then
    cut_answer: bool = False  #: the connection ends in the middle of the answer
    shorten: bool = False  #: the answer is shorter, and says so
    flip: bool = False  #: one bit of the answer's body is another one
    slow: float = 0.0  #: seconds that the body of the request or of the answer takes


PASS = Action()
Behaviour = Callable[[Request], Action]


def _every(number: int, action: Action, *kinds: Kind) -> Behaviour:
    """Does ``action`` to every so-manieth request of some kinds, or of all."""
    count = 0

    def behave(request: Request) -> Action:
        nonlocal count
        if kinds and request.kind not in kinds:
            return PASS
        count += 1
        return action if count % number == 0 else PASS

    return behave


def _lose_creations() -> Behaviour:
    """The answer to the first creation of each object is lost; a second try is answered: it exists."""
    lost: set[str] = set()

    def behave(request: Request) -> Action:
        if not request.creates or request.key in lost:
            return PASS
        lost.add(request.key)
        return Action("answer to a creation lost", is_lost=True)

    return behave


def _hold_first() -> Behaviour:
    """The first upload is under way until the store behaves otherwise; all others overtake it."""
    first: list[Request] = []

    def behave(request: Request) -> Action:
        if request.kind != "upload" or first:
            return PASS
        first.append(request)
        return Action(LATE, is_late=True)

    return behave


LATE = "upload late"
_SENT: tuple[Kind, ...] = ("upload", "part")
#: The ways in which a store fails, by name; each is made anew for every time it is used.
BEHAVIOURS: dict[str, Callable[[], Behaviour]] = {
    "every third 503": lambda: _every(3, Action("503", answer=503)),
    "every second 503": lambda: _every(2, Action("503", answer=503)),
    "uploads 500": lambda: _every(1, Action("500 to an upload", answer=500), *_SENT),
    "all 503": lambda: _every(1, Action("503", answer=503)),
    "expired": lambda: _every(1, Action("token expired", answer=403)),
    "completes lost": lambda: _every(
        2, Action("answer to an upload lost", is_lost=True), "complete", "upload"
    ),
    "creations lost": _lose_creations,
    "uploads hang": lambda: _every(2, Action("upload hangs", hangs=True), *_SENT),
    "all hang": lambda: _every(1, Action("request hangs", hangs=True)),
    "every second upload cut": lambda: _every(2, Action("upload cut", cut_body=True), *_SENT),
    "all uploads cut": lambda: _every(1, Action("upload cut", cut_body=True), *_SENT),
    "all cut": lambda: _every(1, Action("request cut", cut_body=True)),
    "downloads cut": lambda: _every(2, Action("download cut", cut_answer=True), "download"),
    "downloads short": lambda: _every(2, Action("download short", shorten=True), "download"),
    "downloads flipped": lambda: _every(2, Action("bit of a download flipped", flip=True), "download"),
    "all downloads flipped": lambda: _every(1, Action("bit of a download flipped", flip=True), "download"),
    "an upload late": _hold_first,
    "slow": lambda: _every(1, Action("", slow=0.05), "upload", "part", "download"),
}


def pass_all(request: Request) -> Action:
    return PASS


class Proxy:
    """A context: listens on a free port of loopback, and passes requests on to a store."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self.counts: Counter[str] = Counter()  #: of actions, by name
        self.faulty_uploads = 0  #: requests of an upload to which something was done
        #: Called in the proxy's thread at each stage of a request; the request waits for it.
        self.watch: Callable[[Stage, Request], None] | None = None
        self.port = 0
        self._target = target
        self._behaviour: Behaviour = pass_all
        self._rng = random.Random(seed)
        self._number = 0
        self._open: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()  # of the behaviour: releases what hangs
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="proxy")

    def behave(self, behaviour: str | Behaviour | None = None) -> None:
        """Behave otherwise from the next request on: by a name of BEHAVIOURS, a function, or well."""
        if isinstance(behaviour, str):
            behaviour = BEHAVIOURS[behaviour]()
        self._behaviour = behaviour or pass_all
        self._loop.call_soon_threadsafe(self._release)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _release(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda *_: None)  # of connections that end while it ends
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", limit=1 << 20, backlog=1000)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        self._loop.remove_reader(server.sockets[0])  # accept no more; a closed server would leak some
        self._loop.run_until_complete(self._close_connections())
        server.close()
        self._loop.close()

    async def _close_connections(self) -> None:
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in self._connections:
                task.cancel()
            await asyncio.wait(tasks)  # those of asyncio accept connections
        for transport in list(self._open):
            transport.abort()
        await asyncio.sleep(0.01)  # each is closed by a later round of the loop

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer.transport)  # at once: a task may be cancelled before its first line
        task = self._loop.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; it ends after the first request that is passed on, as many stores' do."""
        # A client that is killed, or that gives up, is no error here.
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            while await self._serve_one(reader, writer):
                pass
        writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        fields = _fields(head)
        self._number += 1
        kind, key = _classify(head)
        creates = "if-none-match" in fields
        request = Request(self._number, kind, key, creates, head, b"")
        action = self._behaviour(request)
        if action.name:
            self.counts[action.name] += 1
            self.faulty_uploads += kind in UPLOADS
        if fields.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(fields.get("content-length", "0"))
        if length > _MAX_BODY:
            raise OSError("too long for this proxy")
        if action.hangs:
            await self._changed.wait()
            return False
        if action.cut_body:
            await reader.readexactly(length // 2)
            writer.transport.abort()
            return False
        body = await reader.readexactly(length)
        if action.answer:
            writer.write(_error(action.answer))
            await writer.drain()
            return True
        if action.is_late:
            await self._changed.wait()
        answer = await self._pass(request._replace(body=body), action)
        if not action.is_lost:
            await self._send(writer, answer, action)
        return False

    async def _pass(self, request: Request, action: Action) -> bytes:
        """The answer of the store, complete."""
        self._tell("arrived", request)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._open.add(writer.transport)
        try:
            lines = request.head[:-4].split(b"\r\n")
            lines = [line for line in lines if not line.lower().startswith((b"connection:", b"expect:"))]
            writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
            half = len(request.body) // 2
            await self._write(writer, request.body[:half], action.slow / 2)
            self._tell("half", request)
            await self._write(writer, request.body[half:], action.slow / 2)
            answer = await reader.read(-1)
            self._tell("done", request)
            return answer
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter, answer: bytes, action: Action) -> None:
        head, separator, body = answer.partition(b"\r\n\r\n")
        if body and head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 206")):
            if action.flip:
                offset = self._rng.randrange(len(body))
                body = flip_bit(body, offset, self._rng.randrange(8))
            if action.shorten:
                shorter = body[: len(body) // 2]
                stated = b"Content-Length: %d" % len(body)
                head = head.replace(stated, b"Content-Length: %d" % len(shorter))
                body = shorter
            if action.cut_answer:
                body = body[: len(body) // 2]
        writer.write(head + separator)
        await self._write(writer, body, action.slow)

    async def _write(self, writer: asyncio.StreamWriter, content: bytes, seconds: float) -> None:
        pieces = [content[begin : begin + _PIECE] for begin in range(0, len(content), _PIECE)]
        for piece in pieces:
            if writer.is_closing():
                raise ConnectionError("the client is gone")
            writer.write(piece)
            if seconds:
                await asyncio.sleep(seconds / len(pieces))
        await writer.drain()

    def _tell(self, stage: Stage, request: Request) -> None:
        if self.watch is not None:
            self.watch(stage, request)


def flip_bit(content: bytes, offset: int, bit: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 1 << bit]) + content[offset + 1 :]


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip().lower() for name, _, value in pairs}


def _classify(head: bytes) -> tuple[Kind, str]:
    """What a request is for, by its first line, and the object."""
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    path, _, query = target.partition("?")
    name = path.rpartition("/")[2]
    is_checkpoint = name.startswith("checkpoint-")
    kind: Kind = "write"
    if "partNumber=" in query:
        kind = "part"
    elif method == "POST" and "uploadId=" in query:
        kind = "complete"
    elif method == "POST" and "uploads" in query:
        kind = "begin"
    elif method == "PUT" and is_checkpoint:
        kind = "upload"
    elif method == "PUT":
        suffixes: dict[str, Kind] = {"json": "term", "beat": "beat", "end": "end"}
        kind = suffixes.get(name.rpartition(".")[2], "write") if "/terms/" in path else "write"
    elif method == "GET":
        kind = "list" if "list-type" in query else "download" if is_checkpoint else "read"
    elif method in ("HEAD", "DELETE"):
        kind = "head" if method == "HEAD" else "delete"
    return kind, path


def _error(status: int) -> bytes:
    code, message = _ERRORS[status]
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
