"""The study's own tables of planted models against their truth, computed in float64 on the same noisy images."""

import itertools

import numpy as np
import polars as pl
import pytest

import headscope
from headscope import Task
from headscope.demonstration.runs import edits_in, sites_of, table_in_memory
from headscope.study import analyse
from headscope.study.edits import head_name
from headscope.sweep import HeadSet, SweepConfig
from headscope.sweep.plan.choosing import dealt
from headscope.sweep.plan.items import open_items
from headscope.zoo.planted import load_planted
from study import simulated
from zoo.planted_tolerance import entropy_tolerance, loss_tolerance

# an effect of so many standard errors is there to be found: the family's bar is below 4
CLEAR = 6.0
SIGNIFICANT = 0.05


class Truth:
    """What the edits of a planted model cost, [sources, draws, timesteps] of every group, split and fill."""

    def __init__(self, pipeline, config):
        self.task = Task.of(pipeline)
        self.truth, self.config = self.task.denoiser.truth, config
        self.groups = {group.name: group for group in open_items(config, self.task)}
        self.forwards, self.tolerances, self.means, self.found = {}, {}, {}, {}

    def forward(self, group, split, timestep, draw):
        key = group, split, timestep, draw
        if key not in self.forwards:
            items = [item for item in self.groups[group].swept if item.split == split]
            inputs = self.task.noisy_inputs(self.task.prepare(items), timestep, self.config.seed + draw)
            forward, target = self.truth.at(inputs.sample.numpy(), timestep), inputs.target.numpy().astype(np.float64)
            self.forwards[key] = forward, target
        return self.forwards[key]

    def rounding(self, forward, clamped):
        """What float32 may add to the root mean square of a prediction, [items]."""
        if (id(forward), clamped) not in self.tolerances:
            none = np.zeros(len(forward.sample))
            self.tolerances[id(forward), clamped] = np.sqrt(loss_tolerance(forward, none, clamped=clamped))
        return self.tolerances[id(forward), clamped]

    def reference(self, group, timestep, fold=None):
        """Mean outputs of the reference items, or of those of a fold."""
        if (group, timestep, fold) not in self.means:
            items = self.groups[group].reference
            if fold is not None:
                of = dealt(group, [item.source_id for item in items], self.config.reference_folds)
                items = [item for item, own in zip(items, of, strict=True) if own == fold]
            inputs = self.task.noisy_inputs(self.task.prepare(items), timestep, self.config.seed)
            self.means[group, timestep, fold] = self.truth.at(inputs.sample.numpy(), timestep).outputs.mean(0)
        return self.means[group, timestep, fold]

    def losses(self, group, split, removed, fill, fold=None):
        """Change, clean loss, and what either may err by in float32: [4, sources, draws, timesteps]."""
        key = group, split, tuple(removed), fill, fold
        if key in self.found:
            return self.found[key]
        found = []
        for timestep in self.config.timesteps:
            value = None if fill == "zero" else self.reference(group, timestep, fold)
            for draw in range(self.config.draws):
                forward, target = self.forward(group, split, timestep, draw)
                clean, edited = forward.loss(target), forward.loss(target, removed, value)
                # a pair of which either suffices may be half way with means in the place of both
                rms = self.rounding(forward, True), self.rounding(forward, fill == "zero")
                of_clean, of_edited = (2 * np.sqrt(x) * r + r**2 for x, r in zip((clean, edited), rms, strict=True))
                found.append(np.stack([edited - clean, clean, of_clean + of_edited, of_clean]))
        shape = len(self.config.timesteps), self.config.draws
        self.found[key] = np.stack(found, -1).reshape(*found[0].shape, *shape).swapaxes(2, 3)
        return self.found[key]

    def degradation(self, parts, group, split, fill, fold=None, draws=None):
        """Of a weighted sum of edits: the value, what float32 may add, and its standard error over sources.

        draws: how many of the draws count, all by default.
        """
        terms = [
            (weight, self.losses(group, split, removed, fill, fold)[:, :, :draws].mean(2)) for removed, weight in parts
        ]
        change, clean = sum(weight * term[0] for weight, term in terms), terms[0][1][1]
        ratio = change.mean(0) / clean.mean(0)
        error = sum(
            abs(weight) * (term[2].mean(0) + np.abs(term[0].mean(0) / clean.mean(0)) * term[3].mean(0))
            for weight, term in terms
        )
        influence = ((change - ratio * clean) / clean.mean(0)).mean(1)
        return ratio.mean(), (error / clean.mean(0)).mean(), influence.std(ddof=1) / np.sqrt(len(influence))

    def bias(self, parts, group, split):
        """That the mean fill's number of reference images brings, on the noisy images of the first draw."""
        count = self.config.reference_folds
        folds = [self.degradation(parts, group, split, "mean", fold, draws=1)[0] for fold in range(count)]
        return (np.mean(folds) - self.degradation(parts, group, split, "mean", draws=1)[0]) / (count - 1)


def pair_sets(truth):
    """Each pair, and heads that don't meet: every other slot's."""
    sets = [HeadSet(pair.name, heads=pair.heads) for pair in truth.pairs]
    alone = [head.key for head in truth.heads if not any(head.key in pair.heads for pair in truth.pairs)]
    apart = [*alone, *(pair.heads[0] for pair in truth.pairs)][:3]
    return (*sets, HeadSet("apart", heads=tuple(apart)), HeadSet("all heads", sites=("*",)))


def studied(name, out, **fields):
    """The study's analysis of a planted model, every head selected, and the truth."""
    pipeline = load_planted(name)
    fields = {"timesteps": (132,), "items": 20, "fills": ("zero",), "groups": ("lfw",), **fields}
    fields |= {"splits": ("discover", "confirm"), "sets": pair_sets(pipeline.unet.truth)}
    run = headscope.sweep(out, model=pipeline, progress=False, **fields)
    tables = {kind: table_in_memory(run, kind) for kind in run.tables}
    result = analyse(
        tables["observations"],
        tables["ablations"],
        tables["ablations"],
        discover_sets=tables["set_ablations"],
        confirm_sets=tables["set_ablations"],
        edits=edits_in(run),
        sites=sites_of(run),
    )
    return result, Truth(pipeline, SweepConfig.from_dict(fields)), fields["sets"]


def check_effects(result, truth, sets):
    """Every edit's degradation and joint minus sum; what is an effect is found, and what is none isn't."""
    removed = {head_name(*head.key): [head.key] for head in truth.truth.heads}
    removed |= {one.name: one.heads or [head.key for head in truth.truth.heads] for one in sets}
    found, clear, none = {}, 0, 0
    for row in result.interventions.effects.iter_rows(named=True):
        parts = [(removed[row["edit"]], 1.0)]
        value, tolerance, error = truth.degradation(parts, row["group"], "confirm", row["fill"])
        found[row["group"], row["fill"], row["edit"]] = row
        bias = row["fill_bias"] or 0.0
        assert abs(row["value"] + bias - value) <= tolerance, row
        assert abs(row["standard_error"] - error) <= 2 * tolerance, row
        if row["fill"] == "mean" and truth.config.reference_folds:
            assert abs(bias - truth.bias(parts, row["group"], "confirm")) <= tolerance
        if abs(value) < 1e-12 and not row["fill_error"]:
            assert not row["p_maxt"] < SIGNIFICANT, row
            none += 1
        elif abs(value) > max(1e-5, CLEAR * np.hypot(error, 2 * (row["fill_error"] or 0.0))):
            assert row["p_maxt"] < SIGNIFICANT, row
            assert row["low"] * row["high"] > 0, row
            assert np.sign(row["value"]) == np.sign(value), row
            clear += 1
    joint = {}
    for row in result.interventions.joint.iter_rows(named=True):
        heads = removed[row["edit"]]
        parts = [(heads, 1.0), *(([head], -1.0) for head in heads)]
        value, tolerance, error = truth.degradation(parts, row["group"], row["split"], row["fill"])
        # the bias is taken off all of them
        if row["fill_error"] is None:
            assert abs(row["value"] - value) <= tolerance, row
        assert abs(row["joint"] - row["sum"] - row["value"]) <= 1e-12
        if row["edit"] == "apart":
            assert abs(row["value"]) <= tolerance, row
            assert not row["p_maxt"] < SIGNIFICANT, row
        if row["fill_error"] is None and abs(value) > CLEAR * error and abs(value) > 10 * tolerance:
            assert row["p_maxt"] < SIGNIFICANT, row
        joint[row["group"], row["split"], row["fill"], row["edit"]] = row, tolerance, error
    return found, joint, clear, none


def check_closed_forms(truth, found, joint, group):
    """Of dead, one_hot and the pairs, as docs/planted.md has them."""
    names = {head.name: head_name(*head.key) for head in truth.truth.heads}
    fills = {fill for _, fill, _ in found}
    for fill, name in itertools.product(fills, ("dead", "one_hot", "either_1", "either_2")):
        if (
            name in names
            and (fill == "mean" or name != "one_hot")
            and (fill == "zero" or not name.startswith("either"))
        ):
            row = found[group, fill, names[name]]
            # at most what single precision rounds
            assert abs(row["value"]) < 1e-7, (name, row)
            assert row["low"] < 0 < row["high"]
            assert row["p_maxt"] > 0.9
    for pair in truth.truth.pairs:
        if "mean" in fills:
            # joint effects are those of the headline fill
            break
        one, two = (found[group, "zero", head_name(*head)]["value"] for head in pair.heads)
        row, tolerance, error = joint[group, "confirm", "zero", pair.name]
        clear = abs(row["value"]) > CLEAR * error
        if pair.kind == "either suffices":
            # alone each costs nothing, but for what single precision rounds
            assert abs(row["value"] - row["joint"]) < 1e-7
            assert row["low"] > 0 or not clear
        elif pair.kind == "both are needed":
            assert abs(row["value"] + one) <= tolerance
            assert abs(one - two) <= tolerance
            # where the product helps, without it the sum is too large by one of its parts
            assert row["high"] < 0 or not clear or one < 0
        else:
            # 2 g + 4 c instead of 2 (g + c)
            c, clean = [], []
            for timestep, draw in itertools.product(truth.config.timesteps, range(truth.config.draws)):
                forward, target = truth.forward(group, "confirm", timestep, draw)
                number = [head.key for head in truth.truth.heads].index(pair.heads[0])
                c.append(forward.importance(target)[1][:, number].mean())
                clean.append(forward.loss(target).mean())
            steps = len(truth.config.timesteps)
            c, clean = (np.reshape(values, (steps, -1)).mean(1) for values in (c, clean))
            assert abs(row["value"] - (2 * c / clean).mean()) <= tolerance


def check_entropies(result, truth, group):
    heads = result.entropy_heads.filter(pl.col("group") == group, pl.col("measure") == "nats")
    compared = 0
    for number, head in enumerate(truth.truth.heads):
        mine = heads.filter(pl.col("site") == head.site, pl.col("head") == head.head)
        for timestep in truth.config.timesteps:
            values, tolerances = [], []
            for split, draw in itertools.product(("discover", "confirm"), range(truth.config.draws)):
                forward, _ = truth.forward(group, split, timestep, draw)
                values.append(forward.entropy[:, number].mean())
                tolerances.append(entropy_tolerance(forward)[:, number].mean())
            value = mine.filter(pl.col("timestep") == timestep)["value"].item()
            assert abs(value - np.mean(values)) <= np.mean(tolerances), head.name
            compared += 1
    assert compared == len(truth.truth.heads) * len(truth.config.timesteps)


def test_pairs(tmp_path):
    """Effects, joint effects and what isn't there, of the small model on one group at one timestep."""
    with simulated.fewer_draws(999):
        result, truth, sets = studied("pairs", tmp_path / "run")
    found, joint, clear, none = check_effects(result, truth, sets)
    check_closed_forms(truth, found, joint, "lfw")
    assert clear >= 5
    assert none == 3
    rows = {name: joint["lfw", "confirm", "zero", name][0] for name in ("either", "both", "duplicate", "apart")}
    assert rows["either"]["low"] > 0
    assert rows["both"]["high"] < 0
    assert rows["duplicate"]["low"] > 0
    assert rows["apart"]["low"] <= 0 <= rows["apart"]["high"]


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("fills", [("zero",), ("zero", "mean")])
@pytest.mark.parametrize("name", ["pairs", "roles", "all"])
def test_whole_models(name, fills, tmp_path):
    """Every head of every planted model, entropies too; of the small one two groups, noise levels and draws."""
    more = {"groups": ("lfw", "faces_grey"), "timesteps": (132, 495), "draws": 2} if name == "pairs" else {}
    with simulated.fewer_draws(999):
        result, truth, sets = studied(name, tmp_path / "run", fills=fills, **more)
    found, joint, clear, none = check_effects(result, truth, sets)
    for group in truth.config.groups:
        check_closed_forms(truth, found, joint, group)
        check_entropies(result, truth, group)
    assert clear >= 4
    # dead heads, one_hot with means, and those of which either suffices
    assert none >= {"pairs": 3, "roles": 1, "all": 3}[name]


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_mean_fill_and_its_folds(tmp_path):
    """Its bias is that of the truth, and nothing is found where it alone differs from the truth."""
    fields = {"fills": ("mean",), "reference_items": 16, "reference_folds": 4, "draws": 2}
    with simulated.fewer_draws(999):
        result, truth, sets = studied("pairs", tmp_path / "run", **fields)
    found, *_ = check_effects(result, truth, sets)
    assert all(row["fill_error"] is not None for (_, fill, _), row in found.items() if fill == "mean")
