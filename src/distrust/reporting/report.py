"""Renders a run as one self-contained HTML page: styles and figures are inside, and it runs no script.

Equal folders give equal bytes. The template engine escapes everything that comes from a file, and the page's
Content-Security-Policy forbids it to load or run anything, in case something were ever missed.

matplotlib's SVG is meant for a file of its own and for white paper. Inside the page, each id gets a prefix so
that none clash, and colours become variables that the page sets for light and for dark mode.
"""

from __future__ import annotations

import re
import shlex
from importlib import resources
from typing import Any
from xml.etree import ElementTree

from distrust.reporting import display, figures, panels, summary
from distrust.reporting.run_reader import RunData
from distrust.reporting.style import BROWN, GRID, INK, QUIET, SERIES

#: CSS variables of the colours; the page defines them.
_VARIABLES = {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--grid)"}
_VARIABLES |= {colour: f"var(--series-{i})" for i, colour in enumerate((*SERIES[:-1], BROWN), 1)}
_COLOUR = re.compile("#[0-9a-f]{6}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def page(run: RunData) -> str:
    """Render the page of a run."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_clean
    )
    environment.filters |= {
        "n": display.number,  # numbers of checkpoints may be huge
        "class_name": lambda name: display.class_name(name, display.TABLE_NAME_CHARACTERS),
        "g": "{:.4g}".format,
        "percent": "{:.1%}".format,
    }
    source = resources.files(__package__).joinpath("page.html.jinja").read_text("utf-8")
    template = environment.from_string(source)
    state, sentence = summary.state(run)
    return template.render(
        run=run,
        name=figures.distinct_names([run.path])[0],
        resume=shlex.join(["distrust", "train", "--resume", str(run.path)]),
        state=state,
        sentence=sentence,
        facts=summary.facts(run),
        pictures=_pictures(run),
        evaluations=summary.evaluations(run),
        by_class=summary.evaluations_by_class(run),
        best=summary.best_checkpoint(run),
        options=summary.options(run),
        environment=summary.environment(run),
    )


def _clean(value: Any) -> Any:
    """Replace invisible characters, such as those that reverse the text around them."""
    from markupsafe import Markup

    return display.one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pictures(run: RunData) -> list[tuple[str, panels.Panel, Any]]:
    """The name of each panel that has data, the panel, and the markup of its figure."""
    from markupsafe import Markup

    scene = figures.prepare_runs([run])  # over steps
    pictures = []
    for name, panel in panels.PANELS.items():
        if figures.has_data(name, scene):
            svg = figures.render(figures.draw(scene, [name], panel_titles=False), ".svg", transparent=True)
            label = f"{panel.title}. {panel.caption}"
            markup = Markup(_inline_svg(svg, prefix=f"{name}-", label=label))  # noqa: S704 - escaped by ElementTree
            pictures.append((name, panel, markup))
    return pictures


def _inline_svg(svg: bytes, *, prefix: str, label: str) -> str:
    """Turn an SVG file of matplotlib into an element of a page; the prefix makes its ids unique there."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - drawn in this process
    for parent in list(root.iter()):
        for child in list(parent):
            if _local_name(child.tag) in ("metadata", "style"):  # a style sheet would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = _local_name(element.tag)
        element.attrib = {_local_name(key): _rewrite(key, value, prefix) for key, value in element.items()}
    for attribute in ("width", "height"):
        del root.attrib[attribute]  # the page sets the size; the viewBox keeps the proportions
    root.attrib |= {"role": "img", "aria-label": label}  # for screen readers
    return ElementTree.tostring(root, encoding="unicode")


def _local_name(qualified: str) -> str:
    """A name without its namespace: HTML has none."""
    return qualified.rpartition("}")[2]


def _rewrite(key: str, value: str, prefix: str) -> str:
    """An attribute's value, with prefixed ids and references, and variables for colours."""
    match _local_name(key):
        case "id":
            return prefix + value
        case "href":
            return f"#{prefix}{value[1:]}"
        case "style":
            value = _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), value)
    return _REFERENCE.sub(rf"url(#{prefix}\1)", value)
