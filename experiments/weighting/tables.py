"""The tables of docs/weighting.md, in Markdown, each between markers with its name."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from distrust.weighting import Weighting, example_weights
from experiments.weighting import figures
from experiments.weighting.design import CLIPPED_PLAINLY, METHODS, SEEDS, WORLDS, WRONG, runs
from experiments.weighting.figures import Estimate, Measure
from experiments.weighting.results import Result, run_of
from experiments.weighting.world import World, make_world

HARDER = [world for world, ratio in WORLDS.items() if ratio]
COMPARED = ("off", "published", "monotone", "filter", "upsample")


def blocks(results: Sequence[Result]) -> dict[str, str]:
    """Name -> table. What was not run is left empty."""
    return {
        "runs": _runs(results),
        "additive": _additive(results),
        "bundled": _bundled_table(results),
        "preferred": _harder(results, figures.primary_share, _percent),
        "differences": _differences(results),
        "clipping": _clipping(results),
        "sole": _harder(results, figures.sole_kept, _percent, before=True),
        "brier": _harder(results, figures.brier, _number),
        "ece": _calibration(results),
        "neutral": _harder(results, figures.neutral_loss, _number, before=True),
        "records": _records(results),
        "odds": _odds(results),
    }


def write_into(path: Path, tables: dict[str, str]) -> None:
    """Replace the text between the markers of each table in the file.

    Raises:
        SystemExit: if the file has no marker, or one of an unknown table.
    """
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"<!-- table: (\w+) -->", text)
    unknown = set(named) - tables.keys()
    if unknown or not named:
        raise SystemExit(f"{path}: has no <!-- table: NAME --> of a table that is known; {sorted(unknown)}")
    for name in named:
        begin = f"<!-- table: {name} -->\n"
        head, _, remainder = text.partition(begin)
        _, end, tail = remainder.partition("<!-- end -->")
        text = f"{head}{begin}{tables[name]}\n{end}{tail}"
    written = path.with_name(f".{path.name}.new")
    written.write_text(text, encoding="utf-8")
    os.replace(written, path)


def _runs(results: Sequence[Result]) -> str:
    every = set(runs(WORLDS, SEEDS))
    missing = every - set(map(run_of, results))
    seeds = ", ".join(str(seed) for seed in sorted({result["seed"] for result in results}))
    minutes = sum(result["seconds"] for result in results) / 60
    left = " The others are missing from the tables: the same command computes them." if missing else ""
    extra = len(results) - len(every) + len(missing)
    return (
        f"The tables are of {len(every) - len(missing)} runs out of {len(every)}"
        f"{f' and {extra} more' if extra else ''}, with the seeds {seeds}: {minutes:.0f} "
        f"minutes of one thread, on a machine with other load.{left}"
    )


def _additive(results: Sequence[Result]) -> str:
    rows = []
    for world in WORLDS:
        off = {one["seed"]: one for one in figures.of_cell(results, world, 0.0, "off")}
        for one in figures.of_cell(results, world, 0.0, "additive"):
            plain = off.get(one["seed"])
            if plain is None:
                continue
            same = "yes" if one["state_digest"] == plain["state_digest"] else "NO"
            rows.append([
                world, str(one["seed"]), f"{plain['objective']:.3f}", f"{one['objective']:.3f}",
                f"`{plain['state_digest'][:12]}…`", f"`{one['state_digest'][:12]}…`", same,
            ])  # fmt: skip
    return _table(
        ["world", "seed", "loss of step 1, off", "with the term", "digest, off", "with the term", "equal"],
        rows,
    )


def _bundled_table(results: Sequence[Result]) -> str:
    rows = []
    for method in METHODS:
        results_of_method = figures.of_cell(results, "bundled", 0.0, method)
        if results_of_method:
            measures: list[tuple[Measure, Callable[[Estimate | None], str]]] = [
                (figures.primary_share, _percent),
                (figures.primary_probability, _number),
                (figures.coordinated_probability, _number),
                (figures.brier, _number),
            ]
            cells = [form(figures.estimate(results_of_method, measure)) for measure, form in measures]
            error, loss = (
                figures.calibration_error(results_of_method),
                figures.estimate(results_of_method, figures.neutral_loss),
            )
            rows.append([f"`{method}`", *cells, f"{error:.2f}", _number(loss)])
    headings = ["", "primary preferred", "p(primary)", "p(coordinated)", "Brier", "ECE", "neutral loss"]
    return _table(headings, rows)


def _harder(
    results: Sequence[Result],
    measure: Measure,
    form: Callable[[Estimate | None], str],
    *,
    before: bool = False,
) -> str:
    methods = ("before", *COMPARED) if before else COMPARED

    def cell(world: str, wrong: float, method: str) -> str:
        return form(figures.estimate(figures.of_cell(results, world, wrong, method), measure))

    return _grid(results, methods, cell)


def _calibration(results: Sequence[Result]) -> str:
    def cell(world: str, wrong: float, method: str) -> str:
        results_of_cell = figures.of_cell(results, world, wrong, method)
        return f"{figures.calibration_error(results_of_cell):.2f}" if results_of_cell else ""

    return _grid(results, COMPARED, cell)


def _differences(results: Sequence[Result]) -> str:
    def cell(world: str, wrong: float, method: str) -> str:
        monotone = figures.of_cell(results, world, wrong, "monotone")
        alternative = figures.of_cell(results, world, wrong, method)
        return _points(figures.difference(monotone, alternative, figures.primary_share))

    return _grid(results, [method for method in COMPARED if method != "monotone"], cell, heading="minus `{}`")


def _clipping(results: Sequence[Result]) -> str:
    rows = []
    for world in WORLDS:
        pair = [figures.of_cell(results, world, 0.0, method) for method in (CLIPPED_PLAINLY, "monotone")]
        cells = [
            form(figures.estimate(results_of_cell, measure))
            for measure, form in ((figures.primary_share, _percent), (figures.neutral_loss, _number))
            for results_of_cell in pair
        ]
        rows.append([world, *cells])
    headings = [
        "",
        "preferred, plain",
        "preferred, weighted",
        "neutral loss, plain",
        "neutral loss, weighted",
    ]
    return _table(headings, rows)


def _odds(results: Sequence[Result]) -> str:
    """For the disputed facts: the weight of all primary records over that of all coordinated ones."""
    seeds = sorted({result["seed"] for result in results})

    @cache
    def worlds(ratio: int) -> list[World]:
        return [make_world(seed, ratio) for seed in seeds]

    def cell(world: str, wrong: float, method: str) -> str:
        ratio = WORLDS[world]
        assert ratio is not None
        total: defaultdict[str, float] = defaultdict(float)
        for one in worlds(ratio):
            disputed = {statement.subject for statement in one.statements if statement.kind == "primary"}
            for statement, weight in zip(one.statements, _weights(one.corpus(wrong), method), strict=True):
                total[statement.kind] += weight if statement.subject in disputed else 0.0
        return f"{total['primary'] / total['coordinated']:.2f}" if total["coordinated"] else "no other"

    return _grid(results, ("off", "published", "monotone", "filter"), cell)


def _weights(records: list[dict[str, Any]], method: str) -> list[float]:
    names: dict[str, Weighting] = {"off": "off", "published": "published"}
    u = example_weights(
        [record["authority_weight"] for record in records],
        [record["provenance_entropy"] for record in records],
        weighting=names.get(method, "monotone"),
    )
    return [float(weight > 1) if method == "filter" else float(weight) for weight in u]


def _records(results: Sequence[Result]) -> str:
    def cell(world: str, wrong: float, method: str) -> str:
        results_of_cell = figures.of_cell(results, world, wrong, method)
        return (
            f"{sum(one['records'] for one in results_of_cell) / len(results_of_cell):,.0f}"
            if results_of_cell
            else ""
        )

    return _grid(results, ("off", "filter", "upsample"), cell)


def _grid(
    results: Sequence[Result],
    methods: Sequence[str],
    cell: Callable[[str, float, str], str],
    *,
    heading: str = "`{}`",
) -> str:
    """A row for each harder world and share of wrong labels, a column for each method."""
    worlds = [world for world in HARDER if any(result["world"] == world for result in results)]
    rows = [
        [f"{world}, {wrong:.0%}", *(cell(world, wrong, method) for method in methods)]
        for world in worlds
        for wrong in WRONG
    ]
    return _table(["ratio, wrong labels", *(heading.format(method) for method in methods)], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percent(value: Estimate | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.0%}" + ("" if math.isnan(value.half) else f" ± {100 * value.half:.0f}")


def _points(value: Estimate | None) -> str:
    if value is None:
        return ""
    return f"{100 * value.mean:+.0f}" + ("" if math.isnan(value.half) else f" ± {100 * value.half:.0f}")


def _number(value: Estimate | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.2f}" + ("" if math.isnan(value.half) else f" ± {value.half:.2f}")
