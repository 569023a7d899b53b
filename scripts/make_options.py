"""Writes docs/options.md from the fields of ``distrust/config.py``: run it after changing an option.

python scripts/make_options.py
"""

from __future__ import annotations

import re
from pathlib import Path

from distrust import config, option_values
from distrust.config import flag, option_docs, option_groups

TARGET = Path(__file__).parent.parent / "docs" / "options.md"

HEAD = """# Options

Generated from `src/distrust/config.py` by `python scripts/make_options.py`; do not edit. Each option is a
flag of `distrust train`, a key of the TOML file that `--config` names, and an argument of `TrainConfig`.
In Python, `lambda` is `lambda_`.

The column "changes" says what an option changes, and so what happens if it differs when a run resumes. An
option that changes the **result** must stay the same, or the resume is refused. One that changes only the
last **bits** gives a warning. A **free** one may change.
"""


def table() -> str:
    """The document."""
    docs = option_docs()
    parts = [HEAD]
    for title, options in option_groups().items():
        parts.append(f"\n## {title}\n\n| flag | type | default | changes | |\n|---|---|---|---|---|\n")
        for option in options:
            cells = (
                f"`{flag(option.name)}`",
                f"`{_type(str(option.type))}`",
                f"`{_format(option.default)}`" if option.default is not None else "",
                str(option.metadata["effect"]),
                docs[option.name],
            )
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


def _type(annotation: str) -> str:
    """The annotation, with choices spelled out."""
    for name in re.findall(r"(?:values\.)?[A-Z]\w+", annotation):
        choices = getattr(option_values, name.removeprefix("values."), getattr(config, name, None))
        if choices is not None and hasattr(choices, "__args__"):
            annotation = annotation.replace(name, ", ".join(choices.__args__))
    return annotation.removesuffix(" | None").replace("tuple[str, ...]", "str ...")


def _format(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
