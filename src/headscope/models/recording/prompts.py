"""The prompts that token maps are of: those of the pipeline's call, and those that are named beside it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from headscope.models.hooks.forwards import PROMPT, Forward

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Prompts:
    """The prompts of every sample, from the forwards of the pipeline's call.

    Args:
        pipeline: None where a denoiser is called without one.
        named: what the caller says that they are: one for each prompt of the call, one for each sample, or one for all.

    Attributes:
        of_samples: each sample's, by the name of the call's argument (prompt, prompt_2, prompt_3); None before the
            first forward.
        encoded: by the name of a tokenizer, the rows of ids that its text encoder was given.

    Raises:
        TypeError: named ones that aren't strings.
        ValueError: none in a list.
    """

    def __init__(self, pipeline: Any, named: str | Sequence[str] | None) -> None:
        self.named = (named,) if isinstance(named, str) else None if named is None else tuple(named)
        for prompt in self.named or ():
            if not isinstance(prompt, str):
                raise TypeError(f"prompts: got an entry of type {type(prompt).__name__}, expected strings")
        if self.named == ():
            raise ValueError("prompts: got an empty list, expected some, or None to take them from the call")
        self.of_samples: tuple[Mapping[str, str], ...] | None = None
        self._pipeline = pipeline
        self.encoded: dict[str, set[tuple[int, ...]]] = {}

    def begin_forward(self, forward: Forward) -> None:
        """Take the prompts of a forward, or compare them.

        Raises:
            ValueError: they aren't the ones that were named, or not those of the forwards before.
        """
        texts = forward.prompts or {}
        found = self._called_with(texts, forward.samples) if PROMPT in texts else self._taken_on_trust(forward)
        if self.of_samples is None:
            self.of_samples = found
        elif self.of_samples != found:
            raise ValueError(
                f"prompts: the pipeline was called with {_listed(self.of_samples)}, and now is with {_listed(found)},"
                " in one context; expected the same, or a context for each"
            )

    def _called_with(self, texts: Mapping[str, Sequence[str]], samples: int) -> tuple[Mapping[str, str], ...]:
        for name, prompts in texts.items():
            if samples % len(prompts):
                raise ValueError(
                    f"{name}: the pipeline got {len(prompts)} for {samples} samples, expected as many for each"
                )
        # several images of a prompt follow each other
        found = tuple(
            {name: prompts[sample * len(prompts) // samples] for name, prompts in texts.items()}
            for sample in range(samples)
        )
        if self.named is not None:
            self._check_number(samples)
            for sample, prompts in enumerate(found):
                named = self.named[sample * len(self.named) // samples]
                if named != prompts[PROMPT]:
                    raise ValueError(
                        f"prompts: got {named!r} for sample {sample}, which the pipeline was called with"
                        f" {prompts[PROMPT]!r} for; leave them out to take them from the call"
                    )
        return found

    def _taken_on_trust(self, forward: Forward) -> tuple[Mapping[str, str], ...]:
        """The named prompts, where no call of the pipeline tells them."""
        why = "no call of the pipeline is running" if forward.prompts is None else "the pipeline is called without them"
        if self.named is None:
            raise ValueError(f"prompts: got none, and {why} (but with their embeddings, perhaps); expected their words")
        self._check_number(forward.samples)
        # without a pipeline no words are put to the tokens
        if self.of_samples is None and self._pipeline is not None:
            warnings.warn(
                f"prompts: {why}, so nothing tells whether they are {', '.join(map(repr, self.named))}", stacklevel=2
            )
        each = forward.samples // len(self.named)
        return tuple({PROMPT: named} for named in self.named for _ in range(each))

    def _check_number(self, samples: int) -> None:
        named = self.named or ()
        if samples % len(named):
            raise ValueError(f"prompts: got {len(named)} for {samples} samples, expected one for each, or one for all")

    # what the text encoders are given

    @contextmanager
    def watching_encoders(self) -> Iterator[None]:
        """Take note of what the pipeline's text encoders are given."""
        handles = []
        for name in TOKENIZERS:
            encoder = getattr(self._pipeline, name.replace("tokenizer", "text_encoder"), None)
            if isinstance(encoder, nn.Module):
                handles.append(encoder.register_forward_pre_hook(self._noting(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, name: str) -> Any:
        def note(encoder: nn.Module, args: tuple, kwargs: dict) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.ndim == 2:
                self.encoded.setdefault(name, set()).update(map(tuple, ids.tolist()))

        return note


def _listed(of_samples: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(" / ".join(map(repr, prompts.values())) for prompts in of_samples)
