"""A picture as a part of a page: an SVG without names that clash, and in the colours of the page.

matplotlib's SVG is a file of its own: its ids and its style sheet reach over a whole page, and its colours
are for white paper. Here each id gets a prefix, and colours become variables that the page sets for light and
for dark.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from distrust.reporting.style import BROWN, GRID, INK, QUIET, SERIES

#: The variable of each colour; the page gives them values.
VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    GRID: "--grid",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES[:-1], 1)},
    BROWN: "--series-7",
}
_COLOUR = re.compile("#[0-9a-f]{6}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def inline_svg(svg: bytes, *, prefix: str, label: str) -> str:
    """An SVG of matplotlib as an element of a page.

    Args:
        svg: the file.
        prefix: of its ids; another one for each picture of the page.
        label: what it shows, for who cannot see it.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314 - drawn in this process
    for parent in list(root.iter()):
        for child in list(parent):
            if _name(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _name(element.tag)
        element.attrib = {_name(key): _own(_name(key), value, prefix) for key, value in element.items()}
    for size in ("width", "height"):
        del root.attrib[size]  # the page's to say; the viewBox keeps the proportions
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _name(qualified: str) -> str:
    """Without its namespace: in a page, an element of an SVG has none."""
    return qualified.rpartition("}")[2]


def _own(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href":
        return f"#{prefix}{value[1:]}"
    value = _REFERENCE.sub(rf"url(#{prefix}\1)", value)
    if key == "style":
        value = _COLOUR.sub(
            lambda found: f"var({VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0], value
        )
    return value
