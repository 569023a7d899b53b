"""Reads checkpoints in a store: headers by ranges, and whole files as a stream that is verified on the way.

Nothing that the store says is trusted. The header is checked fully before any size in it is used, and must
state the size of the listing. Each tensor's digest is compared before a downloaded file gets its name, so it
does not matter which requests an object that was replaced meanwhile has answered.

Memory is bounded: some ranges arrive while one is hashed and others are written. Errors have the object's URL
where those of a local file have its path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Event

from distrust.checkpoint.checkpoint_file import CheckpointFile
from distrust.checkpoint.disk import Disk
from distrust.checkpoint.files import errors_with_path
from distrust.checkpoint.header import Header, header_length, parse_header
from distrust.checkpoint.memory import PAGE_BYTES, allocate, round_up
from distrust.checkpoint.remote.client import Client
from distrust.checkpoint.remote.line import RemoteFile
from distrust.checkpoint.storage import AtomicCheckpointFile
from distrust.errors import CheckpointNotFound, CorruptCheckpoint

#: The first read of a header: one request is enough for some 1,000 tensors.
FIRST_BYTES = 256 << 10
#: Of one request for data; a multiple of a page.
RANGE_BYTES = 2 << 20
RANGES_IN_FLIGHT = 6
#: Of the same size, for the blocks that are being written.
SLOTS = 3


def read_header(client: Client, file: RemoteFile) -> CheckpointFile:
    """Read and check a header, in one or two requests; not the tensors' descriptions.

    Raises:
        CheckpointError: CheckpointNotFound, CorruptCheckpoint or UnsupportedVersion, with the URL as path.
        RemoteError: the store fails.
    """
    path = object_path(client, file)
    with errors_with_path(path):
        return CheckpointFile(path, _read_header(client, file)[0])


def verify(client: Client, file: RemoteFile) -> CheckpointFile:
    """Read a whole checkpoint, keep nothing, and check every byte. Raises as :func:`read_header`."""

    def read() -> CheckpointFile:
        path = object_path(client, file)
        with errors_with_path(path):
            header, _ = _read_header(client, file)
            header.require_intact()  # before any of its offsets is used
            for _ in _data(client, file, header):
                pass
        return CheckpointFile(path, header)

    return _again_if_damaged(read)


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
    return _again_if_damaged(lambda: _fetch(client, file, path, disk, report))


def _again_if_damaged(read: Callable[[], CheckpointFile]) -> CheckpointFile:
    """Damage may be of the way here, and not of the object: read it once more."""
    try:
        return read()
    except CorruptCheckpoint:
        return read()


def _fetch(
    client: Client, file: RemoteFile, path: Path, disk: Disk, report: Callable[[int], None]
) -> CheckpointFile:
    with errors_with_path(object_path(client, file)):
        header, raw = _read_header(client, file)
        header.require_intact()  # before any of its offsets is used
        first = (
            (begin, memoryview(raw)[begin : begin + RANGE_BYTES]) for begin in range(0, len(raw), RANGE_BYTES)
        )
        with AtomicCheckpointFile(path, file.size, disk) as target:
            slots = [memoryview(allocate(RANGE_BYTES)) for _ in range(SLOTS)]  # page-aligned, for direct I/O
            writes = deque[Event]()
            for index, (offset, block) in enumerate(chain(first, _data(client, file, header))):
                if len(writes) == SLOTS:
                    writes.popleft().wait()  # the slot is free
                pages = slots[index % SLOTS][: round_up(len(block), PAGE_BYTES)]
                pages[: len(block)] = block
                writes.append(target.write(pages, offset))
                report(offset)
            target.commit()  # only here: every digest was compared
    return CheckpointFile(path, header)


def blocks(read: Callable[[int, int], memoryview], begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """Read a range in blocks, several at once; gives each with its offset, in order."""
    with ThreadPoolExecutor(RANGES_IN_FLIGHT) as pool:
        offsets = iter(range(begin, end, RANGE_BYTES))
        arriving = deque[tuple[int, Future[memoryview]]]()
        while True:
            for offset in islice(offsets, RANGES_IN_FLIGHT + 1 - len(arriving)):
                arriving.append((offset, pool.submit(read, offset, min(offset + RANGE_BYTES, end))))
            if not arriving:
                return
            offset, block = arriving.popleft()
            yield offset, block.result()


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
        path = object_path(client, file)
        raise CheckpointNotFound(f"{path}: no such checkpoint", path=path)
    if len(content) != end - begin:
        raise CorruptCheckpoint(
            f"it is truncated, or was replaced by another: {file.size:,} bytes are listed, and it ends "
            f"before byte {end:,}"
        )
    return content


def _data(client: Client, file: RemoteFile, header: Header) -> Iterator[tuple[int, memoryview]]:
    """The data in blocks, with their offsets; raises CorruptCheckpoint unless every digest is right."""
    from distrust.checkpoint.stream_writer import TensorDigests
    from distrust.checkpoint.verified_read import check_digest

    data_bytes = sum(tensor.nbytes for tensor in header.tensors)
    start = file.size - data_bytes
    digests = TensorDigests([*(tensor.offset - start for tensor in header.tensors), data_bytes])
    for offset, block in blocks(partial(_read, client, file), start, file.size):
        yield offset, block
        digests.update(block, offset - start, offset - start + len(block))  # while it is being written
    for tensor, digest in zip(header.tensors, digests.hex, strict=True):
        check_digest(tensor, digest)
