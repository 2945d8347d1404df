"""One attention call of an observed site: edited, computed by headscope's operator, recorded."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headscope.models.editing import Combined, combine
from headscope.models.forwards import Forward
from headscope.models.layout import layout_of
from headscope.models.recording import HEAD_OUTPUT
from headscope.models.sites import Site
from headscope.ops import HeadEdit, Statistic, attention
from headscope.ops.edits import blend

if TYPE_CHECKING:
    from headscope.models.scope import Scope

# additive masks in diffusers forbid a key with -10000 or with the dtype's minimum
FORBIDDEN_LOGIT = -5000.0


class SiteFrame:
    """A site's attention module while it runs."""

    def __init__(self, scope: "Scope", site: Site) -> None:
        self._scope = scope
        self._site = site

    def silent(self) -> None:
        """Raises RuntimeError where the module ran and its attention did not come by."""
        name = self._site.name
        if self._scope.asked(name):
            raise RuntimeError(
                f"site {name!r} ran without torch's scaled_dot_product_attention, so nothing of it was recorded or"
                " edited; was its processor or diffusers' attention backend changed?"
            )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_text: int,
        stock: Callable[..., Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        scope, site, name = self._scope, self._site, self._site.name
        forward = scope.running
        if forward is None or not scope.asked(name):
            return stock(query, key, value, **options)
        if query.ndim == 3 and site.heads == 1:
            # one head without a dimension of its own
            mask = options["attn_mask"]
            one = {**options, "attn_mask": mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask}
            return self.attend(*(tensor.unsqueeze(1) for tensor in (query, key, value)), own_text, stock, one).squeeze(
                1
            )
        repeated = forward.totals is not None
        recordings = [] if repeated else [entry.recording for entry in scope.recordings if name in entry.sites]
        edits = [edit for edit in scope.edits if name in edit.sites and edit.acts_in(forward)]
        calls = forward.calls.get(name, 0)
        forward.calls[name] = calls + 1
        if forward.totals is not None:
            calls %= max(1, forward.totals.get(name, 1))
        mapped = [entry for entry in scope.token_maps if name in entry.sites and entry.acts_in(forward)]
        # a repetition takes the operator that ran the first time, so that it saves the same tensors
        observed = recordings or edits or mapped or any(name in entry.sites for entry in scope.recordings)
        if not observed:
            return stock(query, key, value, **options)
        self._check(query, options["dropout_p"], forward)
        layout = layout_of(site, forward.geometry, query.shape[0], query.shape[2], key.shape[2], int(own_text), calls)
        call = calls // max(1, forward.batch // layout.samples)
        options = {option: given for option, given in options.items() if option != "dropout_p"}
        for recording in recordings:
            for quantity, tensor in (("q", query), ("k", key), ("v", value)):
                if quantity in recording.quantities:
                    recording.tensors.add(forward, quantity, name, call, layout, tensor)
        changes = [change for edit in edits for change in edit.changes(name, call, forward, layout, query)]
        combined = combine(changes, query, key, value)
        tokens = [] if repeated else mapped
        masses = [entry.maps.statistic(forward, layout, key.shape[2], query.device) for entry in tokens]
        requested = [statistic for recording in recordings for statistic in recording.requested]
        requested += [mass for mass in masses if mass is not None]
        output, values = _compute(combined, _by_name(requested), options)
        for entry, mass in zip(tokens, masses, strict=True):
            if mass is not None:
                entry.maps.add(forward, name, layout, values[mass.name])
        valid_keys = count_valid_keys(options["attn_mask"], options["is_causal"], query, key) if requested else 0
        for recording in recordings:
            recording.count_call()
            recording.add_statistics(forward, name, call, layout, values, valid_keys, key.shape[2])
            if recording.records_head_output:
                recording.tensors.add(forward, HEAD_OUTPUT, name, call, layout, output)
        return output

    def _check(self, query: Tensor, dropout_p: float, forward: Forward) -> None:
        name = self._site.name
        if query.ndim != 4:
            raise ValueError(f"site {name!r} calls attention with {query.ndim} dimensions, expected 4")
        if query.shape[1] != self._site.heads:
            raise ValueError(f"site {name!r} calls attention with {query.shape[1]} heads, expected {self._site.heads}")
        if forward.geometry.packed and query.shape[0] != 1:
            raise ValueError(
                f"site {name!r} calls attention on {query.shape[0]} rows, expected 1: the model's first tensor has no"
                " dimension of samples, so its samples can't be told apart"
            )
        if query.shape[0] % forward.batch and forward.batch % query.shape[0]:
            raise ValueError(
                f"site {name!r} calls attention on {query.shape[0]} rows, expected a multiple or a part of the batch"
                f" of {forward.batch}"
            )
        if dropout_p:
            raise ValueError(f"site {name!r} uses attention dropout; put the model in eval mode to record or edit it")


def _by_name(requested: list[Statistic]) -> list[Statistic]:
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
    return list(found.values())


def _compute(
    combined: Combined, statistics: list[Statistic], options: dict[str, Any]
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


def count_valid_keys(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | int:
    """How many keys each row may see: an int, or broadcastable to [batch, heads, queries]."""
    keys = key.shape[2]
    if is_causal:
        return torch.arange(1, query.shape[2] + 1, device=query.device).clamp(max=keys)
    if attn_mask is None:
        return keys
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > FORBIDDEN_LOGIT
    return allowed.expand(*allowed.shape[:-1], keys).sum(-1)
