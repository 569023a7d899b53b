"""How much memory a save needs in addition to the state."""

from __future__ import annotations

import sys

import pytest

from distrust.checkpoint import memory

MIB = 1 << 20
STATE_MIB = 256

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak memory can only be reset on Linux")

PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from distrust import Checkpoint, CheckpointManager

STATE_MIB = int(sys.argv[2])

def peak_of(call):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    initial = peak()
    call()
    return peak() - initial

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


@pytest.mark.skipif(memory.available_bytes() < 6 * STATE_MIB * MIB, reason="not enough free memory")
def test_blocking_save_needs_64_mib_and_background_save_one_copy(tmp_path, run_python):
    process = run_python(PEAK, tmp_path, STATE_MIB)

    assert process.returncode == 0, process.stderr
    blocking, background = map(int, process.stdout.split())
    assert blocking < 64 * MIB
    assert 0.95 * STATE_MIB * MIB < background < 1.05 * STATE_MIB * MIB


RESIDENT = """
from distrust.checkpoint.memory import peak_resident_bytes, resident_bytes, trim
import ctypes
initial = resident_bytes()
blocks = [ctypes.create_string_buffer(b"x" * 60_000, 60_000) for _ in range(1_000)]  # too small for mmap
_separators = [ctypes.create_string_buffer(1) for _ in range(1_000)]
full = resident_bytes()
del blocks
trim()
print(full - initial, resident_bytes() - initial, peak_resident_bytes() - initial)
"""


def test_resident_memory_peak_and_trim(run_python):
    process = run_python(RESIDENT)
    allocated, trimmed, peak = map(int, process.stdout.split())
    assert 50 * MIB < allocated < 70 * MIB
    assert trimmed < 5 * MIB
    assert peak > allocated - MIB  # the kernel counts in batches
