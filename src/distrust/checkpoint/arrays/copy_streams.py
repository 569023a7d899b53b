"""Copies between host memory and the device of torch's tensors, beside what the device computes.

On CUDA a copy needs page-locked memory to run at the speed of the bus, and a stream of its own to run beside
kernels. Written from torch's sources and tested with a stream whose copies come late; not run on CUDA.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from distrust.checkpoint.memory import PageLock
from distrust.errors import ConfigError, DistrustWarning, defer_warning

#: At most so much is gathered on its device, which takes about a millisecond.
GATHER_BYTES = 1 << 30
_DEVICE = re.compile(r"(cpu|mps)(:0)?|cuda(:[0-9]+)?")
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices of the process


class CopyStream:
    """Copies that are complete when :meth:`copy` returns: of the CPU, and of devices without streams."""

    page_lock: PageLock | None = None  # for the host memory of the copies, where that matters

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def follow(self) -> None:
        """Let later copies wait for what the calling thread has queued on the device by now."""

    @torch.no_grad()
    def copy(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        """Queue copies; the caller keeps targets and sources until :meth:`wait` returns."""
        torch._foreach_copy_(list(targets), list(sources))

    def wait(self) -> None:
        """Wait until the copies, and what they follow, are complete."""

    def free_bytes(self) -> int:
        """Free memory of the device, without what torch keeps for itself."""
        return 0

    @torch.no_grad()
    def gather(self, runs: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]] | None:
        """Queue copies of arrays on the device, and return them: one tensor for each run of a dtype.

        They may change in later work of the current stream, and in any once :meth:`wait` has returned. None
        if they are large, or little memory would be left.
        """
        nbytes = sum(flat.nbytes for run in runs for flat in run)
        if nbytes > GATHER_BYTES or 2 * nbytes > self.free_bytes():
            return None
        try:
            gathered = [(torch.cat(list(run)),) for run in runs]
        except torch.OutOfMemoryError:  # other programs use the device, too
            return None
        self.follow()
        return gathered


class _CudaStream(CopyStream):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.page_lock = functools.partial(page_lock, device=device)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @torch.no_grad()
    def copy(self, targets: Sequence[Any], sources: Sequence[Any]) -> None:
        # With the device: else a thread whose device is another one would start CUDA there, too.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]


#: Type of a device -> the class of its streams; elsewhere copies are complete at once.
STREAMS: dict[str, type[CopyStream]] = {"cuda": _CudaStream}
_shared: dict[torch.device, CopyStream] = {}


def new_stream(device: torch.device) -> CopyStream:
    """A stream of copies to or from a device, which follows what the calling thread has queued there."""
    stream = STREAMS.get(device.type, CopyStream)(device)
    stream.follow()
    return stream


def shared_stream(device: torch.device) -> CopyStream:
    """The one stream of all saves from a device: a copy follows what any thread has let it follow."""
    # setdefault: of two threads that come first, both must get the same one.
    return _shared.get(device) or _shared.setdefault(device, new_stream(device))


def open_device(name: str) -> CopyStream:
    """A stream of copies to the device of that name; ConfigError if torch cannot use it here."""
    if not _DEVICE.fullmatch(str(name)):  # for other devices torch raises, or warns of, anything
        raise ConfigError(f"device={name!r}: give cpu, cuda, cuda:N or mps")
    try:
        device = torch.empty(0, device=str(name)).device  # with its index; the first use of CUDA fails here
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r}: {str(error).splitlines()[0]}") from None
    return new_stream(device)


def page_lock(address: int, nbytes: int, device: torch.device) -> Callable[[], None]:
    """Page-lock memory for the copies of a CUDA device; return what unlocks it, before it is unmapped.

    If that fails, as with a limit on locked memory, copies are slower: a warning says so once. CUDA keeps the
    last error of a thread, and torch raises it at that thread's next kernel: call it in one without kernels.
    """
    try:
        with torch.cuda.device(device):
            register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]
            failed = int(register(address, nbytes, _PORTABLE)) != 0
    except (RuntimeError, AssertionError):  # no device; a torch without CUDA
        failed = True
    if failed:
        _warn_once()
        return lambda: None
    process, getpid, is_finalizing = os.getpid(), os.getpid, sys.is_finalizing  # modules end before memory

    def unlock() -> None:
        if getpid() == process and not is_finalizing():  # a forked child cannot use CUDA
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    return unlock


@functools.cache
def _warn_once() -> None:
    text = "memory cannot be page-locked (see ulimit -l): copies from and to the GPU are slower"
    defer_warning(DistrustWarning(text))
