"""The command ``distrust weigh``: computes, checks and shows the weights of a dataset."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.typing import NDArray

from distrust.atomic import atomic_file, require_writable
from distrust.bundled import PROVENANCE_TABLE
from distrust.cli.arguments import parser, print_json
from distrust.config import TrainConfig, flag
from distrust.data import Distribution, Source, columns_of, open_source, summarize_weights
from distrust.data.columns import WholeRows
from distrust.data.provenance.score import ScoredRecords, Scoring, captions, score_records
from distrust.data.provenance.table import load_table
from distrust.data.provenance.write_dataset import require_format, write_scored
from distrust.errors import ConfigError, printable, warn
from distrust.reporting.display import pluralize
from distrust.reporting.weights_table import distribution_lines, score_lines
from distrust.weighting import ALPHA, LAMBDA, Weighting, effective_sample_size, example_weights

DESCRIPTION = """A record that
states its authority weight w (0: primary record, 0.99: coordinated consensus; a high w means LESS
training weight) and its provenance entropy H keeps them. If it also has a rank, counts or evidence,
the stated values are checked against them. A record without w or H has them computed, as a table
says (--print-table); --table replaces keys of it. The weights shown are u, as --weighting says,
before training divides them by their mean. Exit code 1: records are wrong, or with --strict, differ
from the computed values."""

_NAME: dict[str, Any] = {"metavar": "NAME"}
_OPTIONS_OF_TRAIN: dict[str, dict[str, Any]] = {
    "weighting": {"choices": get_args(Weighting), "default": "monotone", "help": "default: %(default)s"},
    "alpha": {"type": float, "metavar": "A", "help": f"default: {ALPHA}"},
    "lambda_": {"type": float, "metavar": "L", "help": f"default: {LAMBDA}"},
    "max_ratio": {"type": float, "metavar": "R", "help": "default: no limit"},
    "default_authority_weight": {
        "type": float,
        "metavar": "W",
        "help": "for records without w and its ingredients; high: less training weight",
    },
    "default_provenance_entropy": {
        "type": float,
        "metavar": "BITS",
        "help": "for records without H and evidence",
    },
    "authority_weight_column": {**_NAME, "help": "default: authority_weight, or auth_weight"},
    "provenance_entropy_column": {**_NAME, "help": "default: provenance_entropy, or prov_entropy"},
    "text_column": {**_NAME, "help": "describes the heaviest and lightest records; default: text"},
    "source_column": {**_NAME, "help": "the class of a source; default: source"},
    "split": {**_NAME, "help": "of a hub dataset, or of a folder whose files name splits; default: train"},
    "subset": {**_NAME, "help": "of a hub dataset"},
    "revision": {**_NAME, "help": "of a hub dataset"},
    "max_record_bytes": {
        "type": int,
        "metavar": "N",
        "help": "a larger record is an error; default: %(default)s (16 MiB)",
    },
}
# A command that ends at once prints no progress.
_FIRST_REPORT_SECONDS, _REPORT_SECONDS, _LIVE_REPORT_SECONDS = 2.0, 10.0, 0.2


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_intermixed_args(arguments)
    if options.print_table:
        print(PROVENANCE_TABLE.read_text("utf-8"), end="")
        return 0
    config = _config(options)
    scoring = Scoring(
        columns=columns_of(config),
        table=load_table(options.table),
        authority_weight=config.default_authority_weight,
        provenance_entropy=config.default_provenance_entropy,
        tolerances={"authority_weight": options.tolerance_w, "provenance_entropy": options.tolerance_h},
        recompute=options.recompute,
    )
    # Complete rows, because --out writes them again.
    columns = WholeRows(**asdict(scoring.columns))
    sources = [
        open_source(
            name,
            columns,
            split=config.split,
            subset=config.subset,
            revision=config.revision,
            max_record_bytes=config.max_record_bytes,
        )
        for name in options.data
    ]
    _require_targets(options, sources)
    with _progress("read") as progress:
        scored = score_records(sources, scoring, on_progress=progress)
    if config.source_column and set(scored.classes) == {""}:
        problem = f"--source-column {config.source_column}: no record has it"
        warn(problem)
    weights = example_weights(
        scored.authority_weight,
        scored.provenance_entropy,
        **_weighting_options(config),
        locations=scored.locations,
    )
    distribution = _summarize(scored, weights, extremes=options.top)
    with contextlib.ExitStack() as files:
        # The figure is written first and renamed last: a failure of --out leaves neither file.
        if options.plot is not None:
            target = atomic_file(options.plot, force=options.force, follow_link=True)
            figure = files.enter_context(target)
            _plot(figure, options.plot.suffix, config, scored, weights, distribution)
        if options.out is not None:
            progress = files.enter_context(_progress("written"))
            write_scored(sources, scored, columns, options.out, force=options.force, on_progress=progress)
    if options.json:
        print_json(_to_json(options, config, scored, distribution))
    else:
        extremes = (*distribution.heaviest, *distribution.lightest)
        titles = captions(sources, columns, {extreme.where for extreme in extremes})
        for line in _lines(options, scored, distribution, titles):
            print(printable(line))
    differ = any(check.differing for check in scored.checks.values())
    return 1 if options.strict and differ else 0


def _parser() -> argparse.ArgumentParser:
    arg = parser(
        "weigh",
        description=DESCRIPTION,
        examples=[
            "distrust weigh examples.jsonl",
            "distrust weigh raw.jsonl --table ranks.toml --out weighed.jsonl --plot weighed.png",
            "distrust weigh a.parquet b.parquet --source-column publisher --out both.parquet",
            "distrust weigh examples.jsonl --table ranks.toml --recompute --out new.jsonl.gz",
            "distrust weigh --print-table > ranks.toml",
        ],
    )
    add = arg.add_argument
    add("data", nargs="*", metavar="DATA", help="as for --data of distrust train")
    add("--table", type=Path, metavar="FILE", help="TOML file of ranks, coefficients and column names")
    add("--print-table", action="store_true", help="print the default table")
    formats = ".jsonl, .jsonl.gz or .parquet"
    add("--out", type=Path, metavar="FILE", help=f"write the records with w and H: {formats}")
    add("--plot", type=Path, metavar="PICTURE", help="draw the distribution: .png or .svg")
    add("--force", action="store_true", help="replace --out and --plot if they exist")
    add("--recompute", action="store_true", help="replace a record's own w and H where they can be computed")
    add("--strict", action="store_true", help="exit with 1 if a record differs")
    difference = "largest difference of {} that is ignored; default: %(default)s"
    add("--tolerance-w", type=float, default=0.005, metavar="W", help=difference.format("w"))
    add("--tolerance-h", type=float, default=0.05, metavar="BITS", help=difference.format("H"))
    add("--top", type=int, metavar="N", default=5, help="how many of the heaviest and lightest; default: 5")
    add("--json", action="store_true", help="print one JSON object")
    group = arg.add_argument_group("as for distrust train")
    for name, details in _OPTIONS_OF_TRAIN.items():
        group.add_argument(flag(name), dest=name, **{"default": getattr(TrainConfig, name), **details})
    return arg


def _config(options: argparse.Namespace) -> TrainConfig:
    """Check all options; those that training has too are checked by ``TrainConfig``."""
    if not options.data:
        raise ConfigError("weigh: name the data; for help, run distrust weigh --help")
    for name in ("tolerance_w", "tolerance_h", "top"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(f"{flag(name)} is {getattr(options, name)}: give 0 or more")
    if options.plot is not None and options.plot.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {options.plot}: give a name that ends in .png or .svg")
    if options.out is not None and options.plot is not None and options.out == options.plot:
        raise ConfigError(f"--plot {options.plot}: same file as --out; give another name")
    shared = {name: getattr(options, name) for name in _OPTIONS_OF_TRAIN}
    return TrainConfig(data=tuple(options.data), **shared)


def _require_targets(options: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Refuse --out and --plot before the slow work, if they cannot be written or are inputs."""
    parts = [part.name for source in sources for part in source.parts]
    inputs = [*options.data, *parts, options.table or ""]
    if options.out is not None:
        require_format(options.out)
    for target in filter(None, (options.out, options.plot)):
        require_writable(target, force=options.force, inputs=map(str, inputs))


def _weighting_options(config: TrainConfig) -> dict[str, Any]:
    names = ("weighting", "alpha", "lambda_", "max_ratio")
    return {name: getattr(config, name) for name in names}


def _summarize(scored: ScoredRecords, weights: NDArray[np.float64], *, extremes: int) -> Distribution:
    return summarize_weights(
        authority_weight=scored.authority_weight,
        provenance_entropy=scored.provenance_entropy,
        weights=weights,
        tokens=np.ones(len(scored), np.int64),  # unknown without a tokenizer: every record counts as one
        classes=scored.classes,
        class_of=scored.class_of,
        locations=scored.locations,
        effective_examples=effective_sample_size(weights),
        extremes=extremes,
    )


def _plot(
    file: BinaryIO,
    suffix: str,
    config: TrainConfig,
    scored: ScoredRecords,
    weights: NDArray[np.float64],
    distribution: Distribution,
) -> None:
    from distrust.reporting.weights_figure import plot_weights  # late: it loads matplotlib

    # The limit depends on the smallest weight of the data, not on that of the grid being drawn.
    unlimited = {**_weighting_options(config), "max_ratio": None}
    limit = np.inf if config.max_ratio is None else config.max_ratio * float(weights.min())
    plot_weights(
        file,
        distribution,
        authority_weight=scored.authority_weight,
        provenance_entropy=scored.provenance_entropy,
        weights=weights,
        weigh=lambda w, h: np.minimum(example_weights(w, h, **unlimited), limit),
        form=suffix.lower().removeprefix("."),
    )


def _to_json(
    options: argparse.Namespace, config: TrainConfig, scored: ScoredRecords, distribution: Distribution
) -> dict[str, Any]:
    values = distribution.as_json()
    del values["tokens"]  # tokens are not counted here
    for summary in values["classes"]:
        del summary["tokens"]
    checks = {
        name: {**asdict(check), "unchecked": dict(check.unchecked)} for name, check in scored.checks.items()
    }
    return {
        "data": options.data,
        **{name.rstrip("_"): value for name, value in _weighting_options(config).items()},
        **values,
        "check": checks,
        "recomputed": options.recompute,
        "out": None if options.out is None else str(options.out),
        "plot": None if options.plot is None else str(options.plot),
    }


def _lines(
    options: argparse.Namespace, scored: ScoredRecords, distribution: Distribution, titles: Mapping[str, str]
) -> Iterator[str]:
    yield f"{pluralize(len(scored), 'record')} of {', '.join(options.data)}"
    yield from score_lines(scored.checks, recomputed=options.recompute)
    yield ""
    blocks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    yield from distribution_lines(distribution, titles, blocks=blocks)
    for label, path in (("written", options.out), ("figure", options.plot)):
        if path is not None:
            yield f"{label} {path}"


@contextlib.contextmanager
def _progress(verb: str) -> Iterator[Callable[[int], None]]:
    """Reports the number of records on stderr, if it takes long: live on a terminal, else now and then."""
    live = sys.stderr.isatty()
    due, printed = time.monotonic() + _FIRST_REPORT_SECONDS, False

    def report(records: int) -> None:
        nonlocal due, printed
        now = time.monotonic()
        if now >= due:
            due, printed = now + (_LIVE_REPORT_SECONDS if live else _REPORT_SECONDS), True
            end = "\r" if live else "\n"
            print(f"{records:,} records {verb}", end=end, file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        if live and printed:
            print(" " * 40, end="\r", file=sys.stderr, flush=True)  # erases the last report
