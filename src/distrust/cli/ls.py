"""The command ``distrust ls``."""

from __future__ import annotations

import sys
from pathlib import Path

from distrust.checkpoint import CheckpointFile, Scan, catalog, foreign
from distrust.cli.arguments import TARGET, parser, print_json
from distrust.reporting.display import number, printable, size


def main(arguments: list[str]) -> int:
    """List checkpoints by their headers; the data is not read."""
    arg = parser(
        "ls",
        description="Reads headers only; `distrust verify` reads everything.",
        examples=["distrust ls runs/train", "distrust ls runs/train --json | jq '.[-1].path'"],
    )
    arg.add_argument("target", type=Path, help=TARGET)
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)

    found = _scan(options.target)
    for damaged in found.damaged:
        warning = f"distrust: warning: {damaged.path}: damaged: {damaged.reason}"
        print(printable(warning), file=sys.stderr)
    if options.json:
        print_json([_row(file) for file in found.all_intact])
    elif found.all_intact:
        print(f"{'step':>8}  {'kind':8}  {'size':>8}  {'created (UTC)':19}  metrics")
        for file in found.all_intact:
            metrics = "  ".join(f"{name} {number(value)}" for name, value in _main_metrics(file))
            if file.is_foreign:
                metrics += f"{'  ' if metrics else ''}(older format: {file.format})"
            created = (file.created or "")[:19].replace("T", " ")
            row = f"{file.step:>8}  {file.kind:8}  {size(file.bytes):>8}  {created:19}  {metrics}"
            print(printable(row))
    else:
        adjective, hint = ("intact ", "") if found.damaged else ("", foreign.import_hint(options.target))
        print(printable(f"no {adjective}checkpoints in {options.target}{hint}"))
    return 0


def _scan(target: Path) -> Scan:
    if catalog.is_directory(target):
        return catalog.scan(catalog.checkpoint_directory(target))
    catalog.require_exists(target)
    one = (catalog.read_header(target),)
    return Scan((), (), one) if one[0].is_foreign else Scan(one, ())


def _main_metrics(file: CheckpointFile) -> list[tuple[str, float]]:
    """Of a run the main ones, and what its best checkpoint is told by; of what others save, all."""
    best_by = file.header.run_info.get("extra", {}).get("metric")
    main = ("loss", "eval_loss", "tokens_seen", best_by)
    return [item for item in sorted(file.metrics.items()) if best_by is None or item[0] in main]


def _row(file: CheckpointFile) -> dict[str, object]:
    return {
        "step": file.step,
        "kind": file.kind,
        "path": str(file.path),
        "format": file.format,
        "bytes": file.bytes,
        "created": file.created,
        "metrics": file.metrics,
    }
