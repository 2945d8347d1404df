"""One attention call of an observed site: edited, computed by headscope's operator, recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from headscope._shapes import Float, Int64, SiteKey, SiteOutput, SiteQuery
from headscope.models.editing.combining import Combined, combine
from headscope.models.editing.editing import EditContext
from headscope.models.hooks.calls import SiteCall, SiteCalls
from headscope.models.hooks.contexts import ActiveContexts
from headscope.models.hooks.routing import AttentionArguments
from headscope.models.recording.context import RecordingContext
from headscope.models.recording.maps import TokenMapContext, TokenMaps
from headscope.models.recording.parts import ENTROPY
from headscope.models.recording.recording import HEAD_OUTPUT, Recording
from headscope.models.recording.regions import CounterpartMass, Placed, placed, regions_of
from headscope.models.structure.layout import Given
from headscope.models.structure.sites import Site
from headscope.ops import GroupMass, HeadEdit, Statistic, attention
from headscope.ops.edits import blend

# additive masks in diffusers forbid a key with -10000 or with the dtype's minimum
FORBIDDEN_LOGIT = -5000.0


class _Interest(NamedTuple):
    """The open contexts that concern a site.

    Attributes:
        version: `ActiveContexts.version` at the time.
        requested: the statistics of all recordings, each once.
        of_regions: some of them are of regions of the picture.
    """

    version: int
    recordings: tuple[Recording, ...]
    edits: tuple[EditContext, ...]
    token_maps: tuple[TokenMapContext, ...]
    requested: tuple[Statistic, ...]
    of_regions: bool

    @classmethod
    def of(cls, contexts: ActiveContexts, site: str) -> "_Interest":
        recordings = tuple(context.recording for context in contexts.of(RecordingContext, site))
        requested = _each_once([statistic for recording in recordings for statistic in recording.requested])
        return cls(
            contexts.version,
            recordings,
            tuple(contexts.of(EditContext, site)),
            tuple(contexts.of(TokenMapContext, site)),
            requested,
            any(regions_of(statistic) is not None for statistic in requested),
        )

    @property
    def any(self) -> bool:
        return bool(self.recordings or self.edits or self.token_maps)


class SiteFrame:
    """A site's attention module while it runs: what `routing` sends the module's attention to."""

    def __init__(self, contexts: ActiveContexts, site: Site) -> None:
        self._contexts = contexts
        self._site = site
        self._calls = SiteCalls(site)
        self._last_interest = _Interest.of(contexts, site.name)

    def _interest(self) -> _Interest:
        interest = self._last_interest
        if interest.version != self._contexts.version:
            interest = self._last_interest = _Interest.of(self._contexts, self._site.name)
        return interest

    def wanted(self) -> bool:
        """True if anything of the site is recorded or edited in the forward that runs.

        Raises:
            RuntimeError: none runs, and something of the site is to be recorded or edited.
        """
        interest = self._interest()
        if not interest.any:
            return False
        if not self._contexts.in_forward:
            raise RuntimeError(
                f"site {self._site.name!r} ran outside of a forward of {type(self._contexts.denoiser).__name__}, where"
                " a Scope can't record or edit it; call the model itself, not its forward method or a part of it (as"
                " vae.encode does), or name other sites (sites=...)"
            )
        forward = self._contexts.forward
        if forward is None:
            return False
        acting = (context.acts_in(forward) for context in (*interest.edits, *interest.token_maps))
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

    def attend(self, given: Sequence[int], arguments: AttentionArguments) -> Tensor:
        """The output of scaled_dot_product_attention, edited and recorded; called where the site is `wanted`.

        Args:
            given: the fields of a `Given`: what the module was given.
        """
        query, key, value, mask, dropout, *_ = arguments
        if self._holds_frames(query, mask):
            rows = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (query, key, value))
            output = self.attend(given, AttentionArguments(*rows, *arguments[3:]))
            return output.unflatten(0, query.shape[:2]).squeeze(2)
        if query.ndim == 3 and self._site.heads == 1:
            # one head without a dimension of its own
            mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
            heads = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return self.attend(given, AttentionArguments(*heads, mask, *arguments[4:])).squeeze(1)
        if dropout:
            raise ValueError(
                f"site {self._site.name!r} uses attention dropout; put the model in eval mode to record or edit it"
            )
        forward = self._contexts.forward
        assert forward is not None
        call = self._calls.next(query, key, forward, Given(*map(int, given)))
        return _attend(call, self._interest(), arguments)

    def _holds_frames(self, query: Tensor, attn_mask: Tensor | None) -> bool:
        """True if a single head as wide as its module attends frame by frame: [batch, frames, tokens, dim]."""
        whole = self._site.heads == 1 and query.ndim == 4 and query.shape[1] != 1
        return whole and query.shape[3] == self._site.head_dim and attn_mask is None


def _attend(call: SiteCall, interest: _Interest, arguments: AttentionArguments) -> Tensor:
    """The edited output of a call, recorded; tensors are [rows, heads, tokens, dim]."""
    query, key, value, attn_mask, _, is_causal, *_ = arguments
    # a repetition asks for what was asked for the first time, so that the operator saves the same tensors
    repeated = call.forward.totals is not None
    recordings = () if repeated else interest.recordings
    for recording in recordings:
        recording.tensors.add_inputs(recording.quantities, call, query, key, value)
    combined = Combined(query, key, value)
    if interest.edits:
        changes = [
            change for edit in interest.edits if edit.acts_in(call.forward) for change in edit.changes(call, query)
        ]
        combined = combine(changes, query, key, value) if changes else combined
    requested, masses = interest.requested, []
    of_regions: dict[str, tuple[Placed, str]] = {}
    if interest.of_regions:
        requested, of_regions = _placed(requested, call, key)
    if interest.token_maps:
        masses = _token_masses(call, interest.token_maps, key)
        requested = (*requested, *(mass for _, mass in masses))
    output, values = _compute(combined, requested, arguments)
    if repeated:
        return output
    values |= {name: place.finished(values[source]) for name, (place, source) in of_regions.items()}
    for maps, mass in masses:
        maps.add(call, values[mass.name])
    valid_keys = 0
    if ENTROPY in values:
        valid_keys = count_valid_keys(attn_mask, is_causal, query, key, combined.edit)
    for recording in recordings:
        recording.add_statistics(call, values, valid_keys, key.shape[2])
        if recording.records_head_output:
            recording.tensors.add(HEAD_OUTPUT, call, output)
    return output


def _placed(
    requested: Sequence[Statistic], call: SiteCall, key: SiteKey
) -> tuple[tuple[Statistic, ...], dict[str, tuple[Placed, str]]]:
    """What the operator computes at this call: of statistics of regions, those that the call has a place for.

    Returns:
        The statistics; and by name those of regions, each with the name of the one that it is made of.
    """
    found = {one.name: placed(one, call, key.shape[2], key.device) for one in requested if regions_of(one) is not None}
    masses = {regions_of(one): one.name for one in requested if type(one) is GroupMass}
    computed: list[Statistic] = []
    of_regions: dict[str, tuple[Placed, str]] = {}
    for one in requested:
        place = found.get(one.name)
        if place is None:
            computed += [] if one.name in found else [one]
            continue
        # the mass on counterparts is made of that on all regions
        source = masses.get(regions_of(one), one.name) if isinstance(one, CounterpartMass) else one.name
        of_regions[one.name] = place, source
        computed += [place.statistic] if source == one.name else []
    return tuple(computed), of_regions


def _token_masses(
    call: SiteCall, contexts: Sequence[TokenMapContext], key: SiteKey
) -> list[tuple[TokenMaps, GroupMass]]:
    """The statistic of each token map that takes something from this call."""
    acting = [context.maps for context in contexts if context.acts_in(call.forward)]
    masses = [(maps, maps.statistic(call, key.shape[2], key.device)) for maps in acting]
    return [(maps, mass) for maps, mass in masses if mass is not None]


def _compute(
    combined: Combined, statistics: tuple[Statistic, ...], arguments: AttentionArguments
) -> tuple[SiteOutput, dict[str, Float[Tensor, "rows _heads ..."]]]:
    """The edited output, and the statistics by name."""
    _, _, _, attn_mask, _, is_causal, scale, enable_gqa = arguments
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    query, key, value, first, others = combined
    result = attention(query, key, value, edit=first, statistics=statistics, **options)
    output = result.output
    for later in others:
        fill = later.fill
        # as a tensor, for a gate that comes after the operator
        if isinstance(fill, str):
            edit = replace(first or HeadEdit(), gate=query.new_zeros(1, query.shape[1]), fill=fill)
            fill = attention(query, key, value, edit=edit, **options).output
        output = blend(output, later.gate, fill)
    return output, result.statistics


def count_valid_keys(
    attn_mask: Tensor | None, is_causal: bool, query: SiteQuery, key: SiteKey, edit: HeadEdit | None = None
) -> Int64[Tensor, "..."] | int:
    """The number of keys that each query may see: an int, or broadcastable to [rows, heads, queries]."""
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


def _each_once(requested: list[Statistic]) -> tuple[Statistic, ...]:
    """Each statistic once, where several recordings ask for it.

    Raises:
        ValueError: two of them differ and have one name.
    """
    found: dict[str, Statistic] = {}
    for statistic in requested:
        other = found.setdefault(statistic.name, statistic)
        if other is not statistic and not _same(other, statistic):
            raise ValueError(
                f"statistics: {statistic.name!r} means different things in two active recordings, expected name=..."
                " to tell them apart"
            )
    return tuple(found.values())


def _same(one: Statistic, other: Statistic) -> bool:
    """True if two statistics are equal: those of the same regions, or without data, where their specs are."""
    alike = type(one) is type(other) and one.spec == other.spec and not other.tensors
    return alike and regions_of(one) is regions_of(other)
