"""Writes docs/options.md from the fields of ``distrust/config.py``: run it after changing an option.

python scripts/make_options.py
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from distrust import config
from distrust.config import TrainConfig, flag

TARGET = Path(__file__).parent.parent / "docs" / "options.md"

HEAD = """# Options

Made from `src/distrust/config.py` by `python scripts/make_options.py`; do not edit. Each is a flag of
`distrust train`, a key of the TOML file that `--config` names, and an argument of `TrainConfig` (there
`lambda` is `lambda_`).

When a run goes on, an option that changes the **result** must be what it was, or going on is refused; one
that changes only the last **bits** is warned of; a **free** one may change.
"""


def table() -> str:
    """The document."""
    lines = inspect.getsource(TrainConfig).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    fields_by_name = {field.name: field for field in fields(TrainConfig)}
    parts, line_number = [HEAD], 0
    for option, doc in pairwise(body.body):
        if not (isinstance(option, ast.AnnAssign) and isinstance(doc, ast.Expr)):
            continue
        assert isinstance(option.target, ast.Name)
        assert isinstance(doc.value, ast.Constant)
        field = fields_by_name[option.target.id]
        above = [line.strip() for line in lines[line_number : option.lineno - 1]]
        comment = " ".join(line.removeprefix("# ") for line in above if line.startswith("# "))
        line_number = doc.end_lineno or 0
        if comment:
            title, _, details = comment.partition(".")
            parts.append(f"\n## {title}\n\n{details.strip() + chr(10) + chr(10) if details.strip() else ''}")
            parts.append("| flag | type | default | changes | |\n|---|---|---|---|---|\n")
        cells = (
            f"`{flag(field.name)}`",
            f"`{_type(str(field.type))}`",
            f"`{_format_default(field.default)}`" if field.default is not None else "",
            str(field.metadata["effect"]),
            re.sub(r"\s+", " ", str(doc.value.value)),
        )
        parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


def _type(annotation: str) -> str:
    """The type, with the names of choices as the choices."""
    for name in re.findall(r"\w+", annotation):
        choices = getattr(config, name, None) if name[0].isupper() else None
        if choices is not None and hasattr(choices, "__args__"):
            annotation = annotation.replace(name, ", ".join(choices.__args__))
    return annotation.removesuffix(" | None").replace("tuple[str, ...]", "str ...")


def _format_default(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
