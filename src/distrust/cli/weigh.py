"""The command ``distrust weigh``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from distrust.bundled import PROVENANCE_TABLE
from distrust.cli.arguments import parser, print_json
from distrust.config import TrainConfig, flag
from distrust.errors import ConfigError, DistrustWarning
from distrust.reporting.display import printable
from distrust.weighting import ALPHA, LAMBDA, Weighting, effective_sample_size, example_weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distrust.data.distribution import Distribution
    from distrust.data.provenance.score import Check, ScoredRecords
    from distrust.data.sources import Source

DESCRIPTION = """A record that
brings its authority weight w and provenance entropy H keeps them; where it also has a rank, counts
or evidence, they are checked against these. One that brings none has them computed: a table says
how, and what the columns are called (--print-table); --table replaces it, whole or in part. The
weights shown are u, as --weighting says, before training divides them by their mean. Exit code 1:
records are wrong, or with --strict, differ from what is computed."""

_OPTIONS_OF_TRAIN = {
    "weighting": {"choices": get_args(Weighting), "help": f"default: {TrainConfig.weighting}"},
    "alpha": {"type": float, "metavar": "A", "help": f"default: {ALPHA}"},
    "lambda_": {"type": float, "metavar": "L", "help": f"default: {LAMBDA}"},
    "max_ratio": {"type": float, "metavar": "R", "help": "default: no bound"},
    "default_authority_weight": {
        "type": float,
        "metavar": "W",
        "help": "of records with neither w nor its ingredients",
    },
    "default_provenance_entropy": {
        "type": float,
        "metavar": "BITS",
        "help": "of records with neither H nor evidence",
    },
    "authority_weight_column": {"metavar": "NAME", "help": "default: authority_weight, or auth_weight"},
    "provenance_entropy_column": {"metavar": "NAME", "help": "default: provenance_entropy, or prov_entropy"},
    "text_column": {"metavar": "NAME", "help": "whose beginning names a record; default: text"},
    "source_column": {"metavar": "NAME", "help": "that names the class of a source; default: source"},
    "split": {
        "metavar": "NAME",
        "help": "of a hub data set, or of a folder whose files name splits; default: train",
    },
    "subset": {"metavar": "NAME", "help": "of a hub data set"},
    "revision": {"metavar": "NAME", "help": "of a hub data set"},
}
_FIRST_REPORT_SECONDS, _REPORT_SECONDS = 2.0, 10.0


def main(arguments: list[str]) -> int:
    """Compute, check and show what the records of a data set weigh."""
    options = _parser().parse_intermixed_args(arguments)
    if options.print_table:
        print(PROVENANCE_TABLE.read_text("utf-8"), end="")
        return 0
    config = _config(options)

    from distrust.atomic import atomic_file, require_writable
    from distrust.data.columns import WholeRows, columns_of
    from distrust.data.provenance.score import Scoring, score_records
    from distrust.data.provenance.table import load_table
    from distrust.data.provenance.write_dataset import require_format, write_scored
    from distrust.data.sources import open_source

    scale = Scoring(
        columns=columns_of(config),
        table=load_table(options.table),
        authority_weight=config.default_authority_weight,
        provenance_entropy=config.default_provenance_entropy,
        tolerances={"authority_weight": options.tolerance_w, "provenance_entropy": options.tolerance_h},
        recompute=options.recompute,
    )
    columns = WholeRows(**{field.name: getattr(scale.columns, field.name) for field in fields(scale.columns)})
    sources = [
        open_source(name, columns, split=config.split, subset=config.subset, revision=config.revision)
        for name in options.data
    ]
    read = [*options.data, *(part.name for source in sources for part in source.parts), options.table or ""]
    if options.out is not None:
        require_format(options.out)
    for target in filter(None, (options.out, options.plot)):
        require_writable(target, force=options.force, inputs=map(str, read))
    with _Progress("read") as progress:
        weighed = score_records(sources, scale, on_progress=progress)
    if config.source_column and set(weighed.classes) == {""}:
        warnings.warn(
            f"--source-column {config.source_column}: no record has it", DistrustWarning, stacklevel=2
        )
    weights = example_weights(
        weighed.authority_weight,
        weighed.provenance_entropy,
        **_weighting_of(config),
        locations=weighed.locations,
    )
    shown = _distribution(weighed, weights, extremes=options.top)
    with contextlib.ExitStack() as files:
        if options.plot is not None:  # first written and last named: a failure leaves neither file
            picture = files.enter_context(atomic_file(options.plot, force=options.force))
            _draw(picture, options.plot.suffix, config, weighed, weights, shown)
        if options.out is not None:
            progress = files.enter_context(_Progress("written"))
            write_scored(sources, weighed, columns, options.out, force=options.force, on_progress=progress)
    if options.json:
        print_json(_object(options, config, weighed, shown))
    else:
        for line in _lines(options, weighed, shown, _captions(sources, columns, shown)):
            print(printable(line))
    differ = any(check.differing for check in weighed.checks.values())
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
    arg.add_argument("data", nargs="*", metavar="DATA", help="what --data of distrust train takes")
    arg.add_argument(
        "--table", type=Path, metavar="FILE", help="TOML file of ranks, coefficients and columns' names"
    )
    arg.add_argument("--print-table", action="store_true", help="print the table that comes with it")
    arg.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the records with both columns: .jsonl, .jsonl.gz or .parquet",
    )
    arg.add_argument(
        "--plot", type=Path, metavar="PICTURE", help="draw the distribution: .png or .svg; only if asked for"
    )
    arg.add_argument("--force", action="store_true", help="replace --out and --plot if they are there")
    arg.add_argument(
        "--recompute",
        action="store_true",
        help="where w or H can be computed, that replaces the record's own",
    )
    arg.add_argument("--strict", action="store_true", help="exit with 1 if a record differs")
    arg.add_argument(
        "--tolerance-w",
        type=float,
        default=0.005,
        metavar="W",
        help="up to it, w is the same; default: %(default)s",
    )
    arg.add_argument(
        "--tolerance-h", type=float, default=0.05, metavar="BITS", help="likewise of H; default: %(default)s"
    )
    arg.add_argument(
        "--top", type=int, metavar="N", default=5, help="how many of the heaviest and lightest; default: 5"
    )
    arg.add_argument("--json", action="store_true", help="print one object")
    same = arg.add_argument_group("as distrust train has them")
    for name, details in _OPTIONS_OF_TRAIN.items():
        same.add_argument(flag(name), dest=name, default=getattr(TrainConfig, name), **details)  # type: ignore[arg-type]
    return arg


def _config(options: argparse.Namespace) -> TrainConfig:
    """The options that training has too, held against the same bounds; the others against theirs."""
    if not options.data:
        raise ConfigError("weigh: name the data; distrust weigh --help says more")
    for name in ("tolerance_w", "tolerance_h", "top"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ConfigError(f"{flag(name)} is {getattr(options, name)}: give 0 or more")
    if options.plot is not None and options.plot.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {options.plot}: give a name that ends in .png or .svg")
    if options.out is not None and options.plot is not None and options.out == options.plot:
        raise ConfigError(f"--plot {options.plot}: is --out too; give another name")
    return TrainConfig(
        data=tuple(options.data), **{name: getattr(options, name) for name in _OPTIONS_OF_TRAIN}
    )


def _weighting_of(config: TrainConfig) -> dict[str, Any]:
    names = ("weighting", "alpha", "lambda_", "max_ratio")
    return {name: getattr(config, name) for name in names}


def _distribution(weighed: ScoredRecords, weights: NDArray[np.float64], *, extremes: int) -> Distribution:
    """Of records that count as one token each: how many they have is for a tokenizer to say."""
    import numpy as np

    from distrust.data.distribution import summarize_weights

    return summarize_weights(
        authority_weight=weighed.authority_weight,
        provenance_entropy=weighed.provenance_entropy,
        weights=weights,
        tokens=np.ones(len(weighed), np.int64),
        classes=weighed.classes,
        class_of=weighed.class_of,
        locations=weighed.locations,
        effective_examples=effective_sample_size(weights),
        extremes=extremes,
    )


def _draw(
    file: BinaryIO,
    suffix: str,
    config: TrainConfig,
    weighed: ScoredRecords,
    weights: NDArray[np.float64],
    shown: Distribution,
) -> None:
    import numpy as np

    from distrust.reporting.weights_figure import plot_weights

    free = {**_weighting_of(config), "max_ratio": None}
    highest = np.inf if config.max_ratio is None else config.max_ratio * float(weights.min())
    plot_weights(
        file,
        shown,
        authority_weight=weighed.authority_weight,
        provenance_entropy=weighed.provenance_entropy,
        weights=weights,
        weigh=lambda w, h: np.minimum(example_weights(w, h, **free), highest),
        form=suffix.lower().removeprefix("."),
    )


def _captions(sources: Sequence[Source], columns: Any, shown: Distribution) -> dict[str, str]:
    from distrust.data.provenance.score import captions

    return captions(sources, columns, {extreme.where for extreme in (*shown.heaviest, *shown.lightest)})


def _object(
    options: argparse.Namespace, config: TrainConfig, weighed: ScoredRecords, shown: Distribution
) -> dict[str, Any]:
    """What is shown, for programs; tokens are left out, as nobody has counted them."""
    found = shown.as_json()
    del found["tokens"]
    for summary in found["classes"]:
        del summary["tokens"]
    return {
        "data": options.data,
        **{name.rstrip("_"): value for name, value in _weighting_of(config).items()},
        **found,
        "check": {name: _check_object(check) for name, check in weighed.checks.items()},
        "recomputed": options.recompute,
        "out": None if options.out is None else str(options.out),
        "plot": None if options.plot is None else str(options.plot),
    }


def _check_object(check: Check) -> dict[str, Any]:
    return {
        "tolerance": check.tolerance,
        "computed": check.computed,
        "defaulted": check.defaulted,
        "checked": check.checked,
        "differing": check.differing,
        "unchecked": dict(check.unchecked),
        "largest": [asdict(difference) for difference in check.largest],
    }


def _lines(
    options: argparse.Namespace, weighed: ScoredRecords, shown: Distribution, captions: Mapping[str, str]
) -> Iterator[str]:
    from distrust.reporting.weights_table import distribution_lines, score_lines

    are = "record" if len(weighed) == 1 else "records"
    yield f"{len(weighed):,} {are} of {', '.join(options.data)}"
    yield from score_lines(weighed.checks, recomputed=options.recompute)
    yield ""
    blocks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    yield from distribution_lines(shown, captions, blocks=blocks)
    for what, path in (("written", options.out), ("picture", options.plot)):
        if path is not None:
            yield f"{what} {path}"


class _Progress:
    """Tells on stderr how far it is, where it takes long: over and over on a terminal, else now and then."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._live = sys.stderr.isatty()
        self._next = time.monotonic() + _FIRST_REPORT_SECONDS
        self._told = False

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, records: int) -> None:
        """So many records have been read, or written."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._live else _REPORT_SECONDS)
        self._told = True
        print(
            f"{records:,} records {self._verb}", end="\r" if self._live else "\n", file=sys.stderr, flush=True
        )

    def __exit__(self, *exception: object) -> None:
        if self._live and self._told:
            print(" " * 40, end="\r", file=sys.stderr, flush=True)
