"""One number of a study with all that is known of it, and the words that define such numbers."""

from dataclasses import dataclass

import polars as pl

MEAN = "Mean over sources; a source counts once, with the mean of its items."
DIFFERENCE = (
    "Mean over the sources of the first group minus mean over the sources of the second. Groups of the same sources are"
    " compared in pairs, source by source."
)
RATIO = (
    "Mean over the sources of the first group divided by the mean over the sources of the second (a ratio of means,"
    " not a mean of ratios). Its interval is that of its logarithm. It equals 1 where the difference is 0, and the test"
    " of the difference is its test."
)
# {of}: the loss, or the error
RELATIVE = (
    "Degradation at a timestep = sum of (edited {of} − clean {of}) / sum of clean {of}, both sums over sources (a ratio"
    " of sums, not a mean of ratios: that mean is ruled by the images with the smallest {of}). Overall = mean over the"
    " timesteps, each with equal weight."
)
ABSOLUTE = (
    "Mean over sources of edited {of} − clean {of}, at a timestep; overall = mean over the timesteps, each with equal"
    " weight."
)

SHARE = (
    "One degradation divided by another, each averaged over the timesteps first; sums over sources as in either. The"
    " interval is that of the quotient (delta method and bootstrap-t, both drawn together). There is none, and no"
    " value, where the divisor's own interval reaches 0."
)


@dataclass(frozen=True)
class Estimate:
    """One number and how far it can be trusted.

    Attributes:
        value: the estimate; NaN where it is void.
        low, high: its 95 % interval; None where there is only one source, or nothing bounds the value.
        p_value: two-sided; None where nothing was tested or there are too few sources.
        sources: how many sources each of the compared groups has.
        exploratory: too few sources, or a quantity that was looked at before it was chosen.
        unit: of the value and its interval.
        definition: what the number is, in words.
        standard_error: of the sampling of sources; None where there is only one.
        void: how many rows are missing or not finite, which leaves no value.
        paired: whether two groups were compared source by source; None where there is one group.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    sources: tuple[int, ...]
    exploratory: bool
    unit: str
    definition: str
    standard_error: float | None = None
    void: int = 0
    paired: bool | None = None

    @classmethod
    def from_row(cls, frame: pl.DataFrame, unit: str, definition: str) -> "Estimate":
        """The single row of a family of one quantity. Raises ValueError for any other number of rows."""
        if len(frame) != 1:
            raise ValueError(f"frame: got {len(frame)} rows, expected 1")
        row = frame.row(0, named=True)
        sources = row["sources"]
        return cls(
            value=float("nan") if row["value"] is None else row["value"],
            low=row["low"],
            high=row["high"],
            p_value=row.get("p_value"),
            sources=tuple(sources) if isinstance(sources, list) else (sources,),
            exploratory=row["exploratory"],
            unit=unit,
            definition=definition,
            standard_error=row["standard_error"],
            void=row["void"],
            paired=row.get("paired"),
        )


def plain_text(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with plain strings in place of dictionary-coded ones, which stores of tables prefer."""
    return rows.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
