"""The sections of the page with numbers, a file each: figures, tables, and the words beside them.

Each has a function `section`, which takes the results and gives the section, or None where there is nothing for it.
"""

from collections.abc import Sequence

from headscope.report.naming import Names
from headscope.report.section import Section
from headscope.report.sections import (
    ablation,
    attribution,
    circuits,
    claims,
    contrast,
    controls,
    entropy,
    further,
    generation,
    roles,
    together,
)
from headscope.study.analysis import StudyResult

# in the page's order
_EVERY = (entropy, contrast, controls, roles, ablation, together, circuits, attribution, generation, further, claims)


def sections_of(result: StudyResult, names: Names, groups: Sequence[str]) -> list[Section]:
    """The sections that there are numbers for, in the page's order; groups in the order to show them."""
    found = (module.section(result, names, groups) for module in _EVERY)
    return [section for section in found if section is not None]
