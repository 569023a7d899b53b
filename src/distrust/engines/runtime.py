"""What both engines share at run time: the choice of a device, seeds, and errors for exhausted memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from blake3 import blake3

from distrust.config import Device
from distrust.errors import ConfigError, OutOfMemory


def choose_device(requested: Device, available: Mapping[Device, bool], *, engine: str) -> Device:
    """The device that ``--device`` selects.

    Raises:
        ConfigError: if this machine, or this build of the framework, does not have the device.
    """
    usable = [name for name, is_available in available.items() if is_available]
    if requested == "auto":
        return usable[0]
    if requested not in usable:
        raise ConfigError(
            f"--device {requested}: not available to {engine} here; available: {', '.join(usable)}"
        )
    return requested


def micro_step_seed(*, seed: int, step: int, micro_step: int) -> int:
    """A 63-bit seed of a micro-step: a function of these three, so no earlier random draw can shift it."""
    digest = blake3(f"micro-step {seed} {step} {micro_step}".encode()).digest(8)
    return int.from_bytes(digest, "little") >> 1  # generators take a signed 64-bit integer


@contextlib.contextmanager
def translate_out_of_memory(*phrases: str) -> Iterator[None]:
    """Context manager that turns a framework's out-of-memory errors into OutOfMemory.

    The lower-case ``phrases`` identify them among plain RuntimeErrors; a subclass always is one.

    Raises:
        OutOfMemory: with the options that reduce memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if type(error) is RuntimeError and not any(phrase in reason.lower() for phrase in phrases):
            raise
        raise OutOfMemory(
            "there is not enough memory for a step: lower --batch-size (and raise --gradient-accumulation) "
            f"or --max-length, or add --gradient-checkpointing ({reason[:200]})"
        ) from error
