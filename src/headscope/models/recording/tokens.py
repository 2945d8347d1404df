"""The piece of a prompt at each of the text positions that a denoiser is given."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headscope.models.hooks.forwards import PROMPT
from headscope.models.recording.prompts import TOKENIZERS

TokenKind = Literal["start", "word", "end", "padding", "unknown"]


@dataclass(frozen=True)
class Token:
    """A position of the text that the denoiser is given.

    Attributes:
        position: among the text keys.
        text: the piece of the prompt, without the tokenizer's marks of word ends.
        kind: "start" and "end" marks, a "word" (or a piece of one), "padding", or "unknown".
    """

    position: int
    text: str
    kind: TokenKind


def label_tokens(
    pipeline: Any, prompts: Mapping[str, str], count: int, encoded: Mapping[str, Collection[tuple[int, ...]]]
) -> list[Token]:
    """The tokens at `count` text positions of the denoiser.

    "unknown" where no tokenizer explains a position, or its encoder was given other tokens than the prompt's.

    Args:
        prompts: a sample's, by the name of the call's argument; a tokenizer without one of its own has "prompt".
        encoded: by tokenizer, the rows of ids that its encoder was seen to be given.
    """
    found: list[Token] = []
    for name, length in _encoders(pipeline, count, encoded):
        tokenizer = getattr(pipeline, name)
        prompt = prompts.get(name.replace("tokenizer", PROMPT), prompts[PROMPT])
        # a word that stands for several embeddings
        convert = getattr(pipeline, "maybe_convert_prompt", None)
        prompt = convert(prompt, tokenizer) if convert else prompt
        ids = tuple(tokenizer(prompt, truncation=True, max_length=length).input_ids)
        rows = encoded.get(name)
        if rows and not any(row[: len(ids)] == ids for row in rows):
            found += _unknown(len(found), length)
        else:
            found += _labelled(tokenizer, ids, length, len(found))
    return found + _unknown(len(found), count - len(found))


def _encoders(pipeline: Any, count: int, encoded: Mapping[str, Collection[tuple[int, ...]]]) -> list[tuple[str, int]]:
    """The tokenizers whose tokens make up the text positions, in order: name and number of tokens.

    CLIP's come first where there are T5's as well (SD3); where CLIP gives a single vector, there are T5's alone (Flux).
    """
    tokenizers = {name: tokenizer for name in TOKENIZERS if (tokenizer := getattr(pipeline, name, None)) is not None}
    clip = next((name for name, one in tokenizers.items() if one.bos_token_id is not None), None)
    other = next((name for name, one in tokenizers.items() if one.bos_token_id is None), None)
    lengths = {len(row) for row in encoded.get(other or "", ())}
    found = []
    left = count
    if clip is not None:
        length = tokenizers[clip].model_max_length
        # without T5's encoder, zeros stand in its tokens' place
        alone = other is None or getattr(pipeline, other.replace("tokenizer", "text_encoder"), None) is None
        if length == count or (length < count and (alone or count - length in lengths)):
            found.append((clip, length))
            left = count - length
    if other is not None and left and (left in lengths or (clip is None and not lengths)):
        found.append((other, left))
    return found


def _unknown(first: int, count: int) -> list[Token]:
    return [Token(position, "", "unknown") for position in range(first, first + count)]


def _labelled(tokenizer: Any, ids: Sequence[int], length: int, first: int) -> list[Token]:
    labels = []
    for place in range(length):
        if place >= len(ids):
            labels.append(Token(first + place, "", "padding"))
        elif ids[place] == tokenizer.bos_token_id and place == 0:
            labels.append(Token(first, "", "start"))
        elif ids[place] == tokenizer.eos_token_id and place == len(ids) - 1:
            labels.append(Token(first + place, "", "end"))
        else:
            text = tokenizer.convert_ids_to_tokens(ids[place])
            labels.append(Token(first + place, text.replace("</w>", "").replace("\u2581", ""), "word"))
    return labels
