"""What a sweep is asked to do."""

from dataclasses import asdict, dataclass
from pathlib import Path

from headscope.zoo import GROUPS

FILLS = ("mean", "zero", "uniform")
SCORES = ("loss", "generate")
SPLITS = ("discover", "confirm")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SweepConfig:
    """Everything that decides a sweep's numbers. A run directory belongs to one configuration.

    Attributes:
        model: "builtin", or a directory with a diffusers pipeline (model_index.json).
        groups: names of zoo groups, or NAME=DIR for a folder of images.
        prompts: a text file with a prompt per line; they form the group "prompts", whose images are the model's own.
        splits: which splits of each group; "discover" is for selecting, "confirm" for testing.
        items: how many items of each group and split.
        timesteps: of the model's scheduler; None takes `bands` of them, evenly spaced in log-SNR.
        bands: how many timesteps when none are given.
        observe: record each head's entropy at every item and timestep.
        fills: what takes an ablated head's place: "mean" (its mean output over reference items of the same group),
            "zero", "uniform"; none for no ablation.
        scores: "loss" (the paired denoising loss) and/or "generate" (distance of the edited image to the clean one).
        heads: (site, head) pairs to ablate; None for all.
        reference_items: how many items, disjoint from the swept ones, the mean fill is taken over.
        generate_steps: sampling steps of "generate"; edits act in all of them.
        seed: the noise replicate.
        device: where the model runs.
        dtype: the denoiser's dtype.
    """

    model: str = "builtin"
    groups: tuple[str, ...] = ()
    prompts: str | None = None
    splits: tuple[str, ...] = SPLITS
    items: int = 20
    timesteps: tuple[int, ...] | None = None
    bands: int = 3
    observe: bool = True
    fills: tuple[str, ...] = ("mean", "zero")
    scores: tuple[str, ...] = ("loss",)
    heads: tuple[tuple[str, int], ...] | None = None
    reference_items: int = 16
    generate_steps: int = 10
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, what came and what was expected."""
        if not self.groups and self.prompts is None:
            raise ValueError("groups: got none and no prompts, expected zoo groups, NAME=DIR or a prompts file")
        for group in self.groups:
            if "=" not in group and group not in GROUPS:
                raise ValueError(f"groups: got {group!r}, expected NAME=DIR or one of {', '.join(GROUPS)}")
        _subset("fills", self.fills, FILLS, empty=True)
        _subset("scores", self.scores, SCORES, empty=True)
        _subset("splits", self.splits, SPLITS)
        _subset("dtype", (self.dtype,), DTYPES)
        for name in ("items", "reference_items", "generate_steps", "bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.heads is not None and (not self.heads or len(set(self.heads)) != len(self.heads)):
            raise ValueError(f"heads: got {list(self.heads)}, expected (site, head) pairs, each once, or None for all")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")
        if not self.observe and not (self.fills and self.scores):
            raise ValueError(
                "fills: got nothing to observe and nothing to ablate, expected observe, or fills and scores"
            )
        if self.timesteps is not None and len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError(f"timesteps: got {list(self.timesteps)}, expected each once")
        if self.timesteps == ():
            raise ValueError("timesteps: got an empty list, expected at least one or None")
        if self.model != "builtin" and not (Path(self.model) / "model_index.json").is_file():
            raise ValueError(
                f'model: got {self.model!r}, expected "builtin" or a directory with a diffusers pipeline'
                " (model_index.json)"
            )

    def as_dict(self) -> dict:
        return asdict(self)


def _subset(name: str, values: tuple[str, ...], allowed: tuple[str, ...], *, empty: bool = False) -> None:
    unknown = [value for value in values if value not in allowed]
    if unknown or not (values or empty) or len(set(values)) != len(values):
        raise ValueError(f"{name}: got {', '.join(values) or 'none'}, expected some of {', '.join(allowed)}, each once")
