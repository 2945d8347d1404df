"""What a page leads with: its answers in order of how strong their design is, each with its interval and its control.

Reading order: finding (what a finding is), entropies, roles, circuits, effects (all tested on the confirm split),
rankings (exploratory).
"""

from dataclasses import dataclass

from headscope.report.lead import circuits, effects, entropies, rankings, roles
from headscope.report.lead.finding import Finding, Strength, Tile
from headscope.report.naming import Names
from headscope.study.analysis import StudyResult

__all__ = ["Finding", "Lead", "Strength", "Tile", "lead_of"]

# of findings whose design is equally strong, the earlier ones come first
_EVERY = (entropies, roles, circuits, effects, rankings)
# a screen of them
_MOST_TILES = 6
# of several exploratory findings of one kind, so many are enough to lead with
_MOST_EXPLORATORY = 3
NOTHING = (
    "Nothing was established here: of what was tested, no effect has an interval clear of 0 and a corrected p below"
    " 0.05."
)


@dataclass(frozen=True)
class Lead:
    """The top of a page: the few numbers a reader should leave with, and the sentences below them."""

    tiles: list[Tile]
    sentences: list[str]


def lead_of(result: StudyResult, names: Names) -> Lead:
    """The lead of a study's or sweep's page.

    An effect whose interval spans 0 has no tile: its sentence says that none was established, and how large it can be.
    Exploratory findings follow, and have tiles only where nothing stronger was looked for.
    """
    found = [finding for module in _EVERY for finding in module.findings(result, names)]
    # equally strong ones stay in their order
    found.sort(key=lambda finding: finding.strength)
    tested = [finding for finding in found if finding.strength < Strength.EXPLORATORY]
    tiles = [finding.tile for finding in tested if finding.tile is not None][:_MOST_TILES]
    if not tested:
        tiles = [finding.tile for finding in found if finding.tile is not None][:_MOST_EXPLORATORY]
    sentences = [finding.sentence for finding in found]
    if tested and not any(finding.established for finding in tested):
        sentences.insert(0, NOTHING)
    return Lead(tiles, sentences)
