"""What the runs of the campaign train: a model and data whose steps take milliseconds.

python -m campaigns.ranks.model FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

MODEL, RECORDS = "model", "records.jsonl"


def main(arguments: Sequence[str]) -> int:
    from distrust.testing.models import make_model, write_records

    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / MODEL)
    write_records(folder / RECORDS, 60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
