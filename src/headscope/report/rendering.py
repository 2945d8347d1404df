"""A page from its template: one self-contained HTML file."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from headscope._files import write_atomic
from headscope.report.panels import Figure, View
from headscope.report.section import Section
from headscope.study import inference


def write_page(path: Path, template: str, *, sections: Sequence[Section], **values: Any) -> Path:
    """Write a page of the templates' folder, with the style, the script and Plotly inside; returns its path.

    sections: what the template gets as name, title and html. values: what else it reads, beside the words for how
    numbers are estimated.
    """
    environment = _environment()
    text = environment.get_template(template).render(
        **values,
        sections=[_rendered(environment, section) for section in sections],
        interval=inference.INTERVAL,
        void=inference.VOID,
        effect_test=inference.EFFECT_TEST,
        max_t=inference.MAX_T,
        fewest=inference.FEWEST_SOURCES,
        resamples=inference.settings.RESAMPLES,
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )
    write_atomic(path, text.encode())
    return path


def _environment() -> jinja2.Environment:
    folder = files("headscope.report") / "templates"

    def load(name: str) -> str | None:
        resource = folder / name
        return resource.read_text(encoding="utf-8") if resource.is_file() else None

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _rendered(environment: jinja2.Environment, section: Section) -> dict[str, Any]:
    """A section as the page takes it: name, title and html."""
    figures = {name: _json(figure) for name, figure in section.figures.items() if figure}
    template = environment.get_template(f"sections/{section.name}.html")
    html = Markup(template.render(**section.values, figures=figures))
    return {"name": section.name, "title": section.title, "html": html}


def _json(figure: Sequence[View] | Figure) -> Markup:
    """A figure as JSON that is safe inside a script element."""
    views = [View("", figure)] if isinstance(figure, dict) else figure
    text = json.dumps([{"label": view.label, **view.figure} for view in views], allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
