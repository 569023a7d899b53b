"""How much memory a save takes beyond the state: what people size their machines by."""

from __future__ import annotations

import sys

import pytest

from distrust.checkpoint import memory

MIB = 1 << 20
STATE_MIB = 256

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak can only be reset on Linux")

PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from distrust import Checkpoint, CheckpointManager

STATE_MIB = int(sys.argv[2])

def peak_of(call):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = peak()
    call()
    return peak() - before

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

checkpoint = Checkpoint(
    step=1,
    model={str(index): np.ones(16 << 17) for index in range(STATE_MIB // 32)},
    optimizer={"m": np.ones(STATE_MIB << 16)},
)
with CheckpointManager(sys.argv[1]) as manager:  # imports, once
    manager.save_async(Checkpoint(step=1, model={"w": np.ones(1 << 12)})).wait()
for save in (CheckpointManager.save, lambda manager, checkpoint: manager.save_async(checkpoint).wait()):
    with CheckpointManager(sys.argv[1]) as manager:
        print(peak_of(lambda: save(manager, checkpoint)))
        manager.validate(1)
"""


@pytest.mark.skipif(memory.available_bytes() < 6 * STATE_MIB * MIB, reason="too little memory is free")
def test_a_blocking_save_takes_64_mib_and_a_background_save_one_copy(tmp_path, run_python):
    done = run_python(PEAK, tmp_path, STATE_MIB)

    assert done.returncode == 0, done.stderr
    blocking, behind = map(int, done.stdout.split())
    assert blocking < 64 * MIB
    assert 0.95 * STATE_MIB * MIB < behind < 1.05 * STATE_MIB * MIB


MEASURED = """
from distrust.checkpoint.memory import peak_resident_bytes, resident_bytes, trim
import ctypes
before = resident_bytes()
blocks = [ctypes.create_string_buffer(b"x" * 60_000, 60_000) for _ in range(1_000)]  # small ones: no mmap
between = [ctypes.create_string_buffer(1) for _ in range(1_000)]
full = resident_bytes()
del blocks
trim()
print(full - before, resident_bytes() - before, peak_resident_bytes() - before)
"""


def test_what_a_process_takes_and_took_and_gives_back(run_python):
    done = run_python(MEASURED)
    taken, left, peak = map(int, done.stdout.split())
    assert 50 * MIB < taken < 70 * MIB
    assert left < 5 * MIB
    assert peak > taken - MIB  # the kernel counts in batches
