"""From the tables of a study's sweeps to its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from headscope.features import ON_FEATURE
from headscope.study.ablation import degradation_by_timestep, effects, rank_distances, rank_heads, select_heads
from headscope.study.attributions import Attributions, attribute
from headscope.study.circuits import Circuits
from headscope.study.claims import claims_of
from headscope.study.contrast import Comparison, Control, compare_groups, controls_of
from headscope.study.contrast.controls import TRAINED, controls_table
from headscope.study.edits import Edited, heads_in, losses
from headscope.study.entropy import ENTROPIES, entropy_by_group, entropy_by_head, item_means, variance_components
from headscope.study.finite import finite
from headscope.study.further import Score, further_scores, unlabelled
from headscope.study.inference import plain_text
from headscope.study.interventions import (
    Interventions,
    curve_effects,
    dose_effects,
    effects_by_timestep,
    joint_effects,
    variance_of_effects,
)
from headscope.study.roles import Roles, assess

NATURAL, SYNTHETIC = "lfw", "faces_grey"
# the kinds of tables that roles are made of
LOOKED = ("features", "key_mass", "counterparts")


@dataclass(frozen=True)
class StudyResult:
    """The results of a study or sweep. Every table is None where its sweep was not run.

    Attributes:
        groups, sites, timesteps: what the tables hold; sites in the order of execution, as far as it was given.
        sources: group, split, items, sources: how many were observed or ablated.
        entropy_heads: see `entropy.entropy_by_head`.
        entropy_groups: see `entropy.entropy_by_group`.
        entropy_variance: see `entropy.variance_components`.
        contrast: natural against synthetic images, on the confirm split.
        controls: what the contrast is read against, itself first.
        ablation_ranking: see `ablation.rank_heads`.
        ablation_timesteps: see `ablation.degradation_by_timestep`.
        interventions: what was tested on the confirm split, heads and sets of heads; of a plain sweep its sets.
        attributions: importances from gradients.
        roles: what each head does, see `roles.assess`.
        role_effects: what removing each role's heads costs its feature's pixels and others, see `roles.causal`.
        circuits: which heads are enough, see `circuits.analyse_circuits`.
        generation_ranking: see `ablation.rank_distances`.
        further: what a sweep measured beside these, see `further.further_scores`.
        unshown: kind: columns of numbers that the report doesn't show.
        omitted: a section's name, and why it is absent.
        left_out: "kind.column": how many of its numbers aren't finite; what they enter has no value.
    """

    groups: list[str]
    sites: list[str]
    timesteps: list[int]
    sources: pl.DataFrame
    entropy_heads: pl.DataFrame | None = None
    entropy_groups: pl.DataFrame | None = None
    entropy_variance: pl.DataFrame | None = None
    contrast: Comparison | None = None
    controls: list[Control] = field(default_factory=list)
    ablation_ranking: pl.DataFrame | None = None
    ablation_timesteps: pl.DataFrame | None = None
    interventions: Interventions | None = None
    attributions: Attributions | None = None
    roles: Roles | None = None
    role_effects: pl.DataFrame | None = None
    circuits: Circuits | None = None
    generation_ranking: pl.DataFrame | None = None
    further: list[Score] = field(default_factory=list)
    unshown: dict[str, list[str]] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables there are, by name, in columns that CSV can hold."""
        found = {
            "sources": self.sources,
            "entropy_heads": self.entropy_heads,
            "entropy_groups": self.entropy_groups,
            "entropy_variance": self.entropy_variance,
            "contrast_divergences": self.contrast.divergences if self.contrast else None,
            "contrast_heads": self.contrast.heads if self.contrast else None,
            "contrast_sites": self.contrast.sites if self.contrast else None,
            "contrast_pooled": self.contrast.pooled if self.contrast else None,
            "contrast_controls": controls_table(self.controls) if self.controls else None,
            "ablation_ranking": self.ablation_ranking,
            "ablation_timesteps": self.ablation_timesteps,
            "generation_ranking": self.generation_ranking,
        }
        found |= self.interventions.tables() if self.interventions else {}
        found |= self.attributions.tables() if self.attributions else {}
        found |= _under("roles", self.roles.tables() if self.roles else {})
        found |= {"roles_causal": self.role_effects}
        found |= _under("circuits", self.circuits.tables() if self.circuits else {})
        found |= {"claims": self.claims()}
        return {name: _flat(table) for name, table in found.items() if table is not None}

    def claims(self) -> pl.DataFrame | None:
        """The abstract's claims beside what was measured, see `claims.claims_of`; None for a plain sweep's numbers."""
        if self.contrast is None and self.roles is None and self.circuits is None:
            return None
        return claims_of(
            sources=self.sources,
            contrast=self.contrast,
            interventions=self.interventions,
            roles=self.roles,
            role_effects=self.role_effects,
            circuits=self.circuits,
        )


def analyse(
    observations: pl.DataFrame | None,
    discover: pl.DataFrame | None = None,
    confirm: pl.DataFrame | None = None,
    *,
    discover_sets: pl.DataFrame | None = None,
    confirm_sets: pl.DataFrame | None = None,
    curves: pl.DataFrame | None = None,
    untrained: pl.DataFrame | None = None,
    edits: Sequence[Edited] = (),
    targets: Mapping[str, str] | None = None,
    natural: str = NATURAL,
    synthetic: str = SYNTHETIC,
    count_per_group: int = 5,
    sites: Sequence[str] = (),
    seed: int = 0,
) -> StudyResult:
    """All numbers of a study, from its three sweeps; a table that is None or empty leaves its section out.

    observations: entropies of all heads, discover and confirm split, and, for a control, the train split. discover:
    paired losses of all heads on the discover split. confirm: paired losses of the heads that were selected on
    discover, on the confirm split. discover_sets, confirm_sets: those of sets of heads. curves: those of the sets of
    curves and doses, see `curves`, on the confirm split. untrained: entropies of the same groups in the model with
    random weights, for another control. edits: what was edited, see `edits.edits_of`; none given are the heads of
    confirm. targets: the groups that sets were selected for, by their names. natural, synthetic: the groups to compare.
    count_per_group: what `select_heads` was called with, to mark the selected heads in the ranking. sites: the model's,
    in the order of execution, which the tables' own rows don't follow. seed: of the resampling.
    """
    observations, untrained = map(_filled, (observations, untrained))
    discover, discover_sets = (_of_split(table, "discover") for table in (discover, discover_sets))
    confirm, confirm_sets, curves = (_of_split(table, "confirm") for table in (confirm, confirm_sets, curves))
    left_out: dict[str, int] = {}
    observations, untrained = (
        _entropies_of(kind, table, left_out)
        for kind, table in (("observations", observations), ("untrained", untrained))
    )
    discover, confirm, discover_sets, confirm_sets, curves = (
        _finite(kind, table, ("clean",), left_out)
        for kind, table in (
            ("discover", discover),
            ("confirm", confirm),
            ("discover_sets", discover_sets),
            ("confirm_sets", confirm_sets),
            ("curves", curves),
        )
    )
    omitted: dict[str, str] = {}
    contrast: Comparison | None = None
    made: list[Control] = []
    if observations is None:
        omitted["entropy"] = omitted["contrast"] = "No entropies were recorded."
    else:
        items = item_means(observations)
        compared = compare_groups(items, natural, synthetic, seed=seed)
        if isinstance(compared, str):
            omitted["contrast"] = compared
        else:
            contrast = compared
            random = None if untrained is None else item_means(untrained)
            made = controls_of(items, contrast, untrained=random, seed=seed)
    ranking = None
    if discover is None:
        omitted["ablation"] = "No head was ablated on the discover split."
    else:
        ranking = rank_heads(discover, select_heads(discover, count_per_group), seed)
    edits = edits or heads_in(confirm)
    tested = losses(edits, confirm, confirm_sets)
    interventions = None
    if tested is None:
        omitted["confirm"] = "No head was ablated on the confirm split."
    else:
        before = losses(edits, discover, discover_sets)
        together = pl.concat([table for table in (before, tested) if table is not None])
        steps = losses(edits, None, curves)
        interventions = Interventions(
            edits,
            effects(tested, seed, before=before),
            effects_by_timestep(tested, seed),
            variance_of_effects(tested),
            joint_effects(together, edits, seed),
            None if steps is None else curve_effects(steps, seed),
            None if steps is None else dose_effects(steps, seed),
            targets or {},
        )
    return StudyResult(
        **_described(sites, observations, discover, confirm, discover_sets, confirm_sets, curves),
        **_entropies(observations, seed),
        contrast=contrast,
        controls=made,
        ablation_ranking=ranking,
        ablation_timesteps=None if discover is None else degradation_by_timestep(discover, seed),
        interventions=interventions,
        omitted=omitted,
        left_out=left_out,
    )


def analyse_sweep(
    observations: pl.DataFrame | None = None,
    ablations: pl.DataFrame | None = None,
    generations: pl.DataFrame | None = None,
    *,
    others: Mapping[str, pl.DataFrame] | None = None,
    edits: Sequence[Edited] = (),
    sites: Sequence[str] = (),
    log_snr: Mapping[int, float] | None = None,
    seed: int = 0,
) -> StudyResult:
    """The numbers of a plain sweep: entropies and rankings over the sources of all its splits, nothing selected.

    Without a selection on one split and a test on another, every ranking is exploratory and there are no p-values; but
    roles, which are chosen on one and tested on the other, where both splits were looked at.
    others: the run's further tables by kind (attributions, set_ablations, set_generations; features and key_mass, and
    counterparts, for roles). edits: what was edited, see `edits.edits_of`. sites: the model's, in the order of
    execution. log_snr: of every timestep, nats.
    """
    every = {"observations": observations, "ablations": ablations, "generations": generations, **(others or {})}
    filled = {kind: table for kind, table in every.items() if table is not None and len(table)}
    left_out: dict[str, int] = {}
    observations = _entropies_of("observations", _filled(observations), left_out)
    ablations = _finite("ablations", _filled(ablations), ("clean",), left_out)
    generations = _finite("generations", _filled(generations), ("distance",), left_out)
    attributed = _filled(filled.get("attributions"))
    looked = [filled.get(kind) for kind in LOOKED]
    roles = None
    if looked[0] is not None and looked[1] is not None:
        roles = assess(looked[0], looked[1], looked[2], log_snr=log_snr, seed=seed)
    return StudyResult(
        **_described(sites, *(_filled(table) for table in filled.values())),
        **_entropies(observations, seed),
        ablation_ranking=None if ablations is None else rank_heads(ablations, (), seed),
        ablation_timesteps=None if ablations is None else degradation_by_timestep(ablations, seed),
        interventions=_of_sweep(edits, ablations, _filled(filled.get("set_ablations")), seed),
        attributions=None if attributed is None else attribute(attributed, ablations, seed),
        generation_ranking=None if generations is None else rank_distances(generations, seed),
        further=further_scores(filled, seed),
        roles=roles,
        unshown=_unshown(observations, filled),
        left_out=left_out,
    )


def _entropies(observations: pl.DataFrame | None, seed: int) -> dict[str, pl.DataFrame]:
    """The entropies of heads and groups over the held-out sources; over training items where there are no others."""
    if observations is None:
        return {}
    held_out = observations.filter(pl.col("split") != TRAINED)
    rows = held_out if len(held_out) else observations
    items = item_means(rows)
    return {
        "entropy_heads": entropy_by_head(items, seed),
        "entropy_groups": entropy_by_group(items, seed),
        "entropy_variance": variance_components(rows),
    }


def _of_sweep(
    edits: Sequence[Edited], ablations: pl.DataFrame | None, sets: pl.DataFrame | None, seed: int
) -> Interventions | None:
    """What a plain sweep's sets cost, and how that differs from what their heads cost alone; nothing is tested."""
    of_sets = losses(edits, None, sets)
    together = losses(edits, ablations, sets)
    if of_sets is None or together is None:
        return None
    found = effects(of_sets, seed, test=False).with_columns(exploratory=pl.lit(True))
    joint = joint_effects(together, edits, seed, test=False)
    return Interventions(edits, found, joint=None if joint is None else joint.with_columns(exploratory=pl.lit(True)))


def _unshown(observations: pl.DataFrame | None, tables: Mapping[str, pl.DataFrame]) -> dict[str, list[str]]:
    """The columns that aren't on the page: what was observed beside entropies, losses over a feature's pixels."""
    shown = ("call", "queries", "keys", "grid_height", "grid_width", *ENTROPIES)
    observed = [] if observations is None else unlabelled(observations)
    found = {"observations": [name for name in observed if name not in (*shown, "forward", "frame")]}
    for kind, table in tables.items():
        found[kind] = [*found.get(kind, []), *(name for name in table.columns if name.startswith(ON_FEATURE))]
    return {kind: names for kind, names in found.items() if names}


def _filled(table: pl.DataFrame | None) -> pl.DataFrame | None:
    """The table with plain strings for dictionary-coded columns and a split; None where it has no row."""
    if table is None or not len(table):
        return None
    return plain_text(table if "split" in table.columns else table.with_columns(split=pl.lit("all")))


def _of_split(table: pl.DataFrame | None, split: str) -> pl.DataFrame | None:
    """The rows of a split as `_filled` gives them; None where there is none."""
    filled = _filled(table)
    return None if filled is None else _filled(filled.filter(pl.col("split") == split))


def _finite(
    kind: str, table: pl.DataFrame | None, names: Sequence[str], left_out: dict[str, int]
) -> pl.DataFrame | None:
    """The table without what isn't finite in some columns, which are counted in `left_out`."""
    for name in names:
        if table is not None:
            table, count = finite(table, name)
            if count:
                left_out[f"{kind}.{name}"] = count
    return table


def _entropies_of(kind: str, table: pl.DataFrame | None, left_out: dict[str, int]) -> pl.DataFrame | None:
    """Observations without what isn't finite, which is counted, but for H / ln K of a single key, which is 0 / 0."""
    if table is not None:
        several = pl.when(pl.col("keys") > 1).then(pl.col("entropy_normalised_mean"))
        table = table.with_columns(several.alias("entropy_normalised_mean"))
    return _finite(kind, table, ENTROPIES, left_out)


def _described(sites: Sequence[str], *tables: pl.DataFrame | None) -> dict:
    """Groups, sites (in the order given) and timesteps of the tables, and their counts of items and sources."""
    found = [table for table in tables if table is not None]
    if not found:
        raise ValueError("tables: got no rows at all, expected observations or ablations")
    named = {
        name: list(
            dict.fromkeys(
                value
                for table in found
                # sets of heads are of no single site
                if name in table.columns
                for value in table[name].drop_nulls().unique(maintain_order=True)
            )
        )
        for name in ("group", "site")
    }
    timesteps = {int(value) for table in found if "timestep" in table.columns for value in table["timestep"].unique()}
    # a search's steps are of no single item
    of_items = [table for table in found if "item" in table.columns]
    labels = pl.Schema(dict.fromkeys(("group", "split", "source_id"), pl.String) | {"item": pl.Int64})
    items = pl.concat([table.select(list(labels)) for table in of_items]) if of_items else pl.DataFrame(schema=labels)
    counts = items.group_by("group", "split", maintain_order=True).agg(
        pl.col("item").n_unique().alias("items"), pl.col("source_id").n_unique().alias("sources")
    )
    # those that weren't given come last, as they were found
    place = {site: index for index, site in enumerate(sites)}
    ordered = sorted(named["site"], key=lambda site: place.get(site, len(place)))
    return {"groups": named["group"], "sites": ordered, "timesteps": sorted(timesteps), "sources": counts}


def _under(prefix: str, tables: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    return {f"{prefix}_{name}": table for name, table in tables.items()}


def _flat(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(
        pl.col(name).cast(pl.List(pl.String)).list.join(" ")
        for name, kind in table.schema.items()
        if isinstance(kind, pl.List)
    )
