"""The attention calls of a site: each one's number in the forward, its samples, and what its tokens are."""

from typing import NamedTuple

from torch import Tensor

from headscope.models.hooks.forwards import Forward
from headscope.models.structure.layout import IMAGE, Geometry, Given, Layout, Place, layout_of, place_of
from headscope.models.structure.sites import Site


class SiteCall(NamedTuple):
    """One attention call of a site.

    Attributes:
        number: of the call within the site and forward.
    """

    site: Site
    number: int
    forward: Forward
    layout: Layout

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the picture, or of each frame, in the call's image queries; None where it isn't known.

        One read per forward where the model has places as tensors.
        """
        image = next((segment for segment in self.layout.queries if segment.group == IMAGE), None)
        if image is None:
            return None
        return self.layout.grid or self.forward.geometry.grid(image.stop - image.start)


class SiteCalls:
    """Counts a site's calls; their layouts are worked out once while forwards have the same geometry.

    Small models make a hundred calls in the time that one matrix product of a large one takes.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._geometry: Geometry | None = None
        # of calls that were checked, by what they look like
        self._places: dict[tuple, Place] = {}
        self._layouts: dict[tuple, Layout] = {}

    def next(self, query: Tensor, key: Tensor, forward: Forward, given: Given) -> SiteCall:
        """The call that begins.

        Raises:
            ValueError: a call that doesn't fit what is known of the site and the forward.
        """
        if forward.geometry is not self._geometry:
            self._geometry = forward.geometry
            self._places.clear()
            self._layouts.clear()
        looks = (query.shape, key.shape[2], given)
        place = self._places.get(looks)
        if place is None:
            place = self._places[looks] = self._place(query, forward, given)
        number, first_sample = forward.count(self._site.name, place, given.attended)
        layout = self._layouts.get((looks, first_sample))
        if layout is None:
            rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
            layout = layout_of(self._site, forward.geometry, rows, queries, keys, given, place, first_sample)
            self._layouts[looks, first_sample] = layout
        return SiteCall(self._site, number, forward, layout)

    def _place(self, query: Tensor, forward: Forward, given: Given) -> Place:
        name, rows, batch = self._site.name, query.shape[0], forward.batch
        if query.ndim != 4:
            raise ValueError(f"site {name!r} calls attention with {query.ndim} dimensions, expected 4")
        if query.shape[1] != self._site.heads:
            raise ValueError(f"site {name!r} calls attention with {query.shape[1]} heads, expected {self._site.heads}")
        if forward.geometry.packed and rows != 1:
            raise ValueError(
                f"site {name!r} calls attention on {rows} rows, expected 1: the model's first tensor has no"
                " dimension of samples, so its samples can't be told apart"
            )
        place = place_of(batch, given, rows, query.shape[2])
        fold = 0 if place is None else place.rows // place.samples
        if place is None or rows % fold or place.first % fold or place.first + rows > place.rows:
            raise ValueError(
                f"site {name!r} calls attention on {rows} rows, expected a multiple or a part of the batch of {batch}"
            )
        return place
