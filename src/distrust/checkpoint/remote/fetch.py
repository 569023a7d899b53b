"""Reads checkpoints in a store: headers by ranges, and whole files as a stream that is verified on the way.

Nothing that the store says is trusted. The header is checked fully before any size in it is used, and must
state the size of the listing. Each tensor's digest is compared before a downloaded file gets its name, so it
does not matter which requests an object that was replaced meanwhile has answered.

Memory is bounded: some ranges arrive while blocks of one are hashed and written. Errors have the object's URL
where those of a local file have its path.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast

from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import errors_with_path
from distrust.checkpoint.header import Header, header_length, parse_header
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, round_up
from distrust.checkpoint.remote.client import Client
from distrust.checkpoint.remote.line import RemoteFile
from distrust.checkpoint.storage import AtomicCheckpointFile
from distrust.errors import CorruptCheckpoint

Write = Callable[[int, memoryview], object]  # of the block that begins at an offset
Read = TypeVar("Read", bound=Callable[..., CheckpointFile])
#: The first read of a header: one request is enough for some 1,000 tensors.
FIRST_BYTES = 256 << 10
#: Of one request for data, which begins at a multiple of it: SeaweedFS, for one, keeps pieces of that size,
#: and gives halves of them more slowly.
RANGE_BYTES = 4 << 20
RANGES_IN_FLIGHT = 4
#: Of one write; a multiple of a page, as the above. There are slots for the blocks that are being written.
BLOCK_BYTES, SLOTS = 1 << 20, 4


def read_header(client: Client, file: RemoteFile) -> CheckpointFile:
    """Read and check a header, in one or two requests; not the tensors' descriptions.

    Raises:
        CheckpointError: CheckpointNotFound, CorruptCheckpoint or UnsupportedVersion, with the URL as path.
        RemoteError: the store fails.
    """
    with errors_with_path(path := object_path(client, file)):
        return CheckpointFile(path, _read_header(client, file)[0])


def _again_if_damaged(read: Read) -> Read:
    """Damage may be of the way here, and not of the object: read it once more. Errors have its URL."""

    @functools.wraps(read)
    def call(client: Client, file: RemoteFile, *arguments: Any, **options: Any) -> CheckpointFile:
        with errors_with_path(object_path(client, file)):
            with contextlib.suppress(CorruptCheckpoint):
                return read(client, file, *arguments, **options)
            return read(client, file, *arguments, **options)

    return cast(Read, call)


@_again_if_damaged
def verify(client: Client, file: RemoteFile) -> CheckpointFile:
    """Read a whole checkpoint, keep nothing, and check every byte. Raises as :func:`read_header`."""
    header, _ = _read_header(client, file)
    header.require_intact()  # before any of its offsets is used
    _read_data(client, file, header, lambda *_: None)
    return CheckpointFile(object_path(client, file), header)


@_again_if_damaged
def fetch(
    client: Client,
    file: RemoteFile,
    path: Path,
    disk: Disk,
    *,
    report: Callable[[int], None] = lambda _: None,
) -> CheckpointFile:
    """Download a checkpoint to ``path``, which appears when every byte is verified and durable.

    An existing file of that name is replaced; its folder exists. ``report`` is told the bytes so far.

    Raises:
        CheckpointError: as :func:`read_header`; SaveFailed if the file cannot be written.
        RemoteError: the store fails.
    """
    header, raw = _read_header(client, file)
    header.require_intact()  # before any of its offsets is used
    with AtomicCheckpointFile(path, file.size, disk) as target:
        memory = memoryview(ReusableMemory().acquire(SLOTS * BLOCK_BYTES))
        slots = itertools.cycle(memory[index * BLOCK_BYTES :][:BLOCK_BYTES] for index in range(SLOTS))
        writes = deque[Event]()

        def write(offset: int, block: memoryview) -> None:
            if len(writes) == SLOTS:
                writes.popleft().wait()  # the slot is free
            pages = next(slots)[: round_up(len(block), PAGE_BYTES)]
            pages[: len(block)] = block
            writes.append(target.write(pages, offset))
            report(offset)

        for begin in range(0, len(raw), BLOCK_BYTES):
            write(begin, memoryview(raw)[begin : begin + BLOCK_BYTES])
        _read_data(client, file, header, write)
        target.commit()  # only here: every digest was compared
    return CheckpointFile(path, header)


def blocks(read: Callable[[int, int], memoryview], begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """Read a range in blocks, several at once; gives each with its offset, in order."""
    pieces = range(begin - begin % RANGE_BYTES, end, RANGE_BYTES) if begin < end else ()
    ranges = ((max(piece, begin), min(piece + RANGE_BYTES, end)) for piece in pieces)
    with ThreadPoolExecutor(RANGES_IN_FLIGHT) as pool:
        requests = ((edges[0], pool.submit(read, *edges)) for edges in ranges)
        arriving = deque(itertools.islice(requests, RANGES_IN_FLIGHT))
        while arriving:
            offset, request = arriving.popleft()
            yield offset, request.result()
            arriving.extend(itertools.islice(requests, 1))


def object_path(client: Client, file: RemoteFile) -> Path:
    """The name of an object in listings and errors."""
    return (client.location / file.key).path


def _read_header(client: Client, file: RemoteFile) -> tuple[Header, bytes]:
    """The header, not yet checked fully, and its bytes."""
    raw = bytes(_read(client, file, 0, min(FIRST_BYTES, file.size)))
    length = header_length(raw, file.size)  # bounded, before memory is taken for it
    if length > len(raw):
        raw += _read(client, file, len(raw), length)
    header = parse_header(raw[:length], file.size)
    is_named = (header.step, header.kind) == (file.step, file.kind)
    if not is_named or not header.state_digest.startswith(file.digest):
        state = f"step {header.step} ({header.kind}), state {header.state_digest[:16]}"
        raise CorruptCheckpoint(f"it holds {state}, not what its name says")
    return header, raw[:length]


def _read(client: Client, file: RemoteFile, begin: int, end: int) -> memoryview:
    content = client.read(file.key, begin, end) if begin < end else memoryview(b"")
    if content is None:
        raise FileNotFoundError(file.key)
    if len(content) != end - begin:
        raise CorruptCheckpoint(
            f"it is truncated, or was replaced by another: {file.size:,} bytes are listed, and it ends "
            f"before byte {end:,}"
        )
    return content


def _read_data(client: Client, file: RemoteFile, header: Header, write: Write) -> None:
    """Give each block of the data to ``write``. Raises CorruptCheckpoint unless every digest is right."""
    from distrust.checkpoint.stream_writer import TensorDigests
    from distrust.checkpoint.verified_read import check_digest

    edges = [*(tensor.offset for tensor in header.tensors), file.size]
    digests = TensorDigests(edges)
    for offset, content in blocks(functools.partial(_read, client, file), edges[0], file.size):
        for begin in range(0, len(content), BLOCK_BYTES):
            block = content[begin : begin + BLOCK_BYTES]
            write(offset + begin, block)
            digests.update(block, offset + begin, offset + begin + len(block))  # while it is being written
        del content, block  # its memory, while the next one arrives
    for tensor, digest in zip(header.tensors, digests.hex, strict=True):
        check_digest(tensor, digest)
