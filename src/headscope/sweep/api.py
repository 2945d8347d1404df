"""headscope.sweep(...): a sweep from Python in one call.

The package `headscope.sweep` is itself what is called. A function of that name beside it would be replaced by the
package as soon as anything imported it, so the module's class is one whose instances can be called, as Python's data
model provides for modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, Unpack

from rich.console import Console

from headscope.models.structure.sites import find_denoiser
from headscope.sweep.plan.config import IN_MEMORY, SweepConfig
from headscope.sweep.plan.in_memory import check_pipeline
from headscope.sweep.plan.sets import HeadSet
from headscope.sweep.store.run import Run
from headscope.sweep.work.launch import Workers, run_sweep
from headscope.zoo import DEFAULT_MODEL


class Fields(TypedDict, total=False):
    """SweepConfig's attributes but for the model, lists welcome."""

    groups: Sequence[str]
    prompts: str | None
    splits: Sequence[str]
    items: int | None
    timesteps: Sequence[int] | None
    bands: int
    observe: bool
    fills: Sequence[str]
    scores: Sequence[str]
    heads: Sequence[tuple[str, int]] | None
    sites: Sequence[str]
    sets: Sequence[HeadSet | Mapping[str, Any]]
    reference_items: int | None
    reference_folds: int
    generate_steps: int
    generate_window: tuple[int, int] | None
    image_scores: Sequence[str]
    attribute: bool
    cotangents: int
    seed: int
    draws: int
    device: str
    dtype: str
    autocast: str | None
    channels_last: bool | None
    compile: bool
    graphs: bool
    kinds: Sequence[str]
    features: Sequence[str]
    faithfulness: float
    circuit_metric: str
    paths: Sequence[HeadSet | Mapping[str, Any]]


def sweep(
    out: str | Path,
    *,
    model: Any = DEFAULT_MODEL,
    executor: str | None = None,
    workers: int = 1,
    address: str | None = None,
    job: Mapping[str, Any] | None = None,
    batch: int | None = None,
    progress: bool = True,
    console: Console | None = None,
    **fields: Unpack[Fields],
) -> Run:
    """Run a sweep, or what is left of it, and open its tables.

        run = headscope.sweep("my-run", groups=["faces"], items=4, fills=["zero"])
        run.table("ablations").group_by("site", "head").agg(...)

    Args:
        out: the run directory; new, or one of the same configuration, which is then gone on with.
        model: a bundled model ("pixeldit", "unet", "planted:roles", ...), a directory with a diffusers pipeline, or a
            pipeline in memory. That one stays on its device and in its dtype, is told from others by its weights,
            classes and settings, and is given back as it was.
        executor: "local" (this process), "processes" (of this machine), "ray" or "slurm"; None is local for one worker
            and processes for several.
        workers: how many processes.
        address: of a Ray cluster; None for this machine.
        job: parameters of Slurm jobs, as submitit names them.
        batch: rows that pass through the denoiser at once; None measures how many fit.
        progress: show it: a bar on a terminal, a line of JSON every 15 seconds elsewhere.
        console: where to show it; standard error by default.
        fields: what the sweep does: the attributes of `SweepConfig`.

    Raises:
        ValueError: an unknown field, a value that can't be, or a directory of another run; before any work starts.
        SweepFailed, DiskFull: as `run_sweep` says.
    """
    if job is not None and not isinstance(job, Mapping):
        raise ValueError(f"job: got {job!r}, expected a mapping of names to values")
    chosen = Workers(
        executor or ("local" if workers == 1 else "processes"),
        workers,
        address=address,
        parameters=dict(job) if job else None,
    )
    values: dict[str, Any] = dict(fields)
    pipeline = None
    if not isinstance(model, (str, Path)):
        check_pipeline(model)
        for name in ("device", "dtype"):
            if name in values:
                raise ValueError(f"{name}: got {values[name]!r} with a model in memory, which stays as it is")
        pipeline, model = model, IN_MEMORY
        parameter = next(find_denoiser(pipeline).parameters())
        values |= {"device": str(parameter.device), "dtype": str(parameter.dtype).removeprefix("torch.")}
    config = SweepConfig.from_dict({"model": str(model), **values})
    return run_sweep(config, out, batch=batch, workers=chosen, progress=progress, console=console, pipeline=pipeline)


class SweepModule(ModuleType):
    """The class of the module `headscope.sweep`, which is called like the function `sweep`."""

    __call__ = staticmethod(sweep)
