"""Train on examples from anywhere: any iterable of dicts, such as a generator over a database.

python examples/own_examples.py [STEPS]
"""

import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from distrust import DistrustTrainer, TrainConfig


def database() -> sqlite3.Connection:
    """A collection of claims, each with the provenance of its source."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE claim (question TEXT, answer TEXT, authority REAL, entropy REAL)")
    claims = [(f"What is {n} plus {n}?", f" {n + n}.", 0.1 * (n % 9), 0.5 + n % 3) for n in range(40)]
    connection.executemany("INSERT INTO claim VALUES (?, ?, ?, ?)", claims)
    return connection


def examples(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    """The same examples in the same order each time; otherwise a run cannot be resumed."""
    for question, answer, authority, entropy in connection.execute("SELECT * FROM claim ORDER BY rowid"):
        yield {
            "prompt": question,
            "completion": answer,
            "authority_weight": authority,
            "provenance_entropy": entropy,
        }


def main(out: str, steps: int) -> None:
    """Train the bundled model on them."""
    config = TrainConfig(out=out, max_steps=steps, batch_size=4, warmup_steps=2)
    ended = DistrustTrainer(config, examples=examples(database())).train()
    print(f"{ended.reason} at step {ended.step}: state digest {ended.state_digest}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder, steps=int(sys.argv[1]) if len(sys.argv) > 1 else 20)
