"""The coverage-guided engine: atheris (libFuzzer) leads the mutations to lines of the reader not yet reached.

A process of its own, started by :mod:`campaigns.fuzz`: libFuzzer ends the process when it is done, and
may end it when it finds something. What it mutates are whole files. Its own mutations of bytes would never
come past a digest, so each is one of ours (``families.mutated``), which signs what it made.

    python -m campaigns.fuzz.guided --seed 1 --runs 100000 --directory /dev/shm/guided
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]  # no types, and need not be there

INSTRUMENTED = ("format", "header", "tree", "store", "reading", "image", "compare")
with atheris.instrument_imports(
    include=[f"distrust.checkpoint.{name}" for name in INSTRUMENTED], enable_loader_override=False
):
    from distrust.checkpoint import (
        serialization,  # noqa: F401 - these and what they import
    )

# Behind the instrumented ones, which these import too.
from campaigns.campaign import CounterExample  # noqa: E402
from campaigns.fuzz import families, readers, specimens  # noqa: E402
from campaigns.fuzz.forging import Specimen  # noqa: E402

FINDING = "counterexample"
COUNTS = "counts.json"
EXECUTIONS = "executions"
_TOLD_EVERY = 1000
#: Of so many executions one is of a real file.
FILES_EVERY = 500
#: What was mutated often is refused at the first line: so many begin with a good one.
_FRESH = 0.3
MAX_BYTES = 1 << 18


class Engine:
    """What libFuzzer calls.

    Args:
        directory: for counts, findings and the files that are read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._counts: Counter[str] = Counter()
        self._readers = readers.Directory(directory / "files", *specimens.make(directory / "specimens"))

    @property
    def seeds(self) -> list[Specimen]:
        """What it begins with."""
        return self._readers.specimens

    def execute(self, raw: bytes) -> None:
        """Read one file."""
        self._counts[EXECUTIONS] += 1
        try:
            readers.in_memory(raw, self._readers.good, self._counts)
            if self._counts[EXECUTIONS] % FILES_EVERY == 0:
                self._readers.ask(raw, self._counts)
        except CounterExample as found:
            (self._directory / f"{FINDING}.safetensors").write_bytes(raw)
            (self._directory / f"{FINDING}.txt").write_text(str(found))
            self.tell()
            raise
        if self._counts[EXECUTIONS] % _TOLD_EVERY == 0:
            self.tell()

    def tell(self) -> None:
        """Write down what was done: the process ends without asking."""
        (self._directory / COUNTS).write_text(json.dumps(self._counts))

    def mutate(self, raw: bytes, max_size: int, seed: int) -> bytes:
        """Another file made of this one."""
        chance = Random(seed)
        fresh = len(raw) < 8 or chance.random() < _FRESH
        specimen = chance.choice(self.seeds) if fresh else Specimen(raw)
        made = families.mutated(specimen, chance)
        return made if len(made) <= max_size else raw


def main() -> None:
    """Run until libFuzzer ends the process."""
    arg = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg.add_argument("--seed", type=int, default=1, help="of libFuzzer")
    arg.add_argument("--runs", type=int, default=-1, help="how many executions")
    arg.add_argument("--seconds", type=int, default=0, help="how long")
    arg.add_argument("--directory", type=Path, required=True, help="for counts, findings and files")
    options = arg.parse_args()
    engine = Engine(options.directory)
    corpus = options.directory / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, specimen in enumerate(engine.seeds):
        (corpus / f"seed{number}").write_bytes(specimen.raw)
    flags = [
        f"-seed={options.seed}", f"-runs={options.runs}", f"-max_total_time={options.seconds}",
        f"-max_len={MAX_BYTES}", "-len_control=0", "-mutate_depth=2", "-timeout=120", "-rss_limit_mb=4096",
        f"-artifact_prefix={options.directory}/", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags], engine.execute, custom_mutator=engine.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
