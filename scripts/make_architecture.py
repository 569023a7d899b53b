"""Writes the tree in docs/architecture.md: every module with the first sentence of its docstring.

python scripts/make_architecture.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("src/distrust", "campaigns", "benchmarks", "experiments", "scripts", "examples")
BEGIN, END = "<!-- tree: python scripts/make_architecture.py -->\n", "<!-- end -->"
WIDTH = 118
COLUMN = 27


def tree() -> str:
    """The tree as a code block."""
    lines = [line for package in PACKAGES for line in _lines(ROOT / package, f"{package}/", indent=0)]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _lines(folder: Path, name: str, *, indent: int) -> Iterator[str]:
    yield from _entry(name, folder / "__init__.py", indent=indent)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and any(path.glob("*.py")):
            yield from _lines(path, f"{path.name}/", indent=indent + 2)
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield from _entry(path.name, path, indent=indent + 2)


def _entry(name: str, path: Path, *, indent: int) -> Iterator[str]:
    start = f"{' ' * indent}{name}".ljust(COLUMN)
    text = _summary(path) if path.exists() else ""
    yield from textwrap.wrap(
        f"{start} {text}".rstrip(),
        WIDTH,
        subsequent_indent=" " * (COLUMN + 1),
        drop_whitespace=True,
        break_on_hyphens=False,
    )


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s", paragraph)[0].rstrip(".").replace("``", "")


def page(text: str) -> str:
    """The page with the tree of today."""
    head, remainder = text.split(BEGIN)
    return f"{head}{BEGIN}\n{tree()}\n{END}{remainder.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), encoding="utf-8")
