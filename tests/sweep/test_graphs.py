"""Replayed forwards: with a stand-in for CUDA graphs, which too runs no Python and keeps its memory."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headscope.sweep import Execution, Run, SweepConfig
from headscope.sweep.compute.fitting import Rows
from headscope.sweep.compute.graphs import Forwards, Graphs
from headscope.sweep.compute.opened import Opened
from headscope.sweep.compute.unit import compute_unit
from sweep.faults import ordered
from sweep.tape import on_tape

ASKED = {
    "groups": ["lfw"],
    "splits": ["confirm"],
    "items": 3,
    "timesteps": [300, 600],
    "fills": ["zero", "mean", "uniform"],
    "scores": ["loss", "distance"],
    "sets": [
        {"name": "all", "sites": ["*"], "keep": 0.25},
        {"name": "flat", "sites": ["*"], "temperature": 2.0, "key_bias": [1.0], "key_scale": [0.5]},
    ],
    "reference_items": 2,
    "observe": False,
}


class Counted(Graphs):
    """Counts captures and replays."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.captured = self.replayed = 0
        super().__init__(denoiser, self._counting)

    def _counting(self, compute):
        replay = on_tape(compute)
        self.captured += 1

        def counted():
            self.replayed += 1
            replay()

        return counted


def swept(path, forwards: type[Forwards], directory: str, batch: int, share: bool = True) -> tuple[dict, Forwards]:
    """The tables of a sweep, its rows at once given, and what computed its forwards."""
    config = SweepConfig.from_dict({"model": directory, **ASKED})
    opened = Opened(config, Execution(rows=batch, share=share))
    context = opened.context(opened.store(path))
    context.forwards = forwards(opened.task.denoiser) if forwards is not Forwards else Forwards()
    for unit in opened.plan.units:
        context.store.write(unit, compute_unit(unit, context, lambda count: None))
    run = Run.open(path)
    return {kind: ordered(run, kind) for kind in ("ablations", "set_ablations")}, context.forwards


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3"])
@pytest.mark.parametrize("share", [True, False])
def test_replayed_sweeps_give_the_same_tables(family, share, family_directory, tmp_path):
    """Every head and two sets of heads, three fills, two timesteps, whole and last batches of each site."""
    directory = family_directory(family)
    found, graphs = swept(tmp_path / "graphs", Counted, directory, 4, share)
    expected, _ = swept(tmp_path / "plain", Forwards, directory, 4, share)
    assert isinstance(graphs, Counted)
    assert graphs.reason is None
    # not each forward was captured anew
    assert graphs.replayed > 2 * graphs.captured > 0
    for kind, table in expected.items():
        assert len(table) > 0
        for column in ("clean", "edited", "distance"):
            np.testing.assert_allclose(found[kind][column], table[column], rtol=1e-6, atol=1e-12)


class Shifted(nn.Module):
    """Adds what it makes of the timestep."""

    def __init__(self, shift: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.shift = shift
        self.runs = 0

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.runs += 1
        return (sample * self.weight + self.shift(timestep),)


def answers(model: nn.Module, graphs: Forwards, timesteps: list[int]) -> list[float]:
    """What a row of zeros, then of ones, ... becomes at each of the timesteps."""
    found = []
    with torch.inference_mode():
        for number, timestep in enumerate(timesteps):
            sample, moment = torch.full((2, 3), float(number)), torch.tensor([timestep])
            answer, product = graphs.run(
                "kind", timestep, None, lambda _: nullcontext("product"), lambda s=sample, m=moment: model(s, m)[0]
            )
            assert product == "product"
            found.append(float(answer.unique()))
    return found


def test_a_kind_of_forward_runs_in_python_while_it_is_captured_and_checked_only():
    model = Shifted(lambda timestep: timestep.float())
    graphs = Graphs(model, on_tape)
    assert answers(model, graphs, [10, 10, 10, 20, 20, 30, 40]) == [10, 11, 12, 23, 24, 35, 46]
    # to warm up and to capture; the second use; the first at each other timestep
    assert model.runs == 2 + 1 + 3
    assert "forward" not in model.__dict__


def test_an_answer_outlives_the_next_replay():
    model = Shifted(lambda timestep: timestep.float())
    graphs = Graphs(model, on_tape)
    kept = [
        graphs.run("kind", 1, None, lambda _: nullcontext(), lambda n=n: model(torch.tensor([n]), torch.tensor([0]))[0])
        for n in (1.0, 2.0, 3.0, 4.0)
    ]
    assert [float(answer) for answer, _ in kept] == [1, 2, 3, 4]


def test_a_model_that_reads_its_inputs_back_is_not_replayed():
    model = Shifted(lambda timestep: float(timestep))
    graphs = Graphs(model, on_tape)
    with pytest.warns(
        UserWarning, match="graphs: forwards are not replayed: a forward couldn't be captured: operation"
    ):
        assert answers(model, graphs, [10, 10, 20]) == [10, 11, 22]
    assert model.runs == 2 + 3


@pytest.mark.parametrize("timesteps", [[10, 20, 30], [10, 10, 10, 20, 20], [500, 500, 501, 900]])
def test_a_model_that_makes_a_constant_of_an_input_is_found_out(timesteps):
    """It looks the timestep up in Python, as by a hook of the user's own."""
    model = Shifted(lambda timestep: 0.0)
    graphs = Graphs(model, on_tape)

    def told(timestep: int) -> float:
        model.shift = lambda _: float(timestep)
        return answers(model, graphs, [timestep])[0]

    with pytest.warns(UserWarning, match="a replay differs from the forward"):
        found = [told(timestep) for timestep in timesteps]
    assert found == timesteps
    assert graphs.reason is not None


def test_other_shapes_and_contexts_are_other_kinds():
    model = Shifted(lambda timestep: timestep.float())
    graphs = Counted(model)
    for rows, key in ((1, "a"), (2, "a"), (1, "b"), (1, "a"), (2, "a")):
        sample = torch.full((rows, 3), 1.0)
        answer, _ = graphs.run(key, 5, None, lambda _: nullcontext(), lambda s=sample: model(s, torch.tensor([5]))[0])
        assert torch.equal(answer, torch.full((rows, 3), 6.0))
    assert graphs.captured == 3


def test_an_error_of_the_forward_leaves_the_model_as_it_was():
    model = Shifted(lambda timestep: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(model, Graphs(model, on_tape), [1])
    assert "forward" not in model.__dict__


def test_when_memory_runs_out_graphs_are_given_back_first():
    model = Shifted(lambda timestep: timestep.float())
    graphs = Counted(model)
    rows = Rows(4, release=graphs.release)
    done = []

    def compute(piece: range) -> None:
        done.extend(answers(model, graphs, [7])[:1] * len(piece))
        if len(piece) == 4:
            raise torch.OutOfMemoryError

    rows.run(4, compute)
    assert rows.most == 2
    # captured anew after all had been given back
    assert graphs.captured == 2
    assert graphs.reason is None
