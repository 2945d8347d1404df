"""Token maps: how much each place of the picture attends to each token of the prompt."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from headscope.models.hooks.caches import Missing, Reused
from headscope.models.hooks.calls import SiteCall
from headscope.models.hooks.contexts import Context
from headscope.models.hooks.forwards import PROMPT, Forward
from headscope.models.recording.plots import heatmaps
from headscope.models.recording.prompts import Prompts
from headscope.models.recording.tokens import Token, TokenKind, label_tokens
from headscope.models.structure.index import SiteIndex, check_heads
from headscope.models.structure.layout import IMAGE, TEXT
from headscope.ops import GroupMass


class _Piece(NamedTuple):
    """The share of one attention call in a site's sums: [samples, tokens, height, width], summed over so many heads."""

    site: str
    batch: int
    samples: range
    summed: Tensor
    heads: int


class TokenMaps:
    """The attention mass that image queries give to each token of the prompt, summed over heads and steps.

    Sums are per site, on the model's device. What is read is the mean over heads, attention calls and the chosen sites,
    each site's map resized to the finest one's grid (bilinear). Masses of all tokens, marks and padding included, sum
    to 1 at every place of a cross-attention.

    Their words are those of the pipeline's call. A pipeline that doesn't give its prompts to a text encoder as they
    are (it cleans them, or puts them into a template) leaves the tokens of that encoder "unknown".

    Attributes:
        reused: the sites whose attention under the prompt a forward took from a cache of diffusers or skipped, as in
            `Recording.reused`; they are not in the sums of those steps.
    """

    def __init__(self, pipeline: Any, prompts: Prompts, heads: Mapping[str, Sequence[int]]) -> None:
        self._prompts = prompts
        self.reused: list[Reused] = []
        self._pipeline = pipeline
        self._heads = heads
        self._sums: dict[str, Tensor] = {}  # [samples, tokens, height, width]
        self._counts: dict[str, Counter[int]] = {}  # by sample, how many heads of how many calls
        # of the forward that runs
        self._pending: list[_Piece] = []
        self._groups: dict[tuple, GroupMass] = {}
        # two contexts may ask for the same tokens
        self._name = f"token_mass_{id(self)}"

    def __repr__(self) -> str:
        return f"TokenMaps({len(self.prompts)} prompts, {len(self._sums)} sites)"

    @property
    def prompts(self) -> tuple[str, ...]:
        """One per sample; before the pipeline runs, those that were named."""
        of_samples = self._prompts.of_samples
        return self._prompts.named or () if of_samples is None else tuple(texts[PROMPT] for texts in of_samples)

    # what the scope does with it

    def statistic(self, call: SiteCall, keys: int, device: torch.device) -> GroupMass | None:
        """The operator's statistic for a call; None where image queries don't meet text keys."""
        text = next((segment for segment in call.layout.keys if segment.group == TEXT), None)
        if text is None or call.grid is None:
            return None
        place = (text.start, text.stop, keys, device)
        if place not in self._groups:
            # ordinary tensors, which a later forward may save for its backward
            with torch.inference_mode(False):
                groups = torch.full((keys,), -1, dtype=torch.int32)
                groups[text.start : text.stop] = torch.arange(text.stop - text.start, dtype=torch.int32)
                self._groups[place] = GroupMass(groups.to(device), text.stop - text.start, name=self._name)
        return self._groups[place]

    def begin_forward(self, forward: Forward) -> None:
        """Take note of a forward inside the context.

        Raises:
            ValueError: it isn't of the prompts that were named, or not of those before.
        """
        self._prompts.begin_forward(forward)

    def add(self, call: SiteCall, mass: Tensor) -> None:
        """Add one call's [rows, heads, queries, tokens]; of several guidance branches, the one that sees the prompt."""
        site, _, forward, layout = call
        if layout.fold != 1:
            raise ValueError(f"token maps: site {site.name!r} folds frames into its batch, expected a picture per row")
        branches = forward.branches
        if "cond" not in branches and branches != (None,):
            return
        part = 0 if branches == (None,) else branches.index("cond")
        samples = forward.samples_of(part, layout)
        if not samples:
            return
        first = part * forward.samples + samples.start - layout.first_sample
        rows = mass.detach()[first : first + len(samples)]
        heads = self._heads.get(site.name)
        rows = rows if heads is None else rows[:, list(heads)]
        image = next(segment for segment in layout.queries if segment.group == IMAGE)
        grid = call.grid
        assert grid is not None
        summed = rows[:, :, image.start : image.stop].sum(1).transpose(1, 2).unflatten(2, grid)
        self._pending.append(_Piece(site.name, forward.samples, samples, summed, rows.shape[1]))

    def end_forward(self, completed: bool) -> None:
        """Keep what the forward gave; nothing of one that did not end."""
        pending, self._pending = self._pending, []
        for piece in pending if completed else ():
            self._keep(*piece)

    def _keep(self, site: str, batch: int, samples: range, summed: Tensor, heads: int) -> None:
        if site not in self._sums:
            # an ordinary tensor, which a later forward in another mode may add to
            with torch.inference_mode(False):
                self._sums[site] = summed.new_zeros(batch, *summed.shape[1:])
        before, now = tuple(self._sums[site].shape), tuple(summed.shape)
        if before[2:] != now[2:]:
            raise ValueError(
                f"token maps: site {site!r} has a picture of {now[2]} x {now[3]} places after one of {before[2]} x"
                f" {before[3]} in one context, expected pictures of one size, or a context for each"
            )
        if self._sums[site].shape[1:] != summed.shape[1:]:
            raise ValueError(
                f"token maps: site {site!r} meets {summed.shape[1]} text tokens in one sample and"
                f" {self._sums[site].shape[1]} in another, expected prompts of one length"
            )
        self._sums[site][samples.start : samples.stop] += summed
        heard = self._counts.setdefault(site, Counter())
        heard.update(dict.fromkeys(samples, heads))

    # what a person reads

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites at which something was recorded."""
        return tuple(self._sums)

    def tokens(self, sample: int = 0) -> list[Token]:
        """The text tokens of a sample's prompt, in order.

        Raises:
            ValueError: nothing was recorded.
            IndexError: there is no such sample.
        """
        _, count = self._require(sample)
        assert self._prompts.of_samples is not None
        return label_tokens(self._pipeline, self._prompts.of_samples[sample], count, self._prompts.encoded)

    def positions(self, words: str, sample: int = 0) -> list[int]:
        """The positions of the prompt's words among the tokens.

        Raises:
            ValueError: they don't stand there.
        """
        tokens = [token for token in self.tokens(sample) if token.kind == "word"]
        wanted = "".join(words.lower().split())
        for first in range(len(tokens)):
            for last in range(first, len(tokens)):
                if "".join(token.text for token in tokens[first : last + 1]).lower() == wanted:
                    return [token.position for token in tokens[first : last + 1]]
        raise ValueError(f"words: got {words!r}, expected some of {[token.text for token in tokens]}")

    def map(self, of: str | Sequence[int] | TokenKind, sample: int = 0, sites: Sequence[str] | None = None) -> Tensor:
        """The mass on some tokens, [height, width], float32 on the CPU, 0..1.

        Args:
            of: words of the prompt, positions, or a kind: "start", "end", "padding".
            sites: names of sites to average over; all by default.

        Raises:
            ValueError: no such words, or nothing was recorded.
            KeyError: nothing was recorded at a site.
            IndexError: there is no such sample.
        """
        self._require(sample)
        if isinstance(of, str):
            kinds = [token.position for token in self.tokens(sample) if token.kind == of]
            of = kinds or self.positions(of, sample)
        chosen = self.sites if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
        for site in chosen:
            if site not in self._sums:
                raise KeyError(f"sites: nothing was recorded at {site!r}, expected some of {', '.join(self.sites)}")
            if not self._counts[site][sample]:
                raise KeyError(f"sites: nothing of sample {sample} was recorded at {site!r}")
        if not chosen:
            raise ValueError(f"sites: got none, expected some of {', '.join(self.sites)}")
        maps = [self._sums[site][sample, list(of)].sum(0) / self._counts[site][sample] for site in chosen]
        height, width = max((tuple(one.shape) for one in maps), key=lambda shape: shape[0] * shape[1])
        resized = [
            functional.interpolate(one[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
            for one in maps
        ]
        return torch.stack(resized).mean(0).float().cpu()

    def plot(self, *words: str, sample: int = 0, sites: Sequence[str] | None = None, image: Any = None) -> Any:
        """A plotly figure with a map for each of the words (each word token of the prompt if none is named).

        Args:
            image: what the pipeline drew for that sample (PIL, or an array [height, width, 3]), shown first.
        """
        if not words:
            words = tuple(dict.fromkeys(token.text for token in self.tokens(sample) if token.kind == "word"))
        maps = {word: self.map(word, sample, sites).numpy() for word in words}
        return heatmaps(maps, "attention mass on the word, 0 to 1", image)

    def _require(self, sample: int) -> tuple[int, int]:
        """The number of samples and of text tokens; raises where the sample isn't among them."""
        if not self._sums:
            raise ValueError("token maps: nothing was recorded, expected a run of the pipeline inside the context")
        samples, tokens = next(iter(self._sums.values())).shape[:2]
        if not 0 <= sample < samples:
            raise IndexError(f"sample: got {sample}, expected 0 to {samples - 1}")
        return samples, tokens


class TokenMapContext(Context):
    """An open context that adds to token maps."""

    def __init__(self, maps: TokenMaps, sites: Iterable[str], steps: range | None) -> None:
        super().__init__(sites, steps)
        self.maps = maps

    def begin_forward(self, forward: Forward) -> None:
        self.maps.begin_forward(forward)

    def end_forward(self, forward: Forward, completed: bool) -> None:
        self.maps.end_forward(completed)

    def note_missing(self, missing: Missing, forward: Forward) -> None:
        site, branch, _ = missing
        mapped = site in self.sites and site in self.maps.sites
        if mapped and branch in ("cond", None) and self.acts_in(forward):
            self.maps.reused.append(Reused(site, self.step_of(forward), branch))


def heads_by_site(
    heads: Mapping[str, Sequence[int]], sites: Sequence[str], index: SiteIndex
) -> dict[str, tuple[int, ...]]:
    """The heads to sum over, given by site name or pattern, among the sites to record.

    Raises:
        KeyError: an unknown site.
        ValueError: a site that isn't recorded, no head of it, none, or one twice.
        TypeError: heads that are no numbers.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    for pattern, numbers in heads.items():
        matching = index.matching(pattern)
        if set(sites).isdisjoint(matching):
            raise ValueError(f"heads: got {pattern!r}, which is not among the sites to record")
        for name in matching:
            check_heads(numbers, index.site(name), f"heads[{pattern!r}]")
            chosen[name] = tuple(numbers)
        if len(set(numbers)) != len(numbers) or not len(numbers):
            raise ValueError(f"heads[{pattern!r}]: got {list(numbers)}, expected some heads, each once")
    return chosen
