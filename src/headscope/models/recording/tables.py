"""Recordings as tables: one transfer from the device, then columns are built of whole arrays."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headscope._extras import require
from headscope.models.hooks.forwards import Forward
from headscope.models.recording.parts import COUNT, ENTROPY, NORMALISED, Part, Reduced
from headscope.models.structure.layout import IMAGE

if TYPE_CHECKING:
    import pyarrow

_KEYS = ("forward", "site", "call", "branch", "sample", "head", "query_group", "frame")
_CLASS = "query_class"


def build_table(reduced: Sequence[Reduced], classes: bool = False) -> "pyarrow.Table":
    """See `Recording.to_arrow`.

    Args:
        classes: some parts may be of a class of queries.
    """
    pa = require("pyarrow", "diffusers")
    blocks = _blocks(reduced)
    if not blocks:
        return pa.table({})
    columns = _labels(list(blocks), pa, classes)
    sizes = np.array([part.samples * part.heads for part in blocks])
    for name in dict.fromkeys(name for values in blocks.values() for name in values):
        found = [values.get(name) for values in blocks.values()]
        if name == COUNT:
            # of the other rows as the parts have it
            known = np.split(np.asarray(columns[name]), np.cumsum(sizes)[:-1])
            counts = [old if new is None else new for old, new in zip(known, found, strict=True)]
            columns[name] = pa.array(np.concatenate(counts).astype(np.int32))
        elif classes:
            absent = [_absent(name, values, size) for values, size in zip(blocks.values(), sizes, strict=True)]
            columns[name] = _column_with_nulls(found, absent, pa)
        else:
            columns[name] = _column(name, found, sizes, pa)
    return pa.table(columns)


def _labels(parts: list[Part], pa: Any, classes: bool) -> dict[str, Any]:
    """The columns that say what each row is of; a part has a row for each sample and head."""
    sizes = np.array([part.samples * part.heads for part in parts])

    def numbers(values: list[int], dtype: type) -> np.ndarray:
        return np.repeat(np.array(values, dtype), sizes)

    def words(values: Sequence[str | None]) -> Any:
        names = list(dict.fromkeys(value for value in values if value is not None))
        codes = np.repeat(np.array([-1 if value is None else names.index(value) for value in values], np.int32), sizes)
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(names, pa.string()))

    frames = numbers([-1 if part.segment.frame is None else part.segment.frame for part in parts], np.int16)
    heights, widths = (numbers([grid[axis] for grid in map(_grid, parts)], np.int32) for axis in (0, 1))
    timesteps, samples, branches = _sample_labels(parts, pa)
    return {
        "forward": pa.array(numbers([part.forward_number for part in parts], np.int32)),
        "step": pa.array(numbers([part.step for part in parts], np.int32)),
        "timestep": timesteps,
        "site": words([part.site for part in parts]),
        "call": pa.array(numbers([part.call for part in parts], np.int16)),
        "sample": samples,
        "branch": branches,
        "head": pa.array(np.concatenate([np.tile(np.arange(p.heads, dtype=np.int16), p.samples) for p in parts])),
        "query_group": words([part.segment.group for part in parts]),
        **({_CLASS: words([part.query_class for part in parts])} if classes else {}),
        "frame": pa.array(frames, mask=frames < 0),
        "queries": pa.array(numbers([part.queries for part in parts], np.int32)),
        "keys": pa.array(numbers([part.keys for part in parts], np.int32)),
        "grid_height": pa.array(heights, mask=heights == 0),
        "grid_width": pa.array(widths, mask=widths == 0),
    }


def _sample_labels(parts: list[Part], pa: Any) -> tuple[Any, Any, Any]:
    """The columns timestep, sample (within its branch) and branch."""
    known = _timesteps([part.forward for part in parts])
    timesteps, within = [], []
    branches: list[str | None] = []
    for part in parts:
        samples = np.arange(part.first_sample, part.first_sample + part.samples)
        timesteps.append(known[id(part.forward)][samples])
        within.append(samples % part.forward.samples)
        branches += [part.forward.branch_of(int(sample)) for sample in samples]
    heads = np.concatenate([np.full(part.samples, part.heads) for part in parts])
    names = list(dict.fromkeys(branch for branch in branches if branch is not None))
    codes = np.array([-1 if branch is None else names.index(branch) for branch in branches], np.int8)
    codes = np.repeat(codes, heads)
    return (
        pa.array(np.repeat(np.concatenate(timesteps), heads)),
        pa.array(np.repeat(np.concatenate(within), heads).astype(np.int32)),
        pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(names, pa.string())),
    )


def _blocks(reduced: Sequence[Reduced]) -> dict[Part, dict[str, np.ndarray]]:
    """Each part's columns, [samples * heads] or [samples * heads, numbers], in the order of execution."""
    arrays = iter(
        _to_host([tensor for entry in reduced for tensor in (*entry.values, entry.rows) if tensor is not None])
    )
    parts: dict[tuple, Part] = {}
    # calls of one shape were reduced together, wherever they are in the model
    order: dict[tuple, tuple[int, int, int]] = {}
    found: dict[tuple, dict[str, np.ndarray]] = defaultdict(dict)
    for entry in reduced:
        names = [entry.name if reduction == "sum" else f"{entry.name}_{reduction}" for reduction in entry.reductions]
        values = {name: next(arrays) for name in names}
        if entry.rows is not None:
            values[entry.name] = next(arrays)
        for index, part in enumerate(entry.parts):
            # a site may attend to one sample after the other
            place = (part.forward_number, part.site, part.call, part.segment, part.first_sample, part.class_number)
            parts.setdefault(place, part)
            number = (part.forward_number, part.number, part.class_number)
            order[place] = min(number, order.get(place, number))
            for name, array in values.items():
                # numbers of classes are those of every head
                each = np.broadcast_to(array[index], (part.samples, part.heads, *array.shape[3:]))
                found[place][name] = each.reshape(part.samples * part.heads, *array.shape[3:])
            # recorded, before or after this, where rows see different numbers of keys
            if entry.name == ENTROPY and f"{NORMALISED}_mean" not in found[place]:
                entropy = found[place]["entropy_mean"]
                mean = entropy / np.float32(np.log(part.keys)) if part.keys > 1 else np.full_like(entropy, np.nan)
                found[place][f"{NORMALISED}_mean"] = mean
    return {parts[place]: found[place] for place in sorted(parts, key=order.__getitem__)}


def _grid(part: Part) -> tuple[int, int]:
    """(height, width) of the part's queries, (0, 0) where it isn't known."""
    picture = part.segment.group == IMAGE and part.query_class is None
    known = part.forward.geometry.grid(part.queries) if picture else None
    return known or (0, 0)


def _to_host(tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """Tensors of one device and many shapes as arrays, with one transfer."""
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    pieces = np.split(flat, ends[:-1])
    return [piece.reshape(tuple(tensor.shape)) for piece, tensor in zip(pieces, tensors, strict=True)]


def _timesteps(forwards: list[Forward]) -> dict[int, np.ndarray]:
    """By the forward's id, its timesteps, one per sample of the batch."""
    unique = list({id(forward): forward for forward in forwards}.values())
    arrays = _to_host([forward.timestep for forward in unique], torch.float64)
    return {id(one): np.broadcast_to(array, (one.batch,)) for one, array in zip(unique, arrays, strict=True)}


def _column(name: str, values: list[np.ndarray | None], sizes: np.ndarray, pa):
    """One statistic's numbers for all rows; null where a row has none."""
    shapes = {array.shape[1:] for array in values if array is not None}
    if shapes == {()}:
        filled = [np.full(size, np.nan, np.float32) if a is None else a for a, size in zip(values, sizes, strict=True)]
        column = np.concatenate(filled)
        missing = any(array is None for array in values)
        return pa.array(column, from_pandas=missing or name.startswith(NORMALISED))
    lists = [[None] * size if a is None else list(a.reshape(size, -1)) for a, size in zip(values, sizes, strict=True)]
    return pa.array([row for block in lists for row in block], pa.list_(pa.float32()))


def _absent(name: str, values: dict[str, np.ndarray], size: int) -> np.ndarray:
    """True where a part's rows have no number of that name: bool [size]."""
    numbers = values.get(name)
    if numbers is None:
        return np.ones(size, bool)
    absent = np.zeros(size, bool)
    if COUNT in values and name.endswith("_mean"):
        absent |= values[COUNT] == 0
    # a class without counterparts has no share of the keys, and no mass either
    share = values.get(f"{name.removesuffix('_mean').removesuffix('_share')}_share")
    if share is not None and share.ndim == 1:
        absent |= np.isnan(share)
    return absent | np.isnan(numbers) if name.startswith(NORMALISED) and numbers.ndim == 1 else absent


def _column_with_nulls(values: list[np.ndarray | None], absent: list[np.ndarray], pa: Any) -> Any:
    """One statistic's numbers for all rows; null where they are absent. NaN stays what it is."""
    mask = np.concatenate(absent)
    if {array.shape[1:] for array in values if array is not None} == {()}:
        filled = [np.zeros(len(none), np.float32) if a is None else a for a, none in zip(values, absent, strict=True)]
        return pa.array(np.concatenate(filled), mask=mask)
    there = [None if a is None else a.reshape(len(none), -1)[~none] for a, none in zip(values, absent, strict=True)]
    lengths = np.zeros(len(mask), np.int64)
    lengths[~mask] = np.concatenate([np.full(len(rows), rows.shape[1]) for rows in there if rows is not None])
    ends = np.cumsum(lengths)
    numbers = pa.array(np.concatenate([rows.ravel() for rows in there if rows is not None]).astype(np.float32))
    # beyond what a list can count, this raises
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, numbers, mask=pa.array(mask))


def query_maps(
    table: "pyarrow.Table",
    statistic: str,
    site: str,
    heads: Sequence[int] | None,
    step: int | None,
    sample: int,
    branch: str | None,
    frame: int | None,
    call: int | None,
) -> dict[int, np.ndarray]:
    """See `Recording.plot`: per head [grid_height, grid_width], the mean over the rows that fit."""
    pl = require("polars", "diffusers")
    rows = pl.from_arrow(table).with_columns(pl.col("query_group", "site", "branch").cast(pl.String))
    if _CLASS in rows.columns:
        # classes have means alone
        rows = rows.filter(pl.col(_CLASS).is_null())
    whole = [name for name, kind in rows.schema.items() if isinstance(kind, pl.List)]
    if statistic not in whole:
        listed = ", ".join(whole) or "none here"
        raise ValueError(f"statistic: got {statistic!r}, expected one that was recorded with reduce=None: {listed}")
    rows = rows.filter(pl.col("query_group") == IMAGE)
    # one after the other, so that an error lists what there is of the rest
    chosen = {"site": site, "sample": sample, "step": step, "branch": branch, "frame": frame, "call": call}
    for name, value in chosen.items():
        if value is None:
            continue
        there = rows[name].unique().sort().to_list()
        rows = rows.filter(pl.col(name) == value)
        if not len(rows):
            listed = ", ".join(map(str, there)) or "none: nothing was recorded of image queries"
            raise ValueError(f"{name}: got {value!r}, of which nothing was recorded, expected one of {listed}")
    # they are attention to different things
    if (calls := rows["call"].n_unique()) > 1:
        raise ValueError(f"call: got None, and site {site!r} attends {calls} times in a forward; expected one of them")
    if heads is not None:
        there = rows["head"].unique().sort().to_list()
        for head in heads:
            if head not in there:
                raise ValueError(f"heads: got {head}, expected some of {', '.join(map(str, there))}")
        rows = rows.filter(pl.col("head").is_in(list(heads)))
    if rows["grid_height"].null_count():
        raise ValueError(f"site: the model doesn't tell where the queries of {site!r} are in the picture")
    maps = {}
    for (head,), of_head in rows.group_by("head", maintain_order=True):
        shape = (of_head["grid_height"][0], of_head["grid_width"][0])
        maps[int(head)] = np.mean([np.array(values) for values in of_head[statistic]], 0).reshape(shape)
    return dict(sorted(maps.items()))


def build_dataset(table: "pyarrow.Table", xarray: Any) -> Any:
    """See `Recording.to_xarray`."""
    pa = require("pyarrow", "diffusers")
    coordinates: dict[str, list] = {}
    places = []
    keys = (*_KEYS, _CLASS) if _CLASS in table.column_names else _KEYS
    for name in keys:
        values = table[name].to_pylist()
        known = list(dict.fromkeys(values))
        # None stands for "no guidance" and "not a video"
        coordinates[name] = ["none" if value is None else value for value in known]
        if name == "frame":
            coordinates[name] = [-1 if value is None else value for value in known]
        index = {value: position for position, value in enumerate(known)}
        places.append(np.array([index[value] for value in values]))
    shape = tuple(len(values) for values in coordinates.values())
    flat = np.ravel_multi_index(places, shape)
    variables = {}
    for name in table.column_names:
        if not pa.types.is_floating(table.schema.field(name).type) or name == "timestep":
            continue
        array = np.full(int(np.prod(shape)), np.nan, np.float32)
        array[flat] = table[name].to_numpy()
        variables[name] = (keys, array.reshape(shape))
    for name in ("step", "timestep"):
        values = table[name].to_numpy()
        along = np.zeros(shape[0], values.dtype)
        along[places[0]] = values
        coordinates[name] = ("forward", along)  # type: ignore[assignment]
        # samples of one forward may have timesteps of their own
        if not np.array_equal(along[places[0]], values, equal_nan=True):
            dimensions = ("forward", "branch", "sample")
            cells = tuple(places[_KEYS.index(dimension)] for dimension in dimensions)
            each = np.full([len(coordinates[dimension]) for dimension in dimensions], np.nan)
            each[cells] = values
            coordinates[name] = (dimensions, each)  # type: ignore[assignment]
    return xarray.Dataset(variables, coords=coordinates)
