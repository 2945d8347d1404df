"""Guidance branches: with the prompt, without it, and others, of each part of a denoiser's batch or of a whole pass.

They are told from the pipeline's running call and its source. No pipeline of diffusers is known by name.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from headscope.models.structure.source import source_tree

# without the prompt; with it; with it and perturbed attention; with it and some layers skipped; with it and without the
# other modality (sound, where there is a picture); without it and with the picture to edit; which isn't told
BRANCHES = ("uncond", "cond", "perturbed", "skip", "modality", "image", "unknown")
# parts of a batch that the pipeline's source doesn't name
_PART = re.compile(r"part_\d+")
# what a pipeline's call names how many images, videos, waveforms, ... it makes of each prompt
_PER_PROMPT = re.compile(r"num_(images|videos|waveforms|designs)_per_prompt")
# what pipelines and guiders call other passes than the first two
_PASSES = {
    "cond_skip": "skip",
    "cond_seg": "perturbed",
    "cond_stg": "perturbed",
    "uncond_stg": "perturbed",
    "cond_modality": "modality",
    "uncond_modality": "modality",
}
# what stands in the names of parts of a prediction, the first that does
_WORDS = (("uncond", r"uncond|neg|null"), ("image", r"image|img"), ("cond", r"text|cond|pos"))
# what is taken apart and isn't a prediction
_INPUTS = re.compile(r"embed|mask|ids|prompt|image|hidden|feats")


def checked_branches(branches: Iterable[str] | None) -> tuple[str, ...] | None:
    """The branches that a caller named; a string is one of them.

    Raises:
        TypeError: not strings.
        ValueError: none, or a name that no branch has.
    """
    if branches is None:
        return None
    if not isinstance(branches, Iterable):
        raise TypeError(f"branches: got {type(branches).__name__}, expected names of branches, or None for all")
    names = (branches,) if isinstance(branches, str) else tuple(branches)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"branches: got an entry of type {type(name).__name__}, expected names")
        if name not in BRANCHES and not _PART.fullmatch(name):
            raise ValueError(f"branches: got {name!r}, expected some of {', '.join(BRANCHES)}, part_0, part_1, ...")
    if not names:
        raise ValueError(f"branches: got none, expected some of {', '.join(BRANCHES)}, or None for all")
    return names


def branches_of(
    pipeline: Any,
    call: Mapping[str, Any],
    batch: int,
    arguments: Mapping[str, Any],
    cache_context: str | None,
    earlier: tuple[str | None, ...] | None,
    was_guided: bool,
) -> tuple[str | None, ...]:
    """The branch of each equal part of a denoiser's batch; (None,) where there is no guidance.

    Told from the pipeline's running call: its guidance property outlives the call.

    Args:
        call: the call's local variables; empty where none is running.
        arguments: the denoiser's, by name.
        cache_context: the name that the pipeline gave to this pass of the denoiser, if it did.
        earlier: the branches of the forward before, in the same call.
        was_guided: an earlier forward of the call had branches. A step callback may switch guidance off half way; what
            is left is the branch that it was before.
    """
    # a pass of skip-layer guidance (SD3)
    if arguments.get("skip_layers") is not None:
        return ("skip",)
    told = _told_guidance(pipeline, call)
    if cache_context is not None and cache_context != "cond_uncond":
        name = cache_context.removeprefix("pred_")
        name = _PASSES.get(name, name)
        # the only pass there is
        alone = name == "cond" and call and not (told or was_guided)
        return (None,) if alone else (name,)
    if not call:
        return (None,)
    samples = _samples(call)
    parts, rest = divmod(batch, samples or batch)
    if samples is None or rest or parts == 0:
        return ("unknown",) if told else (None,)
    guided = told or (told is None and _is_above_one(call.get("guidance_scale")))
    if parts == 1:
        if told or (guided and _has_negative_text(call)):
            return (_branch_of_text(call, arguments) or "unknown",)
        return ("cond" if was_guided else None,)
    if _is_perturbed(pipeline, call) and parts == 2 + guided:
        return ("uncond", "cond", "perturbed") if guided else ("cond", "perturbed")
    known = _known_parts(pipeline, call, arguments, parts, samples) if guided else None
    if known is None and earlier is not None and len(earlier) == parts:
        known = earlier
    if known is None and guided:
        known = ("uncond", "cond") if parts == 2 else tuple(f"part_{part}" for part in range(parts))
    return known or (None,)


def _known_parts(
    pipeline: Any, call: Mapping[str, Any], arguments: Mapping[str, Any], parts: int, samples: int
) -> tuple[str, ...] | None:
    """The branches of a guided batch by its texts, or else by the pipeline's source; None where neither tells."""
    by_text = _branches_of_texts(call, arguments, parts, samples)
    return by_text or _named_parts(type(pipeline).__call__).get(parts)


def _told_guidance(pipeline: Any, call: Mapping[str, Any]) -> bool | None:
    """True if the pipeline says that there is guidance; None where it says nothing."""
    # the passes that a guider has asked for in this step
    passes = call.get("guider_state")
    if isinstance(passes, (list, tuple)):
        return len(passes) > 1
    told = [call.get(name) for name in ("do_classifier_free_guidance", "do_true_cfg")]
    told.append(getattr(pipeline, "do_classifier_free_guidance", None))
    said = [value for value in told if isinstance(value, bool)]
    return any(said) if said else None


def _is_above_one(scale: Any) -> bool:
    return isinstance(scale, (int, float)) and scale > 1


def _has_negative_text(call: Mapping[str, Any]) -> bool:
    """True if the call holds the text of a pass without the prompt; a guidance that is embedded has none."""
    names = [name for name, value in call.items() if isinstance(value, Tensor)]
    return any("negative" in name and "embeds" in name for name in names)


def _is_perturbed(pipeline: Any, call: Mapping[str, Any]) -> bool:
    """True if the batch ends with the prompt's part once more, under perturbed attention."""
    name = "do_perturbed_attention_guidance"
    return call.get(name, getattr(pipeline, name, False)) is True


def _samples(call: Mapping[str, Any]) -> int | None:
    """The samples of one branch, None where no pipeline's call says it."""
    samples = call.get("batch_size")
    if not isinstance(samples, int) or samples < 1:
        return None
    images = next((call[name] for name in call if _PER_PROMPT.fullmatch(name)), None)
    latents = call.get("latents")
    # some pipelines count the images of a prompt in
    if isinstance(latents, Tensor) and latents.ndim > 0 and latents.shape[0] == samples:
        return samples
    return samples * int(images or 1)


def _branches_of_texts(
    call: Mapping[str, Any], arguments: Mapping[str, Any], parts: int, samples: int
) -> tuple[str, ...] | None:
    """The branches of a batch whose texts are a list, by the first one of each part; None where they can't be told."""
    for texts in arguments.values():
        if isinstance(texts, list) and len(texts) == parts * samples:
            found = [_branch_of(call, text) for text in texts[::samples]]
            if all(found):
                return tuple(name for name in found if name)
    return None


def _branch_of_text(call: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """The branch of a pass without a name, by the text that it is given: a tensor of all samples, or a list."""
    texts = [
        arguments.get("encoder_hidden_states"),
        *(value for value in arguments.values() if isinstance(value, list)),
    ]
    found = (_branch_of(call, text[0] if isinstance(text, list) and text else text) for text in texts)
    return next((name for name in found if name), None)


def _branch_of(call: Mapping[str, Any], text: Any) -> str | None:
    """The branch that is given a text, by what the pipeline's call calls it, or the list that it is in."""
    if not isinstance(text, Tensor):
        return None
    names = [name for name, value in call.items() if value is text or _holds(value, text)]
    if any("negative" in name or "uncond" in name for name in names):
        return "uncond"
    return "cond" if any("prompt_embeds" in name for name in names) else None


def _holds(value: Any, text: Tensor) -> bool:
    return isinstance(value, list) and any(entry is text for entry in value)


@cache
def _named_parts(function: Callable[..., Any]) -> dict[int, tuple[str, ...]]:
    """By the number of parts, the branches into which the source of a pipeline's call splits a prediction."""
    found: dict[int, tuple[str, ...]] = {}
    for node in ast.walk(source_tree(function)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
            continue
        whole = _taken_apart(node.value)
        if whole is None or _INPUTS.search(whole):
            continue
        names = [ast.unparse(target) for target in node.targets[0].elts]
        words = [next((word for word, pattern in _WORDS if re.search(pattern, name)), None) for name in names]
        if words.count("uncond") != 1 or (len(names) > 2 and words.count("cond") != 1):
            continue
        if len(names) == 2:
            words = [word if word == "uncond" else "cond" for word in words]
        found.setdefault(len(names), tuple(word or f"part_{part}" for part, word in enumerate(words)))
    return found


def _taken_apart(value: ast.expr) -> str | None:
    """The name x in x.chunk(...), x.split(...) and torch.split(x, ...); None for anything else."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return None
    if value.func.attr not in ("chunk", "split"):
        return None
    owner = ast.unparse(value.func.value)
    return ast.unparse(value.args[0]) if owner == "torch" and value.args else owner
