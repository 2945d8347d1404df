"""The heads that a sweep edits, each in turn and in sets: what a configuration asks for, found in the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from headscope.models import Site
from headscope.sweep.plan.config import SweepConfig
from headscope.sweep.plan.sets import HeadSet


@dataclass(frozen=True)
class Edit:
    """Heads that are edited together.

    Attributes:
        name: of the set; of a single head, its site.
        heads: (site, head) pairs.
        keep: the gate of these heads.
        temperature, key_bias, key_scale: what else is done to them, as in `HeadSet`.
    """

    name: str
    heads: tuple[tuple[str, int], ...]
    keep: float = 0.0
    temperature: float | None = None
    key_bias: tuple[float, ...] = ()
    key_scale: tuple[float, ...] = ()

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(site for site, _ in self.heads)

    def differing(self, fills: Sequence[str]) -> Sequence[str]:
        """The fills that give different numbers: the first alone where no head is removed."""
        return fills[:1] if self.keep == 1.0 else fills


def chosen_heads(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[tuple[str, int], ...]:
    """The single heads to ablate or attribute to, in the order of the model's sites."""
    if not config.fills or not (config.scores or config.attribute) or config.heads == ():
        return ()
    every = _matching(sites, config.sites or ("*",), "sites")
    if config.heads is None:
        return every
    _known(config.heads, sites, "heads")
    for pair in config.heads:
        if pair not in every:
            raise ValueError(f"heads: got {pair}, whose site isn't among the sites {', '.join(config.sites)}")
    return tuple(pair for pair in every if pair in set(config.heads))


def attributed_sites(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[str, ...]:
    """The sites all of whose heads are attributed to: those of the heads to ablate, or, without any, all that match."""
    heads = chosen_heads(config, sites) or _matching(sites, config.sites or ("*",), "sites")
    chosen = {name for name, _ in heads}
    return tuple(site.name for site in sites if site.name in chosen)


def chosen_sets(config: SweepConfig, sites: tuple[Site, ...]) -> tuple[Edit, ...]:
    if not config.fills or not config.scores:
        return ()
    found = []
    for chosen in config.sets:
        heads = heads_of(chosen, sites, "sets")
        found.append(Edit(chosen.name, heads, chosen.gate, chosen.temperature, chosen.key_bias, chosen.key_scale))
    return tuple(found)


def heads_of(chosen: HeadSet, sites: tuple[Site, ...], field: str) -> tuple[tuple[str, int], ...]:
    """The heads of a set. Raises ValueError for one that the model doesn't have; `field` is the configuration's."""
    _known(chosen.heads, sites, f"{field}: {chosen.name!r}: heads")
    matching = _matching(sites, chosen.sites, f"{field}: {chosen.name!r}: sites") if chosen.sites else ()
    return tuple(dict.fromkeys((*matching, *chosen.heads)))


def check_identity_fill(config: SweepConfig, single: set[str], sets: tuple[Edit, ...], sites: tuple[Site, ...]) -> None:
    """Raises ValueError where a head would be filled with its own value and has none for each query.

    Args:
        single: the sites whose heads are ablated, each in turn, or attributed to.
    """
    if "identity" not in config.fills:
        return
    edited = single.union(*(chosen.sites for chosen in sets))
    for site in sites:
        if site.kind == "cross" and site.name in edited:
            raise ValueError(
                f"fills: got identity for {site.name!r}, whose keys come from elsewhere; expected sites of"
                " self-attention alone"
            )


def _matching(sites: tuple[Site, ...], patterns: Iterable[str], field: str) -> tuple[tuple[str, int], ...]:
    """All heads of the sites that match one of the patterns."""
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ValueError(f"{field}: got {pattern!r}, expected a pattern of {_described(sites)}")
    matching = [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]
    return tuple((site.name, head) for site in matching for head in range(site.heads))


def _known(heads: Iterable[tuple[str, int]], sites: tuple[Site, ...], field: str) -> None:
    every = set(_matching(sites, ("*",), field))
    for site, head in heads:
        if (site, head) not in every:
            raise ValueError(f"{field}: got ({site!r}, {head}), expected heads of {_described(sites)}")


def _described(sites: tuple[Site, ...]) -> str:
    return ", ".join(f"{site.name} ({site.heads} heads)" for site in sites)
