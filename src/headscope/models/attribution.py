"""Every head's importance from a few backwards.

The score is a task's teacher-forced loss of one item, the mean over outputs o of (prediction_o - target_o)^2. With a
gate per item and head (1: the head as it is, 0: its output replaced by the fill), removing a head moves the score by

    score(0) - score(1) = g + c + higher orders
    g = -d score / d gate
    c = 1/2 d^2 score / d gate^2, of which the Gauss-Newton part is (1 / outputs) sum_o (d prediction_o / d gate)^2

and the sum over outputs is the mean over random +-1 cotangents v of (d <v, prediction> / d gate)^2. At a trained
optimum g averages to nothing, so heads are ranked by g + c.

What c leaves out of the second order is the mean of the error times the prediction's own second derivative. It is small
where the error has nothing to do with the model's curvature, as after training; with random weights it may undo c.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headscope._extras import require
from headscope.counter import counter_uniform, whole
from headscope.models.hooks.passing import PassingGradients
from headscope.models.tasks import NoisyInputs, Prepared, Task, TaskItem
from headscope.ops import HeadEdit

if TYPE_CHECKING:
    import pyarrow

# the context in which these edits act, by site
Edit = Callable[[dict[str, HeadEdit]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Attribution:
    """The result of `Scope.attribute`: float64 arrays [items, timesteps, heads]; heads are those of all sites in turn.

    Attributes:
        items: keys of the items.
        timesteps: the scheduler's timesteps.
        heads: (site, head) of each column.
        loss: the score of the whole model, [items, timesteps].
        g: -d score / d gate.
        c: the Gauss-Newton term, from `cotangents` random vectors.
        integrated: -integral of d score / d gate along the path on which all gates go from 1 to 0 together, where it
            was asked for. Over all heads it sums to score(all removed) - score(whole).
    """

    items: tuple[str, ...]
    timesteps: tuple[int, ...]
    heads: tuple[tuple[str, int], ...]
    loss: np.ndarray
    g: np.ndarray
    c: np.ndarray
    integrated: np.ndarray | None = None

    def ranking(self) -> list[tuple[str, int]]:
        """Heads by g + c averaged over items and timesteps, the most important first."""
        importance = (self.g + self.c).mean((0, 1))
        return [self.heads[index] for index in np.argsort(-importance, kind="stable")]

    def to_arrow(self) -> "pyarrow.Table":
        """A row per item, timestep and head: item, timestep, site, head, loss, g, c, importance (g + c), integrated."""
        pa = require("pyarrow", "diffusers")
        items, timesteps, heads = self.g.shape
        index = np.arange(items * timesteps * heads)
        columns = {
            "item": pa.array(self.items).take(pa.array(index // (timesteps * heads))).dictionary_encode(),
            "timestep": pa.array(np.array(self.timesteps, np.int32)[index // heads % timesteps]),
            "site": pa.array([site for site, _ in self.heads]).take(pa.array(index % heads)).dictionary_encode(),
            "head": pa.array(np.array([head for _, head in self.heads], np.int16)[index % heads]),
            "loss": pa.array(np.repeat(self.loss.reshape(-1), heads)),
            "g": pa.array(self.g.reshape(-1)),
            "c": pa.array(self.c.reshape(-1)),
            "importance": pa.array((self.g + self.c).reshape(-1)),
        }
        if self.integrated is not None:
            columns["integrated"] = pa.array(self.integrated.reshape(-1))
        return pa.table(columns)

    def to_polars(self):
        """`to_arrow()` as a polars DataFrame."""
        return require("polars", "diffusers").from_arrow(self.to_arrow())


def attribute(
    task: Task,
    items: Sequence[TaskItem],
    timesteps: Sequence[int],
    *,
    sites: Mapping[str, int],
    edit: Edit,
    cotangents: int,
    replicate: int,
    integrate: int,
    batch: int,
) -> Attribution:
    """See `Scope.attribute`.

    Args:
        sites: the number of heads of each.
        edit: gives the context in which the heads have gates.
    """
    cotangents, integrate = whole("cotangents", cotangents, least=1), whole("integrate", integrate, least=0)
    batch = whole("batch", batch, least=1)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attribute needs gradients, which torch.inference_mode rules out; call it outside of that")
    # a scheduler's own are a tensor
    timesteps = torch.as_tensor(timesteps).tolist()
    if not items or not timesteps:
        raise ValueError("items, timesteps: got none, expected at least one of each")
    gates = _Gates(sites, edit, task.device)
    shape = (len(items), len(timesteps), sum(sites.values()))
    loss = np.zeros(shape[:2])
    found = {name: np.zeros(shape) for name in ("g", "c", *(("integrated",) if integrate else ()))}
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        rows = slice(start, start + len(chunk))
        prepared = task.prepare(chunk)
        for column, timestep in enumerate(timesteps):
            inputs = task.noisy_inputs(prepared, timestep, replicate)
            vectors = _cotangents(prepared, timestep, replicate, cotangents, inputs.target)
            scores = _one_forward(task, inputs, gates, vectors)
            loss[rows, column], found["g"][rows, column], found["c"][rows, column] = scores
            if integrate:
                found["integrated"][rows, column] = _integrated(task, inputs, gates, integrate)
    heads = tuple((name, head) for name, count in sites.items() for head in range(count))
    return Attribution(tuple(item.key for item in items), tuple(timesteps), heads, loss, **found)


class _Gates:
    """Gates that take gradients, [samples, heads] at each site."""

    def __init__(self, sites: Mapping[str, int], edit: Edit, device: torch.device) -> None:
        self._sites = sites
        self._edit = edit
        self._device = device

    @contextmanager
    def applied(self, samples: int, level: float = 1.0) -> Iterator[list[Tensor]]:
        """Inside, the model has a gate of that level at every head of every sample; gives them by site."""
        gates = {
            name: torch.full((samples, heads), level, device=self._device, requires_grad=True)
            for name, heads in self._sites.items()
        }
        with (
            torch.enable_grad(),
            PassingGradients(),
            self._edit({name: HeadEdit(gate) for name, gate in gates.items()}),
        ):
            yield list(gates.values())


def _gradient(value: Tensor, gates: list[Tensor], retain: bool = True) -> Tensor:
    """d value / d gate, float64 [samples, heads of all sites]."""
    grads = torch.autograd.grad(value, gates, retain_graph=retain)
    return torch.cat([grad.double() for grad in grads], 1)


def _one_forward(
    task: Task, inputs: NoisyInputs, gates: _Gates, vectors: Iterator[Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss [items], g and c [items, heads], from one forward and a backward per cotangent and one more.

    One backward after the other: all at once takes as long from eight items on, and memory for each (bench/NOTES.md).
    """
    with gates.applied(len(inputs.sample)) as leaves:
        prediction = task.predict(inputs)
        error = prediction.double() - inputs.target.double()
        loss = error.square().flatten(1).mean(1)
        # samples don't meet in the model: the sum's gradient is each sample's own
        g = -_gradient(loss.sum(), leaves)
        outputs = prediction[0].numel()
        squares, count = torch.zeros_like(g), 0
        for vector in vectors:
            squares += _gradient((prediction * vector).sum(), leaves).square()
            count += 1
    return loss.detach().cpu().numpy(), g.cpu().numpy(), (squares / (count * outputs)).cpu().numpy()


def _integrated(task: Task, inputs: NoisyInputs, gates: _Gates, points: int) -> np.ndarray:
    """-integral over the joint gate path, [items, heads], by the midpoint rule."""
    total = None
    for point in range(points):
        with gates.applied(len(inputs.sample), level=(point + 0.5) / points) as leaves:
            slope = -_gradient(task.loss(inputs).sum(), leaves, retain=False)
        total = slope if total is None else total + slope
    assert total is not None
    return (total / points).cpu().numpy()


def _cotangents(prepared: Prepared, timestep: int, replicate: int, count: int, like: Tensor) -> Iterator[Tensor]:
    """Random +-1 like the prediction, keyed by (item, timestep, replicate): the same on every machine."""
    for index in range(count):
        drawn = [
            counter_uniform("cotangent", key, timestep, replicate, index, shape=tuple(like.shape[1:])) < 0.5
            for key in prepared.keys
        ]
        signs = torch.from_numpy(np.stack(drawn)).to(like.device)
        yield torch.where(signs, 1.0, -1.0).to(like.dtype)
