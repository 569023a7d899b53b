"""The command ``distrust ls``: the checkpoints of a run, or the runs in a folder."""

from __future__ import annotations

from pathlib import Path

from distrust.checkpoint import CheckpointFile, Scan, foreign
from distrust.cli import targets
from distrust.cli.arguments import TARGET, attributes, parser, print_json
from distrust.errors import CheckpointError, RemoteError, printable, warn
from distrust.reporting.display import number, size
from distrust.run_record import RunRecord


def main(arguments: list[str]) -> int:
    """List checkpoints, or runs."""
    arg = parser(
        "ls",
        description="Reads only the headers of the files; `distrust verify` reads everything.",
        examples=[
            "distrust ls runs/train",
            "distrust ls runs",
            "distrust ls s3://bucket/runs/train",
            "distrust ls runs/train --json | jq '.[-1].path'",
        ],
    )
    arg.add_argument("target", type=targets.target, help=f"{TARGET}; or a folder of runs")
    arg.add_argument("--json", action="store_true", help="print a list of objects")
    options = arg.parse_args(arguments)

    contents = targets.scan(options.target)  # headers only
    for damaged in contents.damaged:
        warn(f"{damaged.path}: damaged: {damaged.reason}")
    is_empty = not contents.all_intact and not contents.damaged  # damaged files are a listing, too
    if is_empty and (runs := _runs(options.target)):
        if options.json:
            print_json([_run_json(path, scan) for path, scan in runs.items()])
        else:
            _print_runs(runs)
    elif options.json:
        columns = ("step", "kind", "path", "format", "bytes", "created", "metrics")  # created: ISO 8601, UTC
        print_json([attributes(file, *columns) for file in contents.all_intact])
    elif contents.all_intact:
        _print_checkpoints(contents)
    else:
        is_foreign = not contents.damaged and isinstance(options.target, Path)
        adjective = "intact " if contents.damaged else ""
        hint = foreign.import_hint(options.target) if is_foreign else ""
        print(printable(f"no {adjective}checkpoints in {options.target}{hint}"))
    return 0


def _runs(source: targets.Target) -> dict[Path, Scan]:
    """The runs directly below a folder, by name: folders with a directory of checkpoints."""
    runs = {}
    for run in targets.runs(source):
        try:
            runs[targets.path_of(run)] = targets.scan(run)
        except (CheckpointError, RemoteError) as error:  # one unreadable run must not hide the others
            warn(str(error))
    return runs


def _print_checkpoints(contents: Scan) -> None:
    print(f"{'step':>8}  {'kind':8}  {'size':>8}  {'created (UTC)':19}  metrics")
    for file in contents.all_intact:
        metrics = [f"{name} {number(value)}" for name, value in _main_metrics(file)]
        if file.is_foreign:
            metrics.append(f"(older format: {file.format})")
        columns = f"{file.step:>8}  {file.kind:8}  {size(file.bytes):>8}  {_format_date(file):19}"
        print(printable(f"{columns}  {'  '.join(metrics)}"))


def _main_metrics(file: CheckpointFile) -> list[tuple[str, float]]:
    """The main metrics of a run's checkpoint, among them the one that chooses the best; else all metrics."""
    best_by = RunRecord.from_header(file.header).settings.get("metric")
    main = ("loss", "eval_loss", "tokens_seen", best_by)  # best_by is None for other programs
    return [item for item in sorted(file.metrics.items()) if best_by is None or item[0] in main]


def _print_runs(runs: dict[Path, Scan]) -> None:
    names = [printable(path.name) for path in runs]  # before aligning: escapes change the length
    width = max(map(len, names))
    print(f"{'run':{width}}  {'step':>8}  {'kind':8}  {'created (UTC)':19}  checkpoints")
    for name, contents in zip(names, runs.values(), strict=True):
        files, damaged = contents.all_intact, contents.damaged
        count = f"{len(files)}{f', {len(damaged)} damaged' if damaged else ''}"
        step, kind, created = (
            (files[-1].step, files[-1].kind, _format_date(files[-1])) if files else ("-",) * 3
        )
        print(printable(f"{name:{width}}  {step:>8}  {kind:8}  {created:19}  {count}"))


def _format_date(file: CheckpointFile) -> str:
    return (file.created or "")[:19].replace("T", " ")  # without fractions and time zone


def _run_json(path: Path, contents: Scan) -> dict[str, object]:
    files = contents.all_intact
    newest = files[-1] if files else None  # sorted by step
    return {
        "run": path,
        "step": newest and newest.step,
        "kind": newest and newest.kind,
        "created": newest and newest.created,
        "checkpoints": len(files),
        "damaged": len(contents.damaged),
    }
