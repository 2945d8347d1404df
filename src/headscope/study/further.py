"""Scores of a sweep beside entropies, losses, attributions and the distance of images drawn without single heads.

The distance of predictions, the error of the implied clean image, scores of drawn images, those of the user's own; of
single heads and of sets. Nothing is ranked or tested.
"""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from headscope.features import ON_FEATURE
from headscope.study.ablation import DISTANCE, per_group_and_fill
from headscope.study.fill_error import without_folds
from headscope.study.finite import PAIRS
from headscope.study.inference import ABSOLUTE, MEAN, RELATIVE, degradations, means, plain_text

# the columns that aren't scores
LABELS = (
    *("item", "group", "source_id", "split", "replicate", "timestep", "site", "head", "edit", "fill"),
    *("steps", "first_step", "end_step"),
)
# scores that other sections of the report show
_SHOWN = {"generations": ("distance",)}


class Score(NamedTuple):
    """One column, or pair of them, of a run's table.

    Attributes:
        kind: the table.
        name: of the column or pair.
        title: what it is.
        definition: how it is averaged, and its unit.
        fraction: whether it is written as a percentage.
        values: group, fill, site and head or edit, value, low, high, sources, exploratory.
        left_out: how many values of a score of the user's own were NaN, for items that have none, and left out.
    """

    kind: str
    name: str
    title: str
    definition: str
    fraction: bool
    values: pl.DataFrame
    left_out: int = 0


def further_scores(tables: Mapping[str, pl.DataFrame], seed: int = 0) -> list[Score]:
    """Everything in a run's tables that has a number for each edit and no section of its own; sets of heads first.

    Args:
        tables: by kind; see `headscope.sweep.Run.tables`.
        seed: of the resampling.
    """
    found = []
    for kind, table in sorted(tables.items(), key=lambda entry: not entry[0].startswith("set_")):
        # attributions have a section of their own
        if not of_edits(table) or kind == "attributions" or not len(table):
            continue
        rows = without_folds(plain_text(table))
        edited = kind.removeprefix("set_")
        if "x0_clean" in rows.columns:
            found += _degradation_of_x0(kind, rows, seed)
        for name in unlabelled(rows):
            # losses have sections of their own, and those over a feature's pixels are tested with the heads' roles
            if any(name in pair for pair in PAIRS.values()) or name in _SHOWN.get(kind, ()):
                continue
            if name.startswith(ON_FEATURE):
                continue
            own = name not in _titles(edited)

            def averaged(part: pl.DataFrame, name: str = name, own: bool = own) -> pl.DataFrame:
                return means(part, name, _by(part), _bands(part), seed, leave_out=own)

            values = per_group_and_fill(rows, averaged)
            left_out = int(values["left_out"].sum()) if own else 0
            found.append(Score(kind, name, _title(edited, name), _definition(edited, name), False, values, left_out))
    return found


def of_edits(table: pl.DataFrame) -> bool:
    """True for a table of what edits of heads did to items; not for observations, searches and paths between heads."""
    return {"item", "fill"} <= set(table.columns) and bool({"site", "edit"} & set(table.columns))


def unlabelled(table: pl.DataFrame) -> list[str]:
    """The columns of numbers."""
    return [name for name, kind in table.schema.items() if name not in LABELS and kind.is_numeric()]


def _degradation_of_x0(kind: str, rows: pl.DataFrame, seed: int) -> list[Score]:
    hows = ("Relative", "Absolute")
    rows = rows.with_columns(pl.col("x0_clean").alias("clean"), pl.col("x0_edited").alias("edited"))

    def both(part: pl.DataFrame) -> pl.DataFrame:
        pair = degradations(part, _by(part), _bands(part), seed, test=False)
        return pl.concat(table.with_columns(how=pl.lit(how)) for how, table in zip(hows, pair, strict=True))

    values = per_group_and_fill(rows, both).drop("p_value")
    unit = "In squared units of what the model denoises."
    definitions = RELATIVE.format(of="error"), f"{ABSOLUTE.format(of='error')} {unit}"
    return [
        Score(
            kind,
            f"x0_{how.lower()}",
            f"{how} degradation of the error of the clean image that the prediction implies (x0)",
            text,
            how == "Relative",
            values.filter(pl.col("how") == how).drop("how"),
        )
        for how, text in zip(hows, definitions, strict=True)
    ]


def _by(rows: pl.DataFrame) -> list[str]:
    return ["edit"] if "edit" in rows.columns else ["site", "head"]


def _bands(rows: pl.DataFrame) -> str | None:
    return "timestep" if "timestep" in rows.columns else None


def _title(edited: str, name: str) -> str:
    return _titles(edited).get(name, f"{name}, a score of the user's own")


def _titles(edited: str) -> dict[str, str]:
    of = "prediction" if edited == "ablations" else "drawn image"
    return {
        "distance": f"Distance of the {of} from the clean one",
        "mse": "Mean squared error of the drawn image against the clean one (mse)",
        "psnr": "Peak signal-to-noise ratio of the drawn image against the clean one (psnr)",
        "ssim": "Structural similarity of the drawn image to the clean one (ssim)",
    }


def _definition(edited: str, name: str) -> str:
    if name == "distance" and edited == "generations":
        return DISTANCE
    if name == "distance":
        return f"Mean squared difference of the two predictions, in units of the loss. {MEAN}"
    units = {"psnr": "In dB. ", "mse": "Pixel values from 0 to 1. ", "ssim": "1 is the same image. "}
    return units.get(name, "") + MEAN
