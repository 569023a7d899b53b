#!/usr/bin/env python3
"""Plants faults, one at a time, and checks that the tests notice each.

    python scripts/mutants.py                       # every fault in scripts/mutants/*.toml
    python scripts/mutants.py protocol fsync        # those of an area, or with a text in their names
    python scripts/mutants.py --sample 6 --seed 7   # six at random

Works in a scratch copy of the repository, so the checkout never has a fault. First the tests of all selected
faults must pass there. Then each fault is planted, at least one of its tests must fail, and it is taken out
again. A fault that no test notices survives: a test is missing. Prints one line per fault, and exits with
1 if any survived or could not be judged. Standard library only; pytest runs the tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = "scripts/mutants"
#: What the tests need. Not everything in the folder: environments and runs are large.
COPIED = (
    "src", "tests", "campaigns", "scripts", "experiments", "benchmarks", "examples", "docs",
    "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile",
)  # fmt: skip
#: Tests that load a framework, or start many processes.
_SLOW_FOLDERS = tuple(
    f"tests/{name}/"
    for name in ("campaigns", "cli", "engines", "export", "importers", "integrations", "ranks")
)
#: A plugin: hypothesis ends at the first example that fails, without a search for a simpler one.
_FIRST_FAILURE = """
from hypothesis import Phase, settings
settings.register_profile("first failure", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("first failure")
"""
#: A test that fails with one of these shows that the fault cannot run, not that the test notices it.
_BROKEN = re.compile(r"^E +((?:Name|UnboundLocal|Import|ModuleNotFound|Syntax|Indentation)Error\b.*)", re.M)


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests of which at least one must fail with it."""

    area: str  # name of its file in the table
    name: str  # what is broken, in plain words
    file: str  # relative to the repository
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]  # as pytest takes them: file, or file::name
    slow: bool = False  # its tests take more than a few seconds

    @property
    def is_quick(self) -> bool:
        """Whether its tests take seconds."""
        return not self.slow and not any(test.startswith(_SLOW_FOLDERS) for test in self.tests)

    def apply(self, root: Path) -> str:
        """The text of the file with the fault. Raises ValueError if the row does not apply."""
        text = (root / self.file).read_text("utf-8") if (root / self.file).is_file() else ""
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"`old` occurs {count} times in {self.file}, or equals `new`: correct the row")
        mutated = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            compile(mutated, self.file, "exec")  # SyntaxError is no ValueError: see check()
        return mutated

    def check(self, root: Path) -> str | None:
        """What is wrong with the row, or None."""
        try:
            self.apply(root)
        except (ValueError, SyntaxError) as error:
            return str(error)
        missing = [test for test in self.tests if not _exists(root, test)]
        if missing or not self.tests:
            return f"no such test: {', '.join(missing) or 'none is named'}"
        return None


def _exists(root: Path, test: str) -> bool:
    file, *names = test.partition("[")[0].split("::")
    return (root / file).is_file() and _definitions(root / file).issuperset(names)


@functools.cache
def _definitions(path: Path) -> frozenset[str]:
    """The names of the functions and classes in a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(
        node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)
    )


def read_table(root: Path) -> list[Mutant]:
    """All faults, by area. Raises ValueError for a row that is none."""
    mutants = []
    for path in sorted((root / TABLE).glob("*.toml")):
        try:
            rows = tomllib.loads(path.read_text("utf-8"))["mutant"]
            mutants += [Mutant(path.stem, **{**row, "tests": tuple(row["tests"])}) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a table of faults: {error}") from None
    return mutants


class Copy:
    """A scratch copy of the repository, in which tests run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for path in filter(Path.exists, (root / name for name in COPIED)):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, symlinks=True)  # with the compiled files
            else:
                shutil.copy(path, folder / path.name)
        (folder / "first_failure.py").write_text(_FIRST_FAILURE)

    @contextlib.contextmanager
    def plant(self, mutant: Mutant) -> Iterator[None]:
        """Context manager: the copy has the fault within its block."""
        path = self.folder / mutant.file
        original = path.read_bytes()
        path.write_text(mutant.apply(self.folder), "utf-8")
        # Python compares only size and seconds: it could take the compiled file for that of the new text.
        compiled = Path(importlib.util.cache_from_source(str(path)))
        compiled.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.write_bytes(original)
            compiled.unlink(missing_ok=True)

    def run(self, tests: Sequence[str], limit: float) -> tuple[int | None, str]:
        """Run tests in one process; return the exit code, None after ``limit`` seconds, and the output."""
        # Nothing of a pytest that runs this one, and no plugins but two, which load in a second.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-p", "hypothesispytest", "--hypothesis-seed=0", "-p", "first_failure"]
        command += [f"--basetemp={self.folder / 'tmp'}"]
        with tempfile.TemporaryFile("w+", errors="replace") as output:  # no pipe: children may hold it open
            process = subprocess.Popen(
                [*command, *tests],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            code = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # a fault may leave children behind
                process.wait()
            output.seek(0)
            return code, output.read()


def judge(copy: Copy, mutant: Mutant, limit: float) -> tuple[str, str]:
    """The verdict on a fault, caught, survived, skipped or error, and the reason for an error."""
    problem = mutant.check(copy.folder)
    if problem:
        return "error", problem
    with copy.plant(mutant):
        code, output = copy.run(mutant.tests, limit)
    if code is None:
        return "error", f"its tests took more than {limit:g} s: choose others, or another fault"
    if code == 0:
        return ("survived" if " passed" in output else "skipped"), ""
    broken = _BROKEN.search(output)
    if code != 1 or broken:
        return "error", broken[1] if broken else f"pytest ended with {code}: {output.strip()[-300:]}"
    return "caught", ""


def select(mutants: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """The faults that the options name."""
    if options.names:
        mutants = [m for m in mutants if any(name in (m.area,) or name in m.name for name in options.names)]
    if options.quick:
        mutants = [mutant for mutant in mutants if mutant.is_quick]
    if options.sample is not None:
        sample = random.Random(options.seed).sample(range(len(mutants)), min(options.sample, len(mutants)))
        mutants = [mutants[index] for index in sorted(sample)]
    return mutants


def run(root: Path, mutants: list[Mutant], *, jobs: int, limit: float) -> int:
    """Plant the faults and print the verdicts; return the exit code."""
    begin = time.monotonic()
    copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()  # those that nobody uses

    def work(mutant: Mutant) -> tuple[str, str, float]:
        copy, start = copies.get(), time.monotonic()
        try:
            return *judge(copy, mutant, limit), time.monotonic() - start
        finally:
            copies.put(copy)

    verdicts: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        for number in range(jobs):
            copies.put(copy := Copy(root, Path(folder, str(number))))
        if not passes_without_fault(copy, mutants, limit):
            return 1
        try:
            for mutant, (verdict, reason, seconds) in zip(mutants, pool.map(work, mutants), strict=True):
                verdicts[verdict] += 1
                name = f"{mutant.area}: {mutant.name}"
                print(f"[{verdicts.total()}/{len(mutants)}] {verdict:8} {seconds:5.1f} s  {name}", flush=True)
                if verdict in ("survived", "error"):
                    failures.append(f"{verdict}: {name}\n    {reason or f'no test noticed: {mutant.tests}'}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C begins no other fault
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    print(f"{len(mutants)} faults in {time.monotonic() - begin:.0f} s: {counts}", *failures, sep="\n")
    return 1 if failures else 0


def passes_without_fault(copy: Copy, mutants: list[Mutant], limit: float) -> bool:
    """Whether the tests of all faults pass in the copy; prints what does not."""
    tests = list(
        dict.fromkeys(test for mutant in mutants if not mutant.check(copy.folder) for test in mutant.tests)
    )
    if not tests:
        return True
    print(f"without a fault: {len(tests)} tests or files", flush=True)
    begin = time.monotonic()
    code, output = copy.run(tests, limit * len(tests))
    if code == 0:
        print(f"all passed in {time.monotonic() - begin:.0f} s", flush=True)
        return True
    print(output, f"error: without a fault they must pass; pytest ended with {code}", sep="\n")
    return False


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="areas, or parts of the names of faults; all by default")
    parser.add_argument("--list", action="store_true", help="only list the faults and their tests")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only those whose tests take seconds")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="how many at once (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=float, default=120, metavar="S", help="seconds per fault (default: %(default)g)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    options = parser.parse_args(arguments)
    try:
        mutants = select(read_table(options.root), options)
    except ValueError as error:
        parser.error(str(error))
    if not mutants:
        parser.error("no fault has such a name")
    if options.list:
        for mutant in mutants:
            print(f"{mutant.area}: {mutant.name}\n    {mutant.file}: {' '.join(mutant.tests)}")
        return 0
    return run(options.root, mutants, jobs=max(1, options.jobs), limit=options.limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
