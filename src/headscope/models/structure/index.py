"""The attention sites of a denoiser by their names and patterns of those."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Integral

from torch import Tensor

from headscope.models.structure.sites import Site, Unseen


class SiteIndex:
    """Finds sites by name.

    Attributes:
        sites: what can be recorded and edited, in the order in which a forward runs them.
        unseen: attention modules that can't be, with the reason.
    """

    def __init__(self, sites: Iterable[Site], unseen: Iterable[Unseen]) -> None:
        self.sites = tuple(sites)
        self.unseen = tuple(unseen)
        self._by_name = {site.name: site for site in self.sites}

    def site(self, name: str) -> Site:
        """See `Scope.site`."""
        if name in self._by_name:
            return self._by_name[name]
        for entry in self.unseen:
            if entry.name == name:
                raise KeyError(f"site {name!r} can't be seen: {entry.reason}")
        raise KeyError(f"site: got {name!r}, expected one of {', '.join(self._by_name)}")

    def matching(self, pattern: str) -> list[str]:
        """See `Scope.matching`."""
        if not any(character in pattern for character in "*?["):
            return [self.site(pattern).name]
        for entry in self.unseen:
            if fnmatchcase(entry.name, pattern):
                raise KeyError(f"site {entry.name!r} (of {pattern!r}) can't be seen: {entry.reason}")
        names = [name for name in self._by_name if fnmatchcase(name, pattern)]
        if not names:
            raise KeyError(f"site: got {pattern!r}, expected a pattern of {', '.join(self._by_name)}")
        return names

    def chosen(self, patterns: Sequence[str] | str | None) -> list[str]:
        """The names of the sites that some names or patterns mean, in the order of `sites`; all if None.

        Raises:
            KeyError: an unknown site, or one that can't be seen.
            TypeError: patterns that are no strings.
            ValueError: no pattern; or None, and there are sites that can't be seen.
        """
        if patterns is None:
            if self.unseen:
                listed = "".join(f"\n  {entry.name}: {entry.reason}" for entry in self.unseen)
                raise ValueError(
                    f"sites: {len(self.unseen)} of the model's sites can't be seen; name those to record{listed}"
                )
            return list(self._by_name)
        listed = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
        if not all(isinstance(pattern, str) for pattern in listed):
            raise TypeError(f"sites: got {patterns!r}, expected names or patterns, or None for all")
        if not listed:
            raise ValueError("sites: got none, expected names or patterns, or None for all")
        wanted = {name for pattern in listed for name in self.matching(pattern)}
        return [name for name in self._by_name if name in wanted]


def check_heads(heads: Iterable[int], site: Site, name: str) -> None:
    """Raises TypeError or ValueError unless all are numbers of the site's heads; `name` is the argument's."""
    if isinstance(heads, Tensor) or not isinstance(heads, Iterable):
        raise TypeError(f"{name}: got {type(heads).__name__}, expected heads' numbers in a list")
    for head in heads:
        # a mask would be read as heads 0 and 1
        if isinstance(head, bool) or not isinstance(head, Integral):
            raise TypeError(f"{name}: got head {head!r} of type {type(head).__name__}, expected the heads' numbers")
        if not 0 <= head < site.heads:
            raise ValueError(f"{name}: got head {head}, expected 0 to {site.heads - 1}")
