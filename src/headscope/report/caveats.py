"""The caveats of a page, computed from the numbers as far as they follow from them."""

import polars as pl

from headscope.study.analysis import StudyResult
from headscope.study.inference import FEWEST_SOURCES

STUDY_CAVEATS = (
    "The model is small and so are the images. Nothing here says how heads of larger models behave.",
    "Intervals and tests describe the variation between sources of images (and within them that between draws of noise,"
    " which are averaged first), not that between training runs or models: one model was trained once.",
)


def caveats_of(result: StudyResult) -> list[str]:
    """The caveats that follow from the tables."""
    found = _void(result)
    if "lfw" in result.groups:
        found.append(
            "The LFW photographs come without identities; each is counted as its own source. If a person appears twice,"
            " intervals for lfw are somewhat too narrow. They were cut out, aligned and reduced to grey 25 x 25 pixels"
            " by others, so a difference from synthetic faces may lie in that processing as much as in what is shown;"
            " faces_grey passes through the same resampling, which removes one such difference, not all."
        )
    few = result.sources.filter(pl.col("sources") < FEWEST_SOURCES)
    if len(few):
        listing = "; ".join(
            f"{row['group']}, {row['split']}: {row['sources']} {'source' if row['sources'] == 1 else 'sources'},"
            f" {row['items']} images"
            for row in few.iter_rows(named=True)
        )
        found.append(
            f"Groups of fewer than {FEWEST_SOURCES} sources get no p-value, and their intervals are marked"
            f" exploratory: many crops of one photograph are one observation ({listing})."
        )
    if result.entropy_heads is not None:
        found.append(
            "Sites differ in their number of keys K, and entropy in nats grows with K alone. Heads of different sites"
            " are compared by H / ln K only, and even that is not free of K: the same pattern of attention has another"
            " normalised entropy at another resolution."
        )
        found.append(
            "Entropy describes how spread out attention is. It is no measure of what a head does, nor of its"
            " importance; that is what ablation is for."
        )
    if result.ablation_ranking is not None or result.interventions is not None:
        found.append(
            "The relative degradation divides by the clean loss, which differs between groups and timesteps: the same"
            " absolute damage is a larger percentage where the model is good. Read the absolute difference beside it."
        )
        found.append(
            "Heads that do the same thing hide each other when they are removed one at a time, and the effects of"
            " several do not add up: what a head costs alone is no measure of what the model would lose without what it"
            " does."
        )
        found.append(
            "What takes a removed head's place decides what its removal costs: the mean fill keeps what it does on"
            " average, zeros move the activations further from what the network knows, uniform attention keeps what it"
            " carries, another image's output keeps everything but what this image says. Read the fills side by side."
        )
    return [*found, *_roles(result)]


def _roles(result: StudyResult) -> list[str]:
    """What roles and circuits don't say."""
    found = []
    if result.roles is not None:
        found.append(
            "A role is the one measured feature that a head's attention follows most, not all it does; what wasn't"
            " measured can't be named, and heads without a role may matter. Features of images depend on each other: a"
            " head is named for what the others don't explain."
        )
        if result.role_effects is None:
            found.append("Roles were not held against removal here: they say where attention goes, not what it is for.")
    if result.circuits is not None:
        found.append(
            "A circuit keeps the loss of the images that it was searched for, with the fill that took the other heads'"
            " places. It is one small set that is enough, not the only one: heads that stand in for each other make"
            " several. Edges are effects of one head through one input of another while all other heads stay as they"
            " were, and don't add up to the circuit's effect."
        )
    return found


def _void(result: StudyResult) -> list[str]:
    """The caveat about numbers that aren't finite: how many there are, and how many quantities they leave void."""
    numbers = [f"{count:,} in {name}" for name, count in result.left_out.items()]
    quantities = []
    for name, table in result.tables().items():
        if "void" not in table.columns:
            continue
        # where there is one key, H / ln K is 0 / 0 by itself
        counted = table.filter(pl.col("keys") > 1) if "keys" in table.columns else table
        void = int((counted["void"] > 0).sum())
        if void:
            quantities.append(f"{void:,} of {len(table):,} in {name.replace('_', ' ')}")
    if not numbers and not quantities:
        return []
    broken = f" Rows with such a number: {', '.join(numbers)}." if numbers else ""
    void = f" Void are {', '.join(quantities)}." if quantities else ""
    return [
        "Some numbers are infinite or none at all (NaN), as those of a model that overflowed are, or are missing. They"
        " void every quantity that holds one: it has no value, no interval and no test, and nothing is averaged without"
        f" them.{broken}{void} A head whose removal does that changes more than any number here says."
    ]
