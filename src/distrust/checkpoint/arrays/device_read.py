"""Reads the data of a checkpoint into tensors of torch on a device, and verifies it on the way.

Each thread reads a piece into one of its two page-locked blocks, queues its copy to the device, and hashes it
meanwhile. The host never holds more of the data than these blocks.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch

from distrust.checkpoint import direct_io, parallel, verified_read
from distrust.checkpoint.arrays.copy_streams import new_stream, open_device
from distrust.checkpoint.format import TensorInfo
from distrust.checkpoint.header import Header
from distrust.checkpoint.memory import PAGE_BYTES, ReusableMemory, round_up

#: The sections that go to the device; generators and history are for the host.
SECTIONS = ("model.", "optimizer.")
DIRECT_BYTES = 64 << 10  # smaller tensors: a read of its own for each is slower than the system's read-ahead


def load(descriptor: int, header: Header, device: str) -> dict[str, Any]:
    """Read and verify all tensors to a device; return them by name, as uint8[nbytes].

    Raises CorruptCheckpoint naming the first damaged tensor, ConfigError for a device that torch cannot use,
    and MemoryError.
    """
    stream = open_device(device)
    content = {}
    try:
        for tensor in header.tensors:
            destination = stream.device if tensor.name.startswith(SECTIONS) else "cpu"
            content[tensor.name] = torch.empty(tensor.nbytes, dtype=torch.uint8, device=destination)
    except RuntimeError as error:  # that of the host has no class of its own
        raise MemoryError(f"no memory for it on {destination}: {error!r}") from None
    # A piece begins anywhere, but direct I/O reads whole pages.
    size = round_up(max(map(verified_read.piece_bytes, header.tensors), default=0), PAGE_BYTES) + PAGE_BYTES
    count = 2 * max(1, min(parallel.cores(), len(header.tensors)))
    memory = memoryview(ReusableMemory().acquire(count * size, stream.page_lock))
    blocks = [(memory[index * size :][:size], new_stream(stream.device)) for index in range(count)]
    unused, thread = list(blocks), threading.local()
    if header.file_size > DIRECT_BYTES * len(header.tensors) and verified_read.is_cold(descriptor, header):
        direct_io.enable(descriptor)

    def read_piece(tensor: TensorInfo, begin: int, end: int) -> memoryview:
        if not hasattr(thread, "blocks"):
            thread.blocks = itertools.cycle([unused.pop(), unused.pop()])
        block, copies = next(thread.blocks)
        copies.wait()  # the piece before the last is on the device: its block is free
        offset = (tensor.offset + begin) % PAGE_BYTES
        pages = block[: round_up(offset + end - begin, PAGE_BYTES)]
        verified_read.read_pages(descriptor, pages, tensor.offset + begin - offset, tensor.offset + end)
        piece: memoryview = block[offset : offset + end - begin]
        copies.copy([content[tensor.name][begin:end]], [torch.frombuffer(piece, dtype=torch.uint8)])
        return piece

    try:
        verified_read.verify(header.tensors, read_piece)
    finally:
        for _, copies in blocks:
            copies.wait()  # after an error too: until then the copies use blocks and tensors
    return content
