"""The results as tables, in the terminal and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.operations import EXTRA, OPERATIONS, TARGETS, Kind, Operation, Row, Target
from benchmarks.results import NOT_INSTALLED, Figure, Results
from benchmarks.states import Spec

HEADS = ("", "min", "median", "max", "limit / time", "time / ours", "extra memory")
TARGET_HEADS = ("target", "state", "bound", "median", "min to max", "reached")
NOTES = (
    "Times in ms. limit / time: 1.00 is as fast as the hardware. time / ours: above 1 the other library "
    "is slower; **below 1 it is faster**. Ratios are medians of the ratios within each repeat. Extra memory: "
    "the rise of resident memory above its level with the state in memory. ° marks the limit. Each target "
    "states its own bound."
)


#: Fewer repeats are not enough to judge a target.
ENOUGH = 3


@dataclass(frozen=True, slots=True)
class Line:
    """A row and its cells.

    Attributes:
        kind: ours, a limit, or another library.
        cells: as many as there are heads.
        faster: whether it is another library that is faster than ours.
    """

    kind: Kind
    cells: tuple[str, ...]
    faster: bool = False


def sections(results: Results, spec: Spec) -> Iterator[tuple[str, list[Line]]]:
    """Each operation that was measured with a state."""
    tried = {*results.samples.get(spec.text, {}), *results.failures.get(spec.text, {})}
    for operation in OPERATIONS:
        rows = [row for row in operation.rows if row.figure.case in tried]
        if rows:
            yield operation.title, [_line(results, spec, operation, row) for row in rows]


def targets(results: Results, specs: Sequence[Spec]) -> list[tuple[str, ...]]:
    """A row for each target and state; those without figures are left out."""
    rows: list[tuple[str, ...]] = []
    for target in TARGETS:
        for spec in filter(target.fits, specs):
            values = target.values(results, spec)
            if values:
                median = statistics.median(values)
                bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
                spread = f"{_number(min(values))} to {_number(max(values))}"
                verdict = "yes" if target.is_reached(median) else "NO"
                if len(values) < ENOUGH:
                    verdict = "too few"
                rows.append(
                    (
                        _target_title(results, spec, target),
                        spec.title,
                        bound,
                        _number(median),
                        spread,
                        verdict,
                    )
                )
    return rows


def for_terminal(results: Results, specs: Sequence[Spec]) -> Iterator[Table]:
    """The tables, in colour: ours bold, limits dim, faster libraries red."""
    for spec in specs:
        table = Table(title=f"\n{spec.title}", title_justify="left", title_style="bold", box=None)
        for position, head in enumerate(HEADS):
            table.add_column(head, justify="right" if position else "left", no_wrap=True)
        for title, lines in sections(results, spec):
            table.add_row(f"[bold cyan]{title}[/]")
            for line in lines:
                style = {"ours": "bold", "peer": "", "limit": "dim"}[line.kind]
                table.add_row(f"  {line.cells[0]}", *line.cells[1:], style="red" if line.faster else style)
        if table.row_count:
            yield table
    aims = Table(title="\ntargets", title_justify="left", title_style="bold", box=None)
    for position, head in enumerate(TARGET_HEADS):
        aims.add_column(head, justify="right" if position > 1 else "left")
    for row in targets(results, specs):
        aims.add_row(*row, style="red" if row[-1] == "NO" else "")
    if aims.row_count:
        yield aims


def markdown(results: Results, specs: Sequence[Spec], about: str) -> str:
    """The same as Markdown."""
    parts = [about, NOTES]
    rows = targets(results, specs)
    if rows:
        parts.append(_markdown_table(TARGET_HEADS, [tuple(_bold(row)) for row in rows], left=2))
    for spec in specs:
        for title, lines in sections(results, spec):
            parts.append(f"**{spec.title}: {title}**")
            cells = [
                line.cells if line.kind == "peer" and not line.faster else _mark_cells(line) for line in lines
            ]
            parts.append(_markdown_table(HEADS, cells, left=1))
    return "\n\n".join(parts) + "\n"


def _target_title(results: Results, spec: Spec, target: Target) -> str:
    best = None if target.best_of is None else results.least(spec, target.best_of)
    if best is None:
        return target.text
    labels = {row.figure: row.label for operation in OPERATIONS for row in operation.rows}
    return f"{target.text} {labels[best]}"


def _line(results: Results, spec: Spec, operation: Operation, row: Row) -> Line:
    values = results.values(spec, row.figure)
    limit = results.least(spec, operation.limit)
    label = f"{row.label} °" if row.figure == limit else row.label
    if not values:
        reason = results.failures.get(spec.text, {}).get(row.figure.case)
        short = NOT_INSTALLED if reason == NOT_INSTALLED else "failed"  # the JSON has everything
        return Line(row.kind, (label, short, *[""] * (len(HEADS) - 2)))
    of_limit = None if limit is None else results.ratio(spec, limit, row.figure)
    of_ours = results.ratio(spec, row.figure, operation.ours)
    extra = results.median(spec, Figure(row.figure.case, EXTRA))
    cells = (
        label,
        *(_milliseconds(value) for value in (min(values), statistics.median(values), max(values))),
        "" if of_limit is None or row.figure == limit else f"{of_limit:.2f}",
        "" if of_ours is None or row.kind != "peer" else f"{of_ours:.2f}",
        "" if extra is None else f"{extra / 2**20:,.0f} MiB",
    )
    faster = row.kind == "peer" and of_ours is not None and of_ours < 1
    return Line(row.kind, cells, faster)


def _mark_cells(line: Line) -> tuple[str, ...]:
    if line.faster:
        return tuple(f"**{cell}**" if position == HEADS.index("time / ours") else cell
                     for position, cell in enumerate(line.cells))  # fmt: skip
    if line.kind == "ours":
        return (f"**{line.cells[0]}**", *line.cells[1:])
    return (f"*{line.cells[0]}*", *line.cells[1:])


def _bold(row: tuple[str, ...]) -> Iterator[str]:
    yield from row[:-1]
    yield row[-1] if row[-1] == "yes" else f"**{row[-1].lower()}**"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---" if position < left else "---:" for position in range(len(heads))]
    lines = [heads, rule, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2f}"
