"""The coverage-guided engine: atheris (libFuzzer) leads the mutations to lines of the reader not yet reached.

It is a process of its own: libFuzzer ends the process when it is done. Its own mutations of bytes would never
get past a digest, so each is one of ours (``families.mutate``), which signs the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]  # untyped, and optional

INSTRUMENTED = ("format", "header", "tree", "catalog", "verified_read", "serialization", "compare")
with atheris.instrument_imports(
    include=[f"distrust.checkpoint.{name}" for name in INSTRUMENTED], enable_loader_override=False
):
    from distrust.checkpoint import (
        serialization,  # noqa: F401 - imports all of them
    )

# After the instrumented modules, which these import too.
from campaigns.campaign import CounterExample  # noqa: E402
from campaigns.fuzz import families, readers  # noqa: E402
from campaigns.fuzz.forging import Specimen, make_specimens  # noqa: E402

FINDING = "counterexample"  # name of the file that is kept
COUNTS = "counts.json"  # read by the campaign
EXECUTIONS = "executions"  # label of the counts
_COUNTS_EVERY = 1000  # executions
#: One in so many executions reads a real file.
FILES_EVERY = 500
#: Repeated mutations are refused at the first line, so many start from a valid file.
_FRESH = 0.3
MAX_BYTES = 1 << 18  # of a mutated file


class Engine:
    """The callbacks of libFuzzer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory  # for counts, findings and the files that are read
        self._counts: Counter[str] = Counter()
        self._readers = readers.Directory(directory / "files", *make_specimens(directory / "specimens"))
        self.seeds = self._readers.specimens

    def execute(self, raw: bytes) -> None:
        self._counts[EXECUTIONS] += 1
        try:
            readers.read_in_memory(raw, self._readers.valid, self._counts)
            if self._counts[EXECUTIONS] % FILES_EVERY == 0:
                self._readers.read(raw, self._counts)
        except CounterExample as error:
            (self._directory / f"{FINDING}.safetensors").write_bytes(raw)
            (self._directory / f"{FINDING}.txt").write_text(str(error))
            self._write_counts()
            raise
        if self._counts[EXECUTIONS] % _COUNTS_EVERY == 0:
            self._write_counts()

    def mutate(self, raw: bytes, max_size: int, seed: int) -> bytes:
        rng = Random(seed)
        fresh = len(raw) < 8 or rng.random() < _FRESH
        specimen = rng.choice(self.seeds) if fresh else Specimen(raw)
        mutated = families.mutate(specimen, rng)
        return mutated if len(mutated) <= max_size else raw

    def _write_counts(self) -> None:
        """Regularly: libFuzzer ends the process without a callback."""
        (self._directory / COUNTS).write_text(json.dumps(self._counts))


def main() -> None:
    """Run until libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--seed", "--runs", "--seconds"):  # of libFuzzer; -1 runs and 0 seconds are no limit
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="for counts, findings and files")
    options = parser.parse_args()
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
