"""The reach of attention over an image."""

import torch
from torch import Tensor

from headscope._shapes import Float, RowIndices, RowValue, Scores, StatisticTensors
from headscope.ops.statistics.statistic import BuiltIn


class Distance(BuiltIn):
    """sum_j p_ij * Euclidean distance(i, j), the expected attention distance; 0 where no key is valid. Tokens.

    Query i stands at (i // width, i % width) of its grid, key j likewise of its own. Grids of different sizes are laid
    over each other corner to corner, in units of one token each.

    Args:
        grid: (height, width) of the queries.
        key_grid: (height, width) of the keys; the queries' own if None.
        name: its key in `result.statistics`.

    Raises:
        ValueError: a grid isn't two positive integers; at the call, its size isn't the number of queries or keys.
    """

    key = "distance"
    unit = "tokens"
    description = "sum_j p * Euclidean distance(i, j)"

    def __init__(
        self, grid: tuple[int, int], key_grid: tuple[int, int] | None = None, *, name: str | None = None
    ) -> None:
        grids = {"grid": grid, "key_grid": grid if key_grid is None else key_grid}
        for argument, value in grids.items():
            if len(value) != 2 or any(not isinstance(size, int) or size < 1 for size in value):
                raise ValueError(f"{argument}: got {value!r}, expected (height, width), two positive integers")
        super().__init__((*grids["grid"], *grids["key_grid"]), (), name)

    def check(
        self, query: Float[Tensor, "batch heads queries dim"], key: Float[Tensor, "batch kv_heads keys dim"]
    ) -> None:
        height, width, key_height, key_width = self.constants
        for argument, tokens, size in (
            ("grid", query.shape[2], (height, width)),
            ("key_grid", key.shape[2], (key_height, key_width)),
        ):
            if tokens != size[0] * size[1]:
                raise ValueError(
                    f"{self.name}: {argument} {size} has {size[0] * size[1]} tokens, the call has {tokens}"
                )

    def formula(self, logits: Scores, probabilities: Scores, rows: RowIndices, tensors: StatisticTensors) -> RowValue:
        width, key_width = self.constants[1], self.constants[3]
        columns = torch.arange(probabilities.shape[-1], device=rows.device)
        down = rows[:, None] // width - columns // key_width
        across = rows[:, None] % width - columns % key_width
        return (probabilities * torch.hypot(down.to(logits.dtype), across.to(logits.dtype))).sum(-1)
