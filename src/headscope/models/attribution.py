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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headscope._extras import require
from headscope.counter import counter_uniform, whole
from headscope.models.editing.edits import Fill
from headscope.models.tasks import NoisyInputs, Prepared, Task, TaskItem
from headscope.ops import HeadEdit

if TYPE_CHECKING:
    import pyarrow

    from headscope.models.scope import Scope


@dataclass(frozen=True)
class Attribution:
    """What `Scope.attribute` found, float64 arrays [items, timesteps, heads]; heads are those of all sites in turn.

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
    scope: "Scope",
    task: Task,
    items: Sequence[TaskItem],
    timesteps: Sequence[int],
    *,
    sites: Sequence[str],
    cotangents: int,
    fill: Fill,
    replicate: int,
    integrate: int,
    batch: int,
) -> Attribution:
    """See `Scope.attribute`."""
    cotangents, integrate = whole("cotangents", cotangents, least=1), whole("integrate", integrate, least=0)
    batch = whole("batch", batch, least=1)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attribute needs gradients, which torch.inference_mode rules out; call it outside of that")
    # a scheduler's own are a tensor
    timesteps = torch.as_tensor(timesteps).tolist()
    if not items or not timesteps:
        raise ValueError("items, timesteps: got none, expected at least one of each")
    if task.denoiser is not scope.denoiser:
        raise ValueError("task: got one of another model, expected the scope's own denoiser")
    sizes = {name: scope.site(name).heads for name in sites}
    shape = (len(items), len(timesteps), sum(sizes.values()))
    loss = np.zeros(shape[:2])
    found = {name: np.zeros(shape) for name in ("g", "c", *(("integrated",) if integrate else ()))}
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        own = slice(start, start + len(chunk))
        prepared = task.prepare(chunk)
        for column, timestep in enumerate(timesteps):
            inputs = task.noisy_inputs(prepared, timestep, replicate)
            vectors = _cotangents(prepared, timestep, replicate, cotangents, inputs.target)
            loss[own, column], found["g"][own, column], found["c"][own, column] = _one_forward(
                scope, task, inputs, sizes, fill, vectors
            )
            if integrate:
                found["integrated"][own, column] = _integrated(scope, task, inputs, sizes, fill, integrate)
    heads = tuple((name, head) for name, count in sizes.items() for head in range(count))
    return Attribution(tuple(item.key for item in items), tuple(timesteps), heads, loss, **found)


def _one_forward(
    scope: "Scope", task: Task, inputs: NoisyInputs, sizes: dict[str, int], fill: Fill, vectors: Iterator[Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss [items], g and c [items, heads], from one forward and a backward per cotangent and one more."""
    with torch.enable_grad(), _Gates(scope, len(inputs.sample), sizes, fill, task.device) as gates:
        prediction = task.predict(inputs)
        error = prediction.double() - inputs.target.double()
        loss = error.square().flatten(1).mean(1)
        # samples don't meet in the model: the sum's gradient is each sample's own
        g = -gates.gradient(loss.sum())
        outputs = prediction[0].numel()
        squares, count = torch.zeros_like(g), 0
        for vector in vectors:
            slope = gates.gradient((prediction * vector).sum())
            squares += slope.square()
            count += 1
    return loss.detach().cpu().numpy(), g.cpu().numpy(), (squares / (count * outputs)).cpu().numpy()


def _integrated(
    scope: "Scope", task: Task, inputs: NoisyInputs, sizes: dict[str, int], fill: Fill, points: int
) -> np.ndarray:
    """-integral over the joint gate path, [items, heads], by the midpoint rule."""
    total = None
    for point in range(points):
        level = (point + 0.5) / points
        with torch.enable_grad(), _Gates(scope, len(inputs.sample), sizes, fill, task.device, level) as gates:
            slope = -gates.gradient(task.loss(inputs).sum(), retain=False)
        total = slope if total is None else total + slope
    assert total is not None
    return (total / points).cpu().numpy()


class _Gates:
    """A context in which every head's gate is a leaf that takes gradients, [samples, heads] at each site."""

    def __init__(
        self, scope: "Scope", samples: int, sizes: dict[str, int], fill: Fill, device: torch.device, level: float = 1.0
    ) -> None:
        self._leaves = {
            name: torch.full((samples, count), level, device=device, requires_grad=True)
            for name, count in sizes.items()
        }
        self._edit: Any = scope.edit({name: HeadEdit(gate) for name, gate in self._leaves.items()}, fill=fill)

    def __enter__(self) -> "_Gates":
        self._edit.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._edit.__exit__(*error)

    def gradient(self, value: Tensor, retain: bool = True) -> Tensor:
        """d value / d gate, float64 [samples, heads of all sites]."""
        grads = torch.autograd.grad(value, list(self._leaves.values()), retain_graph=retain)
        return torch.cat([grad.double() for grad in grads], 1)


def _cotangents(prepared: Prepared, timestep: int, replicate: int, count: int, like: Tensor) -> Iterator[Tensor]:
    """Random +-1 like the prediction, keyed by (item, timestep, replicate): the same on every machine."""
    for index in range(count):
        drawn = [
            counter_uniform("cotangent", key, timestep, replicate, index, shape=tuple(like.shape[1:])) < 0.5
            for key in prepared.keys
        ]
        signs = torch.from_numpy(np.stack(drawn)).to(like.device)
        yield torch.where(signs, 1.0, -1.0).to(like.dtype)
