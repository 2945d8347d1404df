"""The configuration of a sweep, from Python or a TOML file."""

import re
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from headscope._fields import from_table, settle
from headscope._files import local_path, read_plain
from headscope.counter import LARGEST_SEED, check_seed
from headscope.features import BUILT_IN, ON_FEATURE, PART
from headscope.sweep.plan.sets import HeadSet
from headscope.zoo import BUNDLED, DEFAULT_MODEL, GROUPS
from headscope.zoo import SPLITS as EVERY_SPLIT

# of a fill that is the mean over a part of the reference items
_FOLD = re.compile(r"mean ([1-9]\d*)/([1-9]\d*)", re.ASCII)
RESAMPLE = "resample"
FILLS = ("mean", "zero", "uniform", "identity", RESAMPLE)
# those of the teacher-forced forward, then those of whole generations
FORWARD_SCORES = ("loss", "distance", "x0")
SCORES = (*FORWARD_SCORES, "generate")
# before a feature's name, the score of its pixels alone
ON = "on "
IMAGE_SCORES = ("mse", "psnr", "ssim")
# columns that a score of the user's can't be called
COLUMNS = (
    *("item", "group", "source_id", "split", "replicate", "timestep", "site", "head", "edit", "fill"),
    *("clean", "edited", "distance", "x0_clean", "x0_edited", "steps", "first_step", "end_step", *IMAGE_SCORES),
)
# those that hold out what models were trained on
SPLITS = ("discover", "confirm")
# fields that came after the first runs, and what they are where they aren't asked for: plans and runs without them are
# what they were before
_LATER = {
    "draws": 1,
    "reference_folds": 0,
    "kinds": (),
    "features": (),
    "faithfulness": 0.9,
    "circuit_metric": "loss",
    "paths": (),
}
# kinds of unit that fields here are of
CIRCUITS, PATHS = "circuits", "paths"
CIRCUIT_METRICS = ("loss", "prediction")
# the model of a run that was given a pipeline instead of a directory
IN_MEMORY = "in memory"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SweepConfig:
    """Everything that decides a sweep's numbers. A run directory belongs to one configuration.

    Attributes:
        model: a bundled model's name ("pixeldit", "unet", "untrained:unet", "planted:roles", ...), or a directory with
            a diffusers pipeline (model_index.json); "in memory" where headscope.sweep was given a pipeline.
        groups: names of zoo groups, or NAME=PATH for a folder of images, a Hugging Face dataset on disk, or WebDataset
            tars (a file or a pattern with * or {000..009}).
        prompts: a UTF-8 text file with a prompt per line; they form the group "prompts", whose images are the model's
            own.
        splits: which splits of each group; "discover" is for selecting, "confirm" for testing, "train" for comparing
            items that a bundled model was taught with held-out ones.
        items: how many items of each group and split, all of which must be there; None takes 20, or what there is.
        timesteps: of the model's scheduler; None takes `bands` of them, evenly spaced in log-SNR.
        bands: how many timesteps when none are given.
        observe: record each head's entropy at every item and timestep.
        fills: what takes an ablated head's place: "mean" (its mean output over reference items of the same group),
            "zero", "uniform" (attention without its queries and keys), "identity" (its own value, self-attention only),
            "resample" (its output on one reference item, with that one's own noise, another for every item and draw;
            not of whole generations); none for no ablation.
        scores: "loss" (the paired denoising loss), "distance" (of the edited prediction to the clean one), "x0" (error
            of the clean image that a prediction implies), "on FEATURE" (the loss over the pixels of a feature of
            `headscope.features`, of a part, as in "on part nose", or of your own in `features`; the top quarter of maps
            that are no masks), "generate" (distance of the edited image to the clean one);
            or "module:function" for a score of your own of the teacher-forced forward. It takes the edited and the
            clean prediction, the target (tensors [rows, ...] on the device) and the inputs (`headscope.models.tasks`'s
            NoisyInputs: sample, timestep, conditioning, target, and items, each row's item with its key, caption, image
            and, in groups that have them, part_names, part_mask and counterparts), and returns a number for each row,
            which become a column of the function's name.
        heads: (site, head) pairs to ablate, each in turn; None for all. Attributions are of all heads of their sites.
        sites: patterns of site names (* and ?) to which the heads to ablate or attribute to are limited.
        sets: heads that are edited together, a row each beside the single heads'.
        reference_items: how many items, disjoint from the swept ones, the mean fill is taken over and resampled outputs
            are drawn from. None takes all training items of groups that have some, up to 2,000, and of other groups up
            to 200 of those beside the swept ones; where all are swept by default, a quarter of those instead.
        reference_folds: deal the reference items, source by source, into so many parts of equal size, and ablate with
            each part's mean, too: "mean 1/4" to "mean 4/4" among the fills of a table, on the first draw's noisy
            inputs, from which the mean fill's own error follows (`fold_of` knows the names). 0 for none; whole
            generations and attributions have none.
        generate_steps: sampling steps of "generate".
        generate_window: first step and the one after the last in which edits act; None for all steps.
        image_scores: of "generate" beside the distance: "mse", "psnr", "ssim" of the edited image against the clean
            one, or "module:function", which takes two uint8 arrays [images, height, width, 3], clean and edited,
            and returns a number for each image.
        attribute: every head's importance g and c at every item and timestep, from a few backwards, for each fill.
        cotangents: random vectors that c is estimated from.
        seed: the noise replicate, 0 to 2**31 - 1; of several draws the first.
        draws: every item is computed with the noise replicates seed, seed + 1, ..., seed + draws - 1, which the column
            `replicate` tells apart. Images drawn for prompts and the mean fill's reference are of the first alone.
        device: where the model runs.
        dtype: the denoiser's dtype.
        autocast: "bfloat16" or "float16": the denoiser's forwards run under torch.autocast, its weights stay float32.
        channels_last: how images lie in memory; None chooses by the model.
        compile: run the denoiser through torch.compile. A compiled forward runs whole, so edited ones take nothing over
            from clean ones; and each edited site is compiled anew, up to torch's limit of recompilations, past which
            it runs uncompiled.
        graphs: replay teacher-forced forwards from CUDA graphs, which spares small models the launching of kernels one
            by one. Each kind of forward (clean, and one for every edited site and number of rows) is captured once.
        kinds: further kinds of unit, and so tables: those that run only where they are named (`UnitKind.optional`), as
            "regions", which says where queries of each part of the image attend to; "circuits", which searches each
            group's discover items for a small set of heads that is enough; "paths", the edges between heads.
        faithfulness: of the kind "circuits", how much of what all heads do the heads of a circuit have to do: above 0,
            below 1.
        circuit_metric: of the kind "circuits", what is to be kept: the "loss", or the whole model's "prediction", which
            a set that keeps the loss by opposite errors doesn't.
        paths: of the kind "paths", the heads between which edges are measured: for each group a set of its name with at
            most 30 heads.
        features: features of your own beside those of `headscope.features`, for the kind "features" and for scores "on
            NAME": "module:function", which takes an item (with key, caption, image and, in groups that have them,
            part_names, part_mask and counterparts) and returns a number for each of its pixels, [height, width], or for
            each whether it belongs to the feature. The feature is called as the function is.
    """

    model: str = DEFAULT_MODEL
    groups: tuple[str, ...] = ()
    prompts: str | None = None
    splits: tuple[str, ...] = SPLITS
    items: int | None = None
    timesteps: tuple[int, ...] | None = None
    bands: int = 3
    observe: bool = True
    fills: tuple[str, ...] = ("mean", "zero")
    scores: tuple[str, ...] = ("loss",)
    heads: tuple[tuple[str, int], ...] | None = None
    sites: tuple[str, ...] = ()
    sets: tuple[HeadSet, ...] = ()
    reference_items: int | None = None
    reference_folds: int = 0
    generate_steps: int = 10
    generate_window: tuple[int, int] | None = None
    image_scores: tuple[str, ...] = ()
    attribute: bool = False
    cotangents: int = 4
    seed: int = 0
    draws: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    autocast: str | None = None
    channels_last: bool | None = None
    compile: bool = False
    graphs: bool = False
    kinds: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    faithfulness: float = 0.9
    circuit_metric: str = "loss"
    paths: tuple[HeadSet, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, what came and what was expected."""
        settle(self)
        if not self.groups and self.prompts is None:
            raise ValueError("groups: got none and no prompts, expected zoo groups, NAME=DIR or a prompts file")
        for group in self.groups:
            name, equals, path = group.partition("=")
            if equals and not (name and path):
                raise ValueError(f"groups: got {group!r}, expected a name and a path, NAME=PATH")
            if equals and "/" in name:
                raise ValueError(f"groups: got {group!r}, expected a name without /, which files are named by")
            if equals and name in GROUPS:
                raise ValueError(f"groups: got {group!r}, expected another name than the zoo's own")
            if equals:
                local_path("groups", path)
            elif group not in GROUPS:
                raise ValueError(f"groups: got {group!r}, expected NAME=DIR or one of {', '.join(GROUPS)}")
        _subset("fills", self.fills, FILLS, empty=True)
        plain = tuple(name for name in self.scores if ":" not in name and not name.startswith(ON))
        _subset("scores", plain, SCORES, empty=True)
        _own("scores", self.scores)
        _own("image_scores", self.image_scores)
        self._check_features()
        _subset("splits", self.splits, EVERY_SPLIT)
        _subset("dtype", (self.dtype,), DTYPES)
        for name in ("items", "reference_items", "generate_steps", "bands", "cotangents", "draws"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.heads is not None and ((not self.heads and not self.sets) or len(set(self.heads)) != len(self.heads)):
            raise ValueError(f"heads: got {list(self.heads)}, expected (site, head) pairs, each once, or None for all")
        check_seed(self.seed)
        if self.seed + self.draws - 1 > LARGEST_SEED:
            raise ValueError(
                f"draws: got {self.draws} from the seed {self.seed} on, expected at most"
                f" {LARGEST_SEED - self.seed + 1}: seeds end at {LARGEST_SEED}"
            )
        if self.attribute and not self.fills:
            raise ValueError("fills: got none to attribute to, expected some")
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds: got {', '.join(self.kinds)}, expected each once")
        if not self.observe and not self.kinds and not (self.fills and (self.scores or self.attribute)):
            raise ValueError(
                "fills: got nothing to observe and nothing to ablate, expected observe, or fills and scores"
            )
        self._check_used()
        if self.timesteps is not None and len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError(f"timesteps: got {list(self.timesteps)}, expected each once")
        if self.timesteps == ():
            raise ValueError("timesteps: got an empty list, expected at least one or None")
        if self.prompts is not None:
            local_path("prompts", self.prompts)
        if (
            self.model not in (*BUNDLED, IN_MEMORY)
            and not (local_path("model", self.model) / "model_index.json").is_file()
        ):
            raise ValueError(
                f"model: got {self.model!r}, expected {', '.join(BUNDLED)} or a directory with a diffusers pipeline"
                " (model_index.json)"
            )

        self._check_generation()
        self._check_execution()
        self._check_circuits()
        if self.sets and not (self.fills and self.scores):
            raise ValueError("sets: got some without fills or without scores, expected both")
        names = [chosen.name for chosen in self.sets]
        if len(set(names)) != len(names):
            raise ValueError(f"sets: got the names {', '.join(names)}, expected each once")

    def _check_used(self) -> None:
        """Raises ValueError where something is asked for that nothing of the sweep would look at."""
        edits = bool(self.fills and (self.scores or self.attribute))
        # of an empty list of heads none is ablated, and sites limit the attributions alone
        of_sites = (edits and (self.heads != () or self.attribute)) or CIRCUITS in self.kinds
        limited = {"heads": edits, "sites": of_sites}
        for name, used in limited.items():
            if getattr(self, name) and not used:
                raise ValueError(
                    f"{name}: got some without anything done to them, expected fills and either scores or attribute"
                )
        filled = edits or CIRCUITS in self.kinds or PATHS in self.kinds
        if self.reference_items is not None and not (filled and self.referenced):
            raise ValueError(
                f"reference_items: got {self.reference_items} without the fills mean and resample, which"
                " are made of them"
            )
        if self.reference_folds and self.reference_folds < 2:
            raise ValueError(f"reference_folds: got {self.reference_folds}, expected at least 2, or 0 for none")
        if self.reference_folds and not ("mean" in self.fills and any(score != "generate" for score in self.scores)):
            raise ValueError(
                f"reference_folds: got {self.reference_folds}, expected the fill mean, whose error they are for, and a"
                " score of single forwards"
            )
        if RESAMPLE in self.fills and "generate" in self.scores:
            raise ValueError(
                "fills: got resample with the score generate, expected another fill, or scores of single forwards: what"
                " takes a head's place would be of another sampling run"
            )
        drawn = "generate" in self.scores or self.prompts is not None
        for name, used, lacking in (
            ("bands", self.timesteps is None, "beside timesteps, which they would be chosen by"),
            (
                "cotangents",
                self.attribute or CIRCUITS in self.kinds,
                "without attribute, whose c is estimated from them",
            ),
            ("generate_steps", drawn, "without the score generate and without prompts, whose images are drawn in them"),
        ):
            if not used and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}: got {getattr(self, name)} {lacking}")

    def _check_features(self) -> None:
        """Raises ValueError for features of the user's own that can't be named, or that nothing looks at."""
        _own("features", self.features)
        own = tuple(name.rpartition(":")[2] for name in self.features)
        for name, full in zip(own, self.features, strict=True):
            if ":" not in full or name in BUILT_IN:
                raise ValueError(
                    f"features: got {full!r}, expected module:function, of another name than {', '.join(BUILT_IN)}"
                )
        scored = self.scored_features
        for name in scored:
            if name not in (*BUILT_IN, *own) and not (name.startswith(PART) and name != PART):
                expected = ", ".join((*BUILT_IN, *own))
                raise ValueError(f"scores: got '{ON}{name}', expected {ON}and one of {expected}, or {PART}NAME")
        # two names of one column, too
        if len({name.replace(" ", "_") for name in scored}) != len(scored):
            raise ValueError(f"scores: got {ON}{', '.join(scored)}, expected features whose columns differ")
        unused = [name for name in own if "features" not in self.kinds and name not in scored]
        if unused:
            raise ValueError(
                f"features: got {unused[0]!r}, expected the kind 'features', whose table it is in, or the score"
                f" '{ON}{unused[0]}'"
            )

    def _check_generation(self) -> None:
        for name in self.image_scores:
            if name not in IMAGE_SCORES and ":" not in name:
                raise ValueError(
                    f"image_scores: got {name!r}, expected module:function or one of {', '.join(IMAGE_SCORES)}"
                )
        if self.image_scores and "generate" not in self.scores:
            raise ValueError("image_scores: got some without the score generate, whose images they are of")
        if self.generate_window is not None:
            first, end = self.generate_window
            if not 0 <= first < end <= self.generate_steps:
                raise ValueError(
                    f"generate_window: got {first}, {end}, expected 0 <= first < end <= {self.generate_steps} steps"
                )
            if "generate" not in self.scores:
                raise ValueError("generate_window: got one without the score generate, whose steps it is of")

    def _check_circuits(self) -> None:
        """Raises ValueError for circuits or paths that can't be, or settings of theirs that nothing would look at."""
        if not 0.0 < self.faithfulness < 1.0:
            raise ValueError(f"faithfulness: got {self.faithfulness}, expected a number above 0 and below 1")
        _subset("circuit_metric", (self.circuit_metric,), CIRCUIT_METRICS)
        for name, kind in (("faithfulness", CIRCUITS), ("circuit_metric", CIRCUITS), ("paths", PATHS)):
            if getattr(self, name) != _LATER[name] and kind not in self.kinds:
                raise ValueError(f"{name}: got {getattr(self, name)!r} without the kind {kind}, which it is of")
        for kind in (CIRCUITS, PATHS):
            if kind in self.kinds and not self.fills:
                raise ValueError(f"fills: got none with the kind {kind}, expected what takes the place of heads")
        if CIRCUITS in self.kinds and "discover" not in self.splits:
            raise ValueError(
                f"splits: got {', '.join(self.splits)} with the kind {CIRCUITS}, expected discover among them, on which"
                " circuits are chosen"
            )
        if CIRCUITS in self.kinds and self.compile:
            raise ValueError(f"compile: got true with the kind {CIRCUITS}, whose gradients compiled models don't give")
        if PATHS in self.kinds and not self.paths:
            raise ValueError(f"paths: got none with the kind {PATHS}, expected the heads between which edges are")
        names = [chosen.name for chosen in self.paths]
        known = {group.partition("=")[0] for group in self.groups} | ({"prompts"} if self.prompts else set())
        for name in names:
            if name not in known:
                raise ValueError(f"paths: got a set {name!r}, expected the names of groups: {', '.join(sorted(known))}")
        if len(set(names)) != len(names):
            raise ValueError(f"paths: got sets of {', '.join(names)}, expected one for each group")
        for chosen in self.paths:
            if chosen.gate != 0.0 or chosen.temperature is not None or chosen.key_bias or chosen.key_scale:
                raise ValueError(f"paths: {chosen.name!r}: got an edit of its heads, expected sites and heads alone")

    def _check_execution(self) -> None:
        if self.autocast is not None:
            _subset("autocast", (self.autocast,), ("bfloat16", "float16"))
            if self.dtype != "float32":
                raise ValueError(f"autocast: got {self.autocast} with the dtype {self.dtype}, expected float32 weights")
        if self.graphs and not self.device.startswith("cuda"):
            raise ValueError(f"graphs: got true with device {self.device!r}, expected a cuda device")
        if self.graphs and self.compile:
            raise ValueError("graphs: got true with compile, expected one of them")
        if self.compile and self.attribute:
            raise ValueError("compile: got true with attribute, whose gradients compiled models don't give")
        if self.compile and self.generate_window is not None and self.generate_window[0] > 0:
            raise ValueError(
                "compile: got true with a generate_window that begins later than step 0, whose earlier steps are taken"
                " over from the clean run, which compiled models can't"
            )

    def absolute(self) -> "SweepConfig":
        """The same with paths that other working directories understand."""
        groups = []
        for text in self.groups:
            name, equals, path = text.partition("=")
            groups.append(f"{name}={Path(path).absolute()}" if equals else text)
        model = self.model if self.model in (*BUNDLED, IN_MEMORY) else str(Path(self.model).absolute())
        prompts = self.prompts and str(Path(self.prompts).absolute())
        return replace(self, model=model, groups=tuple(groups), prompts=prompts)

    def as_dict(self) -> dict:
        """Every field but those of `_LATER` that aren't asked for."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value != _LATER[name]}

    @property
    def referenced(self) -> bool:
        """True if a fill is made of reference items."""
        return "mean" in self.fills or RESAMPLE in self.fills

    @property
    def scored_features(self) -> tuple[str, ...]:
        """The features over whose pixels alone the loss is taken, too."""
        return tuple(score.removeprefix(ON) for score in self.scores if score.startswith(ON))

    @property
    def fold_fills(self) -> tuple[str, ...]:
        """The fills that are means over a part of the reference items."""
        return tuple(f"mean {fold}/{self.reference_folds}" for fold in range(1, self.reference_folds + 1))

    @property
    def replicates(self) -> range:
        """The noise replicates of the draws."""
        return range(self.seed, self.seed + self.draws)

    @classmethod
    def from_dict(cls, values: Any) -> "SweepConfig":
        """A configuration from JSON or TOML types.

        Raises:
            ValueError: an unknown name, or a value that can't be; says which.
        """
        return from_table(cls, values)

    @classmethod
    def from_toml(cls, path: str | Path) -> "SweepConfig":
        """A configuration from a file whose keys are this class's attributes; `sets` are tables, as in

            groups = ["faces", "mine=photographs/"]
            scores = ["loss", "distance"]
            timesteps = [100, 500]
            [[sets]]
            name = "middle"
            sites = ["mid_block.*"]

        Paths in it are relative to the working directory.

        Raises:
            ValueError: not TOML, an unknown key, or a value that can't be; says where.
        """
        try:
            values = tomllib.loads(read_plain(local_path("plan", path)).decode("utf-8-sig"))
        except OSError as error:
            raise ValueError(f"plan: got {str(path)!r}, expected a TOML file ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"plan: {str(path)!r} isn't TOML ({error})") from None
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, values: Any) -> "SweepConfig":
        """A configuration that `as_dict` gave, after JSON; as in a manifest.

        Raises:
            ValueError: a value that can't be, or a field that this version doesn't know or that it lacks.
        """
        known = {field.name for field in fields(cls)}
        found = set(values) | set(_LATER) if isinstance(values, dict) else set()
        if found != known:
            different = sorted(known ^ found) if found else [type(values).__name__]
            raise ValueError(
                "run: its manifest holds no configuration of this version's sweeps, which differs in "
                + ", ".join(different)
            )
        return cls.from_dict(values)


def fold_of(fill: str) -> tuple[int, int] | None:
    """Of a fill that is the mean over a part of the reference items the part, from 1, and how many there are; None of
    every other: (1, 4) of "mean 1/4", None of "mean"."""
    found = _FOLD.fullmatch(fill)
    if found is None:
        return None
    fold, count = int(found[1]), int(found[2])
    return (fold, count) if fold <= count and count > 1 else None


def _own(field: str, names: tuple[str, ...]) -> None:
    """Check the scores of the user's, each of which becomes a column."""
    columns = [name.rpartition(":")[2] for name in names if ":" in name]
    for name, column in zip((name for name in names if ":" in name), columns, strict=True):
        if name.count(":") != 1 or not all(part.isidentifier() for part in name.replace(":", ".").split(".")):
            raise ValueError(f"{field}: got {name!r}, expected module:function")
        # those that begin so are the statistics'
        if column.startswith(("_", *ON_FEATURE)) or column in COLUMNS or columns.count(column) > 1:
            raise ValueError(f"{field}: got {name!r}, expected a function whose name isn't taken by another column")


def _subset(name: str, values: tuple[str, ...], allowed: tuple[str, ...], *, empty: bool = False) -> None:
    unknown = [value for value in values if value not in allowed]
    if unknown or not (values or empty) or len(set(values)) != len(values):
        raise ValueError(f"{name}: got {', '.join(values) or 'none'}, expected some of {', '.join(allowed)}, each once")
