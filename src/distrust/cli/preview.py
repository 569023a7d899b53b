"""The command ``distrust preview``: what of the data is trained."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from distrust.cli.arguments import parser, print_json
from distrust.config import TrainConfig, flag, key, option_docs, option_groups
from distrust.config_text import from_toml
from distrust.errors import ConfigError, printable

#: They do not change what a record becomes, or need all of the data.
_OTHER_OPTIONS = ("data", "mix", "cache_dir", "max_ratio")


def main(arguments: list[str]) -> int:
    """Show records; 1 if one of them is wrong."""
    arg = parser(
        "preview",
        description="Records are rendered and tokenized as by distrust train with the same options. What is "
        "trained is green, or in ⟦brackets⟧ without colour. Later records are not read, and nothing of the "
        "model but its config and tokenizer. Exit code 1: a record is wrong.",
        examples=[
            "distrust preview chats.jsonl --model ./my-model",
            "distrust preview chats.jsonl --model ./my-model --record 17 --chat-template chatml",
            "distrust preview a.jsonl b.parquet --model ./my-model -n 10 --html preview.html",
            "distrust preview --config runs/first/config.toml --json",
        ],
    )
    arg.usage = "distrust preview DATA … --model MODEL [options]; for help, distrust preview --help"
    arg.add_argument("data", nargs="*", metavar="DATA", help="as for --data of distrust train")
    arg.add_argument("-n", type=int, metavar="N", help="number of records; default: 3, or 1 with --record")
    arg.add_argument("--record", type=int, metavar="NUMBER", help="the first record to show; default: 1")
    form = arg.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of the sequences")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    arg.add_argument("--config", type=Path, metavar="FILE", help="TOML file with options")
    shared = _add_train_options(arg)
    options = arg.parse_intermixed_args(arguments)
    typed_options = {name: getattr(options, name) for name in shared if hasattr(options, name)}
    config = from_toml(options.config) if options.config else TrainConfig()
    config = replace(config, **typed_options, data=tuple(options.data) or config.data)
    if config.data is None:
        raise ConfigError("preview: name the data; for help, run distrust preview --help")

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from distrust.previews import preview
    from distrust.reporting import figures

    if options.html is not None:
        figures.require_suffix(options.html, (".html", ".htm"))
    shown = preview(**vars(config), n=options.n, record=options.record)
    if options.json:
        print_json(shown.as_json())
    elif options.html is not None:
        figures.write(options.html, shown.to_page().encode(), follow_link=True)
        print(printable(str(options.html)))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print(shown.to_text(colour=colour))
    if options.json or options.html is not None:  # the text shows them itself
        for error in shown.errors:
            print(f"distrust: {printable(error)}", file=sys.stderr)
    return 1 if shown.errors else 0


def _add_train_options(arg: argparse.ArgumentParser) -> list[str]:
    """Add the options of training that decide what is trained of a record; returns their names.

    Only those that are given become attributes of the parsed options.
    """
    group, docs, groups = arg.add_argument_group("as for distrust train"), option_docs(), option_groups()
    hints = get_type_hints(TrainConfig)
    names = [option.name for title in ("Model", "Data", "Weighting") for option in groups[title]]
    shared = [name for name in names if name not in _OTHER_OPTIONS]
    for name in shared:
        kinds = [kind for kind in get_args(hints[name]) or (hints[name],) if kind is not type(None)]
        details: dict[str, Any] = {"type": kinds[0], "metavar": key(name).rpartition("_")[2].upper()}
        if kinds == [bool]:
            details = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kinds[0], str):  # the values of a Literal
            details = {"choices": kinds}
        elif len(kinds) > 1:  # one name or several
            details["nargs"] = "+"
        text = docs[name].replace("%", "%%")
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **details)
    return shared
