"""The records as tables, in the terminal and in Markdown: targets first, then the figures of each group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.gpu.records import Record
from benchmarks.gpu.steps import STEPS
from benchmarks.gpu.targets import judge

NOTES = """\
Speeds are in tokens that are no padding. tflops counts 4 FLOP for each weight and token, the least that LoRA
needs. Peak memory is that of tensors on a GPU, and of the process on a CPU. Every file is synced within its
time; distrust verifies what it loads, the others do not. Files on the disk are loaded from a cold cache."""
TINY = "Tiny sizes: this shows that everything runs, and nothing about speed."

Rows = list[list[str]]


def tables(records: Mapping[str, Record], *, tiny: bool) -> Iterator[tuple[str, Rows]]:
    """Titles and rows, the first of which is the head."""
    yield "targets", [["", "measured", ""], *map(list, judge(records, tiny=tiny))]
    for group in dict.fromkeys(step.group for step in STEPS):
        members = [records[step.name] for step in STEPS if step.group == group and step.name in records]
        if members:
            yield group, _rows(members)


def for_terminal(records: Mapping[str, Record], *, tiny: bool) -> Iterator[Table]:
    """The tables; what is not reached is red."""
    for title, (head, *rows) in tables(records, tiny=tiny):
        table = Table(*head, title=f"\n{title}", title_justify="left", title_style="bold", box=None)
        for row in rows:
            table.add_row(*row, style="red" if row[-1] == "NOT reached" else "")
        yield table


def markdown(records: Mapping[str, Record], *, tiny: bool) -> str:
    """Everything, with the machines that it was measured on."""
    machines = dict.fromkeys(", ".join(map(" ".join, r.machine.items())) for r in records.values())
    parts = ["# Exactness and speed on a device", *machines, *([TINY] if tiny else []), NOTES]
    for title, (head, *rows) in tables(records, tiny=tiny):
        lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def line(record: Record) -> str:
    """A record in one line."""
    figures = ", ".join(f"{name} {_cell(value)}" for name, value in record.figures.items() if value != [])
    return f"{record.step} ({record.outcome}, {record.seconds:.0f} s): {figures or record.reason}"


def _rows(records: Sequence[Record]) -> Rows:
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    rows = [["", *(name.replace("_", " ") for name in names)]]
    for record in records:
        case = record.step.partition(": ")[2]
        title = case if record.outcome == "ok" else f"{case}: {record.outcome}, {record.reason}"
        rows.append([title, *(_cell(record.figures.get(name, "")) for name in names)])
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
