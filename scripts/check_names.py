#!/usr/bin/env python3
"""Rejects names that say nothing: vague local names, and functions named by a bare participle.

    python scripts/check_names.py src campaigns

A local name says what the value is (`candidates`, not `found`). A function is named by a verb (`load`) or by
what it returns (`file_size`), not by a participle or a preposition (`loaded`, `within`). Prints one line per
name, as linters do, and exits with 1 if there is any. Standard library only.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

_VAGUE_WORDS = """
    after apart asked bad before came comes done drawn elsewhere found given goes gone good held here
    how kept known left made meant more needed ours other others own place places rest said seen stand
    standing stands stuff taken theirs there thing things together told turned wanted way ways went what
    which whole within
"""
VAGUE = frozenset(_VAGUE_WORDS.split())
#: Participles that do not end in -ed, and prepositions.
_PARTICIPLE_WORDS = """
    ahead apart become behind begun beside beyond borne built cut done drawn elsewhere found given gone
    held here kept known left lost made meant put seen sent shown stood taken there together told torn
    within worn written
"""
PARTICIPLES = frozenset(_PARTICIPLE_WORDS.split())
#: Function names that only look like participles, and local names that are the field's own term.
EXCEPTIONS = {
    "cut": "the verb",
    "exceed": "the verb",
    "feed": "the verb",
    "left": "a side, as in left and right",
    "need": "the verb",
    "proceed": "the verb",
    "put": "the verb",
    "seed": "the noun",
    "speed": "the noun",
    "embed": "the verb",
    "reseed": "the verb",
    "weighted": "a public name: as one says a weighted trainer",
}


def is_participle(name: str) -> bool:
    """Whether a function's name is one bare participle or preposition: `_opened`, `told`, `within`."""
    bare = name.strip("_")
    if not bare or "_" in bare or bare in EXCEPTIONS:
        return False
    return bare in PARTICIPLES or (bare.endswith("ed") and len(bare) > 4)


def check(tree: ast.AST) -> Iterator[tuple[int, int, str]]:
    """Line, column and message of each name that says nothing."""
    yield from _check_node(tree, in_function=False)


def _check_node(node: ast.AST, *, in_function: bool) -> Iterator[tuple[int, int, str]]:
    for child in ast.iter_child_nodes(node):
        inside = in_function
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = True
            # A property is read like an attribute, and there `done` or `closed` is the usual name of a state.
            if is_participle(child.name) and not _is_property(child):
                message = f"function `{child.name}` is named by a participle: use a verb"
                yield child.lineno, child.col_offset, message
        elif in_function and _binds_vague_name(child):
            message = f"local name `{child.id}` is vague: say what the value is"
            yield child.lineno, child.col_offset, message
        yield from _check_node(child, in_function=inside)


def _binds_vague_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return (
        isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and node.id in VAGUE
        and node.id not in EXCEPTIONS
    )


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def main(arguments: Sequence[str]) -> int:
    """Check the Python files of folders and files; returns the exit code."""
    failures = 0
    for root in map(Path, arguments):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            for line, column, message in check(ast.parse(path.read_text("utf-8"), str(path))):
                print(f"{path}:{line}:{column + 1}: {message}")
                failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
