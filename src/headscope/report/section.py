"""A section of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headscope.report.panels import Figure, View


@dataclass(frozen=True)
class Section:
    """A section of the page: a template, and what it shows.

    Attributes:
        name: its anchor; its template is templates/sections/NAME.html.
        title: in the navigation.
        values: what the template reads.
        figures: by name; views to switch between, or one figure. Where one is None its place stays empty.
    """

    name: str
    title: str
    values: Mapping[str, Any]
    figures: Mapping[str, Sequence[View] | Figure | None] = field(default_factory=dict)
