"""What the mirror costs, on SeaweedFS on this machine: ratios to what the same client does without it.

    python -m benchmarks.remote
    python -m benchmarks.remote --mib 64 --repeats 3     # a quick look

Every figure is from a fresh process. The cases of a repeat run one after the other, every second time in
reverse order; a ratio is taken within one repeat, and the table shows the median of the ratios, the smallest
and the largest. The store shares the cores with what is measured, so seconds say little about a network.
Stall is the time that a training loop spends in its saves. Memory is the peak of the process during the
transfer beyond what it had before. CPU is that of the process, without the store's: where the store leaves no
core idle, it is time. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.driver import ROOT
from campaigns.remote.proxy import PASS, Action, Proxy, Request
from campaigns.remote.servers import Store, seaweedfs
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import parallel
from distrust.checkpoint.format import tensor_hasher
from distrust.checkpoint.remote import client as clients
from distrust.checkpoint.remote import fetch
from distrust.checkpoint.remote.line import RemoteFile, parse_key
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.mirror import Mirror
from distrust.checkpoint.remote.remote_run import RemoteRun

Figures = dict[str, float]
LISTED = 100  # checkpoints
SAVES, STEPS_PER_SAVE, STEP_SECONDS = 8, 20, 0.02  # of the loop whose stall is measured
STALL_MIB = 20  # of its state


def make_checkpoint(mib: int, step: int) -> Checkpoint:
    rng = np.random.default_rng(step)
    parts = max(1, mib // 64)
    arrays = {str(part): rng.random((mib << 20) // parts // 8) for part in range(parts)}
    return Checkpoint(step=step, model={}, optimizer=arrays, rng={})


def memory(name: str) -> int:
    """A figure of this process in MiB, such as ``VmRSS`` or ``VmHWM``, its peak."""
    (line,) = (
        one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name + ":")
    )
    return int(line.split()[1]) >> 10


class Peak:
    """The memory of a block beyond what there was before, in MiB."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._before = memory("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.mib = max(0, memory("VmHWM") - self._before)


def raw_upload(folder: Path, url: str, mib: int) -> Figures:
    """The client's own upload of a file in parts."""
    path = CheckpointManager(folder).save(make_checkpoint(mib, 1))
    client: Any = clients.connect(parse(url, "URL"))
    client.put("warm", b"1")
    with Peak() as peak, path.open("rb") as file:
        began = time.perf_counter()
        client._obstore.put(
            client._store,
            client._prefix + path.name,
            file,
            chunk_size=clients.PART_BYTES,
            max_concurrency=clients.PARTS_IN_FLIGHT,
        )
        seconds = time.perf_counter() - began
    client.delete(path.name)
    return {"seconds": seconds, "peak_mib": peak.mib}


def mirror_upload(folder: Path, url: str, mib: int) -> Figures:
    """From the moment that a checkpoint is durable here until it is there."""
    behind: list[float] = []
    settings = Mirror(url, on_mirrored=lambda step, where, seconds: behind.append(seconds))
    with CheckpointManager(folder, mirror=settings) as manager:
        manager.save(make_checkpoint(1, 1))  # the term is taken
        checkpoint = make_checkpoint(mib, 2)
        pending = manager.save_async(checkpoint)
        pending.wait()
        with Peak() as peak:
            pending.wait_mirrored()
    client = clients.connect(parse(url, "URL"))
    for info in client.list():
        client.delete(info.key)
    return {"seconds": behind[-1], "peak_mib": peak.mib}


def _read_there(url: str, path: Path, read: Callable[[clients.Client, RemoteFile], object]) -> Figures:
    """Measure one way to read a file from the store."""
    client = clients.connect(parse(url, "URL"))
    with path.open("rb") as content:
        client.put(path.name, content)
    (file,) = filter(None, map(parse_key, client.list()))
    with Peak() as peak:
        began, cpu_began = time.perf_counter(), time.process_time()
        read(client, file)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    client.delete(file.key)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak.mib}


def raw_reads(folder: Path, url: str, mib: int) -> Figures:
    """The client's own reads of ranges, as many at once as the download makes."""

    def read_all(client: clients.Client, file: RemoteFile) -> None:
        def read(begin: int) -> None:
            client.read(file.key, begin, min(begin + fetch.RANGE_BYTES, file.size))

        parallel.run(read, range(0, file.size, fetch.RANGE_BYTES), threads=fetch.RANGES_IN_FLIGHT)

    return _read_there(url, CheckpointManager(folder).save(make_checkpoint(mib, 1)), read_all)


def download(folder: Path, url: str, mib: int) -> Figures:
    """Fetched, verified, and durable."""

    def fetch_one(client: clients.Client, file: RemoteFile) -> None:
        RemoteRun(parse(url, "URL"), client).fetch([file], folder / "fetched")

    return _read_there(url, CheckpointManager(folder).save(make_checkpoint(mib, 1)), fetch_one)


def verification(folder: Path, url: str, mib: int) -> Figures:
    """Read and verified, and not written."""
    return _read_there(url, CheckpointManager(folder).save(make_checkpoint(mib, 1)), fetch.verify)


def digests(folder: Path, url: str, mib: int) -> Figures:
    """Of as many bytes, which are in memory, and nothing else."""
    content = bytes(fetch.BLOCK_BYTES)
    began, cpu_began = time.perf_counter(), time.process_time()
    hasher = tensor_hasher(all_cores=False)
    for _ in range((mib << 20) // fetch.BLOCK_BYTES):
        hasher.update(content)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}


def _stall(folder: Path, mirror: Mirror | None) -> Figures:
    checkpoint = make_checkpoint(STALL_MIB, 0)
    stalls: list[float] = []
    with CheckpointManager(folder, mirror=mirror, keep_last=2) as manager:
        manager.save(checkpoint)
        began = time.perf_counter()
        for step in range(1, SAVES * STEPS_PER_SAVE + 1):
            time.sleep(STEP_SECONDS)
            if step % STEPS_PER_SAVE == 0:
                saving = time.perf_counter()
                pending = manager.save_async(
                    Checkpoint(step=step, model={}, optimizer=checkpoint.optimizer, rng={})
                )
                pending.wait_copied()
                stalls.append(time.perf_counter() - saving)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "stall_seconds": statistics.median(stalls)}


def stall_with(folder: Path, url: str, mib: int) -> Figures:
    """A loop that saves, with a mirror."""
    return _stall(folder, Mirror(url))


def stall_without(folder: Path, url: str, mib: int) -> Figures:
    """The same loop without one."""
    return _stall(folder, None)


CASES: dict[str, Callable[[Path, str, int], Figures]] = {
    case.__name__: case
    for case in (
        raw_upload,
        mirror_upload,
        raw_reads,
        download,
        verification,
        digests,
        stall_without,
        stall_with,
    )
}


def listing(store: Store, folder: Path) -> Counter[str]:
    """The requests of ``distrust ls`` for a hundred checkpoints, by kind."""
    url = store.fresh_url()
    client = clients.connect(parse(url, "URL"))
    with CheckpointManager(folder, keep_last=None) as manager:
        for step in range(1, LISTED + 1):
            path = manager.save(make_checkpoint(1, step))
            with path.open("rb") as file:
                client.put(path.name, file)
    requests: Counter[str] = Counter()

    def count(request: Request) -> Action:
        requests[request.kind] += 1
        return PASS

    with Proxy(store.port) as proxy:
        proxy.behave(count)
        environment = {**_environment(), **store.through(proxy.port).environment}
        command = [sys.executable, "-m", "distrust", "ls", url]
        process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    if process.stdout.count(".safetensors") < LISTED and process.stdout.count("\n") < LISTED:
        raise RuntimeError(f"not all are listed: {process.stdout[-500:]}")
    return requests


class Row(NamedTuple):
    """A line of the table: the figure of one case over that of another."""

    name: str
    case: str
    reference: str
    figure: str
    target: str


ROWS = (
    Row("mirror upload / raw upload in parts", "mirror_upload", "raw_upload", "seconds", "≤ 1.05"),
    Row("download, verified and durable / raw ranged reads", "download", "raw_reads", "seconds", "≤ 1.15"),
    Row("verification there / raw ranged reads", "verification", "raw_reads", "seconds", "≤ 1.15"),
    Row("stall of a save with a mirror / without", "stall_with", "stall_without", "stall_seconds", "1.00"),
    Row("time of the loop with a mirror / without", "stall_with", "stall_without", "seconds", "1.00"),
)


def _row(name: str, values: Sequence[float], digits: int, target: str = "") -> str:
    shown = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"| {name.replace('_', ' ')} | {' | '.join(shown)} | {target} |"


def table(repeats: list[dict[str, Figures]], requests: Counter[str], mib: int) -> str:
    lines = ["| | median | least | most | target |", "|---|---:|---:|---:|---:|"]
    for row in ROWS:
        ratios = [one[row.case][row.figure] / one[row.reference][row.figure] for one in repeats]
        lines.append(_row(row.name, ratios, 2, row.target))
    lines += [
        _row(f"memory of {case}, MiB", [one[case]["peak_mib"] for one in repeats], 0, "≤ 64")
        for case in ("mirror_upload", "download", "verification")
    ]
    lines += [
        _row(f"{case}, MiB/s", [mib / one[case]["seconds"] for one in repeats], 0)
        for case in ("raw_upload", "mirror_upload", "raw_reads", "download", "verification")
    ]
    lines += [
        _row(f"CPU of {case}, s/GiB", [one[case]["cpu_seconds"] * 1024 / mib for one in repeats], 2)
        for case in ("raw_reads", "download", "verification", "digests")
    ]
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(requests.items()))
    total = sum(requests.values())
    lines.append(f"| requests of `ls` of {LISTED} checkpoints ({kinds}) | {total} | | | ≤ {2 * LISTED} |")
    return "\n".join(lines)


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def _child(name: str, options: argparse.Namespace, store: Store) -> Figures:
    with tempfile.TemporaryDirectory(dir=options.directory, prefix=".bench-") as folder:
        command = [sys.executable, "-m", "benchmarks.remote", "--child", name, "--directory", folder]
        command += ["--mib", str(options.mib), "--url", store.fresh_url()]
        environment = {**_environment(), **store.environment}
        process = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    figures: Figures = json.loads(process.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run the repeats, and print the table."""
    options = _options()
    if options.child is not None:
        print(json.dumps(CASES[options.child](options.directory, options.url, options.mib)))
        return
    repeats: list[dict[str, Figures]] = []
    with seaweedfs() as store, tempfile.TemporaryDirectory(dir=options.directory, prefix=".bench-") as folder:
        store.set_environment()
        for index in range(options.repeats):
            names = list(CASES) if index % 2 == 0 else list(CASES)[::-1]
            figures = {}
            for name in names:
                figures[name] = _child(name, options, store)
                print(f"repeat {index + 1}: {name}: {figures[name]}", file=sys.stderr, flush=True)
            repeats.append(figures)
        requests = listing(store, Path(folder))
    print(f"{options.mib} MiB, {options.repeats} repeats, SeaweedFS on this machine\n")
    print(table(repeats, requests, options.mib))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.remote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the state; default: 1024")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--directory", type=Path, default=Path(), help="default: the current folder")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.directory = options.directory.resolve()
    if options.mib < 1 or options.repeats < 1:
        parser.error("--mib and --repeats: give 1 or more")
    return options


if __name__ == "__main__":
    main()
