"""A run as one page of HTML that needs nothing else: styles and pictures are in it, and it runs no script.

The same folder gives the same bytes. Whatever comes out of a file is escaped by the template's engine, and
the page forbids itself to load or run anything (its Content-Security-Policy), should anything ever get by.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from distrust.reporting import figures, inline, names, panels, summary
from distrust.reporting.run_reader import RunData

_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: of the panel.
        title: above it.
        caption: below it.
        svg: the picture itself, as markup.
        small: whether it stands with the others that are looked at less.
    """

    name: str
    title: str
    caption: str
    svg: Any
    small: bool


def page(run: RunData) -> str:
    """The page of a run."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_seen
    )
    environment.filters |= {
        "n": summary.number,
        "class_name": names.class_name,
        "g": "{:.4g}".format,
        "percent": "{:.1%}".format,
    }
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8"))
    word, sentence = summary.state(run)
    return template.render(
        run=run,
        name_characters=summary.NAME_CHARACTERS,
        name=figures.names_of([run.path])[0],
        word=word,
        sentence=sentence,
        facts=summary.facts(run),
        pictures=_pictures(run),
        evaluations=summary.evaluations(run),
        by_class=summary.evaluations_by_class(run),
        best=summary.best_checkpoint(run),
        options=summary.options(run),
        environment=summary.environment(run),
    )


def _seen(value: Any) -> Any:
    """Text with what cannot be seen, or would turn what stands beside it, replaced."""
    from markupsafe import Markup

    return names.one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pictures(run: RunData) -> list[Picture]:
    from markupsafe import Markup

    scene = figures.prepare_runs([run])
    drawn = []
    for name, panel in panels.PANELS.items():
        if figures.has_data(name, scene):
            figure = figures.draw(scene, [name], panel_titles=False)
            svg = figures.render(figure, ".svg", transparent=True)
            label = f"{panel.title}. {panel.caption}"
            markup = Markup(inline.inline_svg(svg, prefix=f"{name}-", label=label))  # noqa: S704 - escaped by ElementTree
            drawn.append(Picture(name, panel.title, panel.caption, markup, panel.minor))
    return drawn
