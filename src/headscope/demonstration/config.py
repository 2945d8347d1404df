"""What a study is asked for: its settings, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from headscope._fields import settle
from headscope.counter import check_seed
from headscope.study.analysis import NATURAL, SYNTHETIC
from headscope.sweep.plan.config import SPLITS
from headscope.zoo import BUNDLED, DEFAULT_MODEL, GROUPS, MODELS, Tied, open_group

TIED = ("tiled", "untiled")
OBSERVED = ("faces", "faces_grey", "lfw", "photographs", *TIED)
# on which heads' roles are looked for, and further ones of a full study
ROLES = ("faces", "lfw", "twins", "distinct", *TIED)
MORE_ROLES = ("faces_grey", "mirrored", "unmirrored", "eyes", "odd_eyes")
# of an image group whose counterparts are looked for: a few have nothing that they could be told from
SPARE_ITEMS = 4
# the contrast's groups with equal histograms
MATCHED = {NATURAL: f"{NATURAL}_matched", SYNTHETIC: f"{SYNTHETIC}_matched"}
ALL = "all heads"
CURVE_COUNTS = (1, 2, 4, 8, 16, 32)
RANDOM_ORDERS = 4
# of the mean fill's reference images
REFERENCE_FOLDS = 4
DOSES = (0.25, 0.5, 0.75, 1.25, 1.5)
# what a setting is that isn't given: of a study, and of a full one
_DEFAULTS = {"draws": (2, 4), "reference_items": (60, None), "drawn_images": (0, 6)}


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study. The defaults take less than four minutes on two cores.

    Attributes:
        model: the bundled model's name.
        groups: the zoo groups whose entropies are observed, and the contrast's two besides; none given are the faces,
            photographs and one tied pair, as far as the model was trained on them.
        ablate_groups: the groups on which heads are ablated; none given are the contrast's, and of a model that was
            trained on them "tiled" and "untiled": textures whose far parts are tied, and their untied control.
        role_groups: the groups on which heads' roles are looked for; none given are drawn and photographed faces, and
            tied groups with their controls, as far as the model was trained on them.
        full: twice as many draws, the mean fill of all training items, every fill, curves, doses and drawn images, too.
        items: items of each group and split, observed.
        discover_items: items of each group on which every head is ablated, to select some.
        confirm_items: items of each group on which the selected heads are tested.
        draws: noise draws of each item; None takes 2, of a full study 4. Where every head is removed, and circuits are
            looked for, a study that isn't full takes one.
        heads_per_group: how many heads each group selects.
        observe_bands, ablate_bands: how many log-SNR bands, one timestep each.
        reference_items: of the mean fill; None takes 60, of a full study all training items.
        drawn_images: how many images are drawn with and without some sets of heads, 0 for none; None takes none, of a
            full study 6.
        seed: the first noise replicate, and the resampling's seed.
        device, dtype: where and in what the model runs.
    """

    model: str = DEFAULT_MODEL
    groups: tuple[str, ...] = ()
    ablate_groups: tuple[str, ...] = ()
    role_groups: tuple[str, ...] = ()
    full: bool = False
    items: int = 20
    discover_items: int = 20
    confirm_items: int = 20
    draws: int | None = None
    heads_per_group: int = 3
    observe_bands: int = 5
    ablate_bands: int = 3
    reference_items: int | None = None
    drawn_images: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        settle(self)
        if self.model not in BUNDLED:
            raise ValueError(f"model: got {self.model!r}, expected one of {', '.join(BUNDLED)}")
        # planted models weren't taught any
        taught = MODELS[self.model].groups if self.model in MODELS else tuple(GROUPS)
        # frozen for everybody else
        for name, defaults in _DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults[self.full])
        if not self.groups:
            object.__setattr__(self, "groups", tuple(name for name in OBSERVED if name in taught))
        if not self.ablate_groups:
            object.__setattr__(self, "ablate_groups", (*self.contrast, *(name for name in TIED if name in taught)))
        if not self.role_groups:
            wanted = (*ROLES, *MORE_ROLES) if self.full else ROLES
            object.__setattr__(self, "role_groups", tuple(name for name in wanted if name in taught))
        for name in (
            *("items", "discover_items", "confirm_items", "draws", "heads_per_group", "observe_bands", "ablate_bands"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.reference_items is not None and self.reference_items < REFERENCE_FOLDS:
            raise ValueError(
                f"reference_items: got {self.reference_items}, expected at least {REFERENCE_FOLDS}, of the parts whose"
                " means give the fill's own error"
            )
        if (self.drawn_images or 0) < 0:
            raise ValueError(f"drawn_images: got {self.drawn_images}, expected at least 0")
        check_seed(self.seed)
        for field in ("groups", "ablate_groups", "role_groups"):
            if len(set(getattr(self, field))) != len(getattr(self, field)):
                raise ValueError(f"{field}: got {', '.join(getattr(self, field))}, expected each once")
            unknown = [name for name in getattr(self, field) if name not in GROUPS]
            if unknown:
                raise ValueError(f"{field}: got {', '.join(unknown)}, expected some of {', '.join(GROUPS)}")
        # the later stages', too, before the first begins
        asked = [
            ("items", (*self.groups, *self.contrast, *self.role_groups)),
            ("discover_items", self.ablate_groups),
            ("confirm_items", (*self.ablate_groups, *self.role_groups)),
        ]
        for name, groups in asked:
            least = min(len(open_group(group).indices(split)) for group in groups for split in SPLITS)
            if getattr(self, name) > least:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} of each split, expected at most the groups' {least}"
                )
        for field in ("ablate_groups", "role_groups"):
            for name in getattr(self, field):
                count = len(open_group(name).sources("train"))
                if count < REFERENCE_FOLDS:
                    raise ValueError(
                        f"{field}: got {name}, whose training images are of {count} sources; expected groups of at"
                        f" least {REFERENCE_FOLDS}"
                    )

    @property
    def contrast(self) -> tuple[str, str]:
        return SYNTHETIC, NATURAL

    @property
    def curve_groups(self) -> tuple[str, ...]:
        """The groups that are looked at most closely: the first of the contrast's and of the tied ones that is
        ablated."""
        found = [next((name for name in names if name in self.ablate_groups), None) for names in ((NATURAL,), TIED)]
        return tuple(name for name in found if name) or self.ablate_groups[:1]

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the sweeps, in the order they run."""
        untrained = ("untrained",) if f"untrained:{self.model}" in BUNDLED else ()
        roles = ("roles",) if set(self.role_groups) - set(self.tied_groups) else ()
        ties = ("ties",) if self.tied_groups else ()
        causal = (f"causal-{group}" for group in self.role_groups)
        circuits = ("circuits", *(f"circuit-{group}" for group in self.curve_groups))
        drawn = ("drawn",) if self.drawn_images else ()
        curves = tuple(f"curves-{group}" for group in self.curve_groups) if self.full else ()
        return ("observe", *untrained, "discover", "confirm", *curves, *drawn, *roles, *ties, *causal, *circuits)

    @property
    def fewer_draws(self) -> int:
        """The draws of the sweeps with the most edits."""
        return int(self.draws or 1) if self.full else 1

    @property
    def tied_groups(self) -> tuple[str, ...]:
        """Of the groups on which roles are looked for, the tied ones and their controls."""
        return tuple(name for name in self.role_groups if isinstance(open_group(name), Tied))
