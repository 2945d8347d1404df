"""One attention call of an observed site: edited, computed by headscope's operator, recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from headscope.models.editing.editing import ActiveEdit, Combined, combine
from headscope.models.hooks.forwards import Forward
from headscope.models.recording.maps import TokenRequest
from headscope.models.recording.recording import ENTROPY, HEAD_OUTPUT, Recording
from headscope.models.structure.layout import Geometry, Given, Layout, Place, layout_of, place_of
from headscope.models.structure.sites import Site
from headscope.ops import HeadEdit, Statistic, attention
from headscope.ops.edits import blend

if TYPE_CHECKING:
    from headscope.models.scope import Scope

# additive masks in diffusers forbid a key with -10000 or with the dtype's minimum
FORBIDDEN_LOGIT = -5000.0


class _Interest(NamedTuple):
    """What the active contexts want of a site.

    Attributes:
        contexts: which set of contexts this was told from: `Scope.contexts_seen`.
        requested: the statistics of all recordings, each once.
    """

    contexts: int
    recordings: tuple[Recording, ...]
    edits: tuple[ActiveEdit, ...]
    token_maps: tuple[TokenRequest, ...]
    requested: tuple[Statistic, ...]

    @classmethod
    def of(cls, scope: "Scope", name: str) -> "_Interest":
        recordings = tuple(entry.recording for entry in scope.recordings if name in entry.sites)
        return cls(
            scope.contexts_seen,
            recordings,
            tuple(edit for edit in scope.edits if name in edit.sites),
            tuple(entry for entry in scope.token_maps if name in entry.sites),
            _by_name([statistic for recording in recordings for statistic in recording.requested]),
        )

    @property
    def any(self) -> bool:
        return bool(self.recordings or self.edits or self.token_maps)


class SiteFrame:
    """A site's attention module while it runs.

    What is the same in every forward is worked out once: small models make a hundred calls in the time that
    one matrix product of a large one takes.
    """

    def __init__(self, scope: "Scope", site: Site) -> None:
        self._scope = scope
        self._site = site
        self._last_interest = _Interest.of(scope, site.name)
        # of calls that were checked, by what they look like, while forwards have this geometry
        self._geometry: Geometry | None = None
        self._places: dict[tuple, Place] = {}
        self._layouts: dict[tuple, Layout] = {}

    def _interest(self) -> _Interest:
        interest = self._last_interest
        if interest.contexts != self._scope.contexts_seen:
            interest = self._last_interest = _Interest.of(self._scope, self._site.name)
        return interest

    def wanted(self) -> bool:
        """Whether anything of the site is recorded or edited in the forward that runs.

        Raises:
            RuntimeError: none runs, and something of the site is to be recorded or edited.
        """
        interest = self._interest()
        if not interest.any:
            return False
        if not self._scope.in_forward:
            raise RuntimeError(
                f"site {self._site.name!r} ran outside of a forward of {type(self._scope.denoiser).__name__}, where a"
                " Scope can't record or edit it; call the model itself, not its forward method or a part of it (as"
                " vae.encode does), or name other sites (sites=...)"
            )
        forward = self._scope.running
        if forward is None:
            return False
        acting = (entry.acts_in(forward) for entry in (*interest.edits, *interest.token_maps))
        return bool(interest.recordings) or any(acting)

    def silent(self, replacement: str | None) -> None:
        """Raises RuntimeError where the module ran and its attention did not come by.

        Args:
            replacement: what stands in the place of torch's function since the context was entered.
        """
        if self._interest().any:
            cause = (
                "was its processor or diffusers' attention backend changed?"
                if replacement is None
                else f"{replacement} was put into its place"
            )
            raise RuntimeError(
                f"site {self._site.name!r} ran without torch's scaled_dot_product_attention, so nothing of it was"
                f" recorded or edited; {cause}"
            )

    def refuse(self, who: str) -> NoReturn:
        """Raises RuntimeError: the site is recorded or edited, and `who` decides what its attention gives."""
        raise RuntimeError(
            f"site {self._site.name!r} can't be recorded or edited, for {who} acts on its attention; name other sites"
            " (sites=...), or record the model without it"
        )

    def attend(
        self,
        given: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """What scaled_dot_product_attention returns, seen and edited; called where the site is `wanted`.

        Args:
            given: the fields of a `Given`: what the module was given.
        """
        forward, interest = self._scope.running, self._interest()
        assert forward is not None
        if self._holds_frames(query, attn_mask):
            rows = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (query, key, value))
            output = self.attend(given, *rows, None, dropout_p, is_causal, scale, enable_gqa)
            return output.unflatten(0, query.shape[:2]).squeeze(2)
        if query.ndim == 3 and self._site.heads == 1:
            # one head without a dimension of its own
            mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
            heads = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return self.attend(given, *heads, mask, dropout_p, is_causal, scale, enable_gqa).squeeze(1)
        name = self._site.name
        repeated = forward.totals is not None
        edits = [edit for edit in interest.edits if edit.acts_in(forward)]
        mapped = [entry for entry in interest.token_maps if entry.acts_in(forward)]
        if dropout_p:
            raise ValueError(f"site {name!r} uses attention dropout; put the model in eval mode to record or edit it")
        layout, call = self._layout(query, key, forward, Given(*map(int, given)))
        # a repetition takes the operator that ran the first time, so that it saves the same tensors
        recordings = () if repeated else interest.recordings
        for recording in recordings:
            recording.tensors.add_inputs(recording.quantities, forward, name, call, layout, query, key, value)
        combined = Combined(query, key, value, None, ())
        if edits:
            changes = [change for edit in edits for change in edit.changes(name, call, forward, layout, query)]
            combined = combine(changes, query, key, value)
        requested = () if repeated else interest.requested
        tokens = () if repeated else mapped
        masses = [entry.maps.statistic(forward, layout, key.shape[2], query.device) for entry in tokens]
        if masses:
            requested = (*requested, *(mass for mass in masses if mass is not None))
        output, values = _compute(
            combined, requested, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        for entry, mass in zip(tokens, masses, strict=True):
            if mass is not None:
                entry.maps.add(forward, name, layout, values[mass.name])
        valid_keys = 0
        if ENTROPY in values:
            valid_keys = count_valid_keys(attn_mask, is_causal, query, key, combined.edit)
        for recording in recordings:
            recording.count_call()
            recording.add_statistics(forward, name, call, layout, values, valid_keys, key.shape[2])
            if recording.records_head_output:
                recording.tensors.add(forward, HEAD_OUTPUT, name, call, layout, output)
        return output

    def _holds_frames(self, query: Tensor, attn_mask: Tensor | None) -> bool:
        """Whether a single head as wide as its module attends frame by frame: [batch, frames, tokens, dim]."""
        whole = self._site.heads == 1 and query.ndim == 4 and query.shape[1] != 1
        return whole and query.shape[3] == self._site.head_dim and attn_mask is None

    def _layout(self, query: Tensor, key: Tensor, forward: Forward, given: Given) -> tuple[Layout, int]:
        """How the call reads, and its number in the forward, which is counted.

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
        call, first_sample = forward.count(self._site.name, place, given.attended)
        layout = self._layouts.get((looks, first_sample))
        if layout is None:
            rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
            layout = layout_of(self._site, forward.geometry, rows, queries, keys, given, place, first_sample)
            self._layouts[looks, first_sample] = layout
        return layout, call

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


def _by_name(requested: list[Statistic]) -> tuple[Statistic, ...]:
    """Each statistic once, where several recordings ask for it.

    Raises:
        ValueError: two of them differ and have one name.
    """
    found: dict[str, Statistic] = {}
    for statistic in requested:
        other = found.setdefault(statistic.name, statistic)
        # those without data are equal where their specs are
        if other is not statistic and (other.spec != statistic.spec or statistic.tensors):
            raise ValueError(
                f"statistics: {statistic.name!r} means different things in two active recordings, expected name=..."
                " to tell them apart"
            )
    return tuple(found.values())


def _compute(combined: Combined, statistics: tuple[Statistic, ...], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The edited output, and the statistics by name."""
    result = attention(
        combined.query, combined.key, combined.value, edit=combined.edit, statistics=statistics, **options
    )
    output = result.output
    for edit in combined.later:
        output = blend(output, edit.gate, _fill_of(edit, combined, options))
    return output, result.statistics


def _fill_of(edit: HeadEdit, combined: Combined, options: dict[str, Any]) -> Tensor | None:
    """The fill as a tensor, for a gate that comes after the operator."""
    if not isinstance(edit.fill, str):
        return edit.fill
    query = combined.query
    everything = replace(combined.edit or HeadEdit(), gate=query.new_zeros(1, query.shape[1]), fill=edit.fill)
    return attention(query, combined.key, combined.value, edit=everything, **options).output


def count_valid_keys(
    attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor, edit: HeadEdit | None = None
) -> Tensor | int:
    """How many keys each row may see: an int, or broadcastable to [batch, heads, queries]."""
    queries, keys = query.shape[2], key.shape[2]
    bias = None if edit is None else edit.key_bias
    if attn_mask is None and bias is None:
        return torch.arange(1, queries + 1, device=query.device).clamp(max=keys) if is_causal else keys
    allowed = torch.ones(1, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        allowed = allowed & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > FORBIDDEN_LOGIT)
    if bias is not None:
        # an edit may mute keys
        allowed = allowed & (bias[:, :, None] > FORBIDDEN_LOGIT)
    return allowed.sum(-1)
