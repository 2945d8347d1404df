"""One attention call of an observed site: edited, computed by headscope's operator, recorded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from headscope.models.editing.combining import Combined, combine
from headscope.models.editing.editing import EditContext
from headscope.models.hooks.calls import CallLayouts
from headscope.models.hooks.contexts import ActiveContexts
from headscope.models.hooks.forwards import Forward
from headscope.models.recording.maps import TokenMapContext, TokenMaps
from headscope.models.recording.parts import ENTROPY
from headscope.models.recording.recording import HEAD_OUTPUT, Recording, RecordingContext
from headscope.models.structure.layout import Given, Layout
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
    """

    version: int
    recordings: tuple[Recording, ...]
    edits: tuple[EditContext, ...]
    token_maps: tuple[TokenMapContext, ...]
    requested: tuple[Statistic, ...]

    @classmethod
    def of(cls, contexts: ActiveContexts, site: str) -> "_Interest":
        recordings = tuple(context.recording for context in contexts.of(RecordingContext, site))
        return cls(
            contexts.version,
            recordings,
            tuple(contexts.of(EditContext, site)),
            tuple(contexts.of(TokenMapContext, site)),
            _each_once([statistic for recording in recordings for statistic in recording.requested]),
        )

    @property
    def any(self) -> bool:
        return bool(self.recordings or self.edits or self.token_maps)


class SiteFrame:
    """A site's attention module while it runs: what `routing` sends the module's attention to."""

    def __init__(self, contexts: ActiveContexts, site: Site) -> None:
        self._contexts = contexts
        self._site = site
        self._layouts = CallLayouts(site)
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
        """The output of scaled_dot_product_attention, edited and recorded; called where the site is `wanted`.

        Args:
            given: the fields of a `Given`: what the module was given.
        """
        if self._holds_frames(query, attn_mask):
            rows = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (query, key, value))
            output = self.attend(given, *rows, None, dropout_p, is_causal, scale, enable_gqa)
            return output.unflatten(0, query.shape[:2]).squeeze(2)
        if query.ndim == 3 and self._site.heads == 1:
            # one head without a dimension of its own
            mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
            heads = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return self.attend(given, *heads, mask, dropout_p, is_causal, scale, enable_gqa).squeeze(1)
        if dropout_p:
            raise ValueError(
                f"site {self._site.name!r} uses attention dropout; put the model in eval mode to record or edit it"
            )
        forward = self._contexts.forward
        assert forward is not None
        layout, number = self._layouts.of(query, key, forward, Given(*map(int, given)))
        call = _Call(self._site.name, number, forward, layout)
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _attend(call, self._interest(), query, key, value, options)

    def _holds_frames(self, query: Tensor, attn_mask: Tensor | None) -> bool:
        """True if a single head as wide as its module attends frame by frame: [batch, frames, tokens, dim]."""
        whole = self._site.heads == 1 and query.ndim == 4 and query.shape[1] != 1
        return whole and query.shape[3] == self._site.head_dim and attn_mask is None


class _Call(NamedTuple):
    """An attention call of a site.

    Attributes:
        number: of the call within the site and forward.
    """

    site: str
    number: int
    forward: Forward
    layout: Layout


def _attend(
    call: _Call, interest: _Interest, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Tensor:
    """The edited output of a call, recorded; tensors are [rows, heads, tokens, dim]."""
    site, number, forward, layout = call
    # a repetition takes the operator that ran the first time, so that it saves the same tensors
    repeated = forward.totals is not None
    recordings = () if repeated else interest.recordings
    for recording in recordings:
        recording.tensors.add_inputs(recording.quantities, forward, site, number, layout, query, key, value)
    combined = _edited(call, interest.edits, query, key, value)
    masses = [] if repeated else _token_masses(call, interest.token_maps, key)
    requested = () if repeated else (*interest.requested, *(mass for _, mass in masses))
    output, values = _compute(combined, requested, options)
    for maps, mass in masses:
        maps.add(forward, site, layout, values[mass.name])
    if not recordings:
        return output
    valid_keys = 0
    if ENTROPY in values:
        valid_keys = count_valid_keys(options["attn_mask"], options["is_causal"], query, key, combined.edit)
    for recording in recordings:
        recording.count_call()
        recording.add_statistics(forward, site, number, layout, values, valid_keys, key.shape[2])
        if recording.records_head_output:
            recording.tensors.add(forward, HEAD_OUTPUT, site, number, layout, output)
    return output


def _edited(call: _Call, edits: Sequence[EditContext], query: Tensor, key: Tensor, value: Tensor) -> Combined:
    """What the operator is to compute."""
    acting = [edit for edit in edits if edit.acts_in(call.forward)]
    if not acting:
        return Combined(query, key, value)
    changes = [change for edit in acting for change in edit.changes(*call, query)]
    return combine(changes, query, key, value)


def _token_masses(call: _Call, contexts: Sequence[TokenMapContext], key: Tensor) -> list[tuple[TokenMaps, GroupMass]]:
    """The statistic of each token map that takes something from this call."""
    acting = [context.maps for context in contexts if context.acts_in(call.forward)]
    masses = [(maps, maps.statistic(call.forward, call.layout, key.shape[2], key.device)) for maps in acting]
    return [(maps, mass) for maps, mass in masses if mass is not None]


def _compute(
    combined: Combined, statistics: tuple[Statistic, ...], options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
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


def _each_once(requested: list[Statistic]) -> tuple[Statistic, ...]:
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
