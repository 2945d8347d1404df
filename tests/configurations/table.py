"""Writes docs/coverage.md: which diffusers classes work, why the others don't, what hooks, guiders and PAG do to them.

PYTHONPATH=src:kernels:tests python -m configurations.table
"""

import sys
from pathlib import Path

import diffusers
import torch

from configurations import CASES
from configurations.examine import Examination, examine
from configurations.hooks import HOOKS, WITHOUT_HOOK_ENTRY
from configurations.perturbed import PERTURBED, PerturbedCase
from configurations.reach import WITHOUT_ENTRY, reaching_classes

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

_HEAD = f"""# Which diffusers classes work

Every public model class of diffusers {diffusers.__version__} from whose source torch's `scaled_dot_product_attention`
(SDPA) can be reached: {{classes}}. Each ran in a tiny random configuration on the CPU, stock and inside a `Scope`, and
was checked for:

- **output**: recording leaves the output as it was, to 1e-5 of its largest entry in float32 (or four times what two
  kernels of torch's own differ by, where a random model amplifies rounding more);
- **entropies**: those recorded, sample by sample and head by head, are those computed from the queries and keys that
  reached SDPA, to 1e-4 nats, and those of each sample when it runs alone;
- **calls**: every SDPA call is recorded, or the module is listed in `scope.unseen`;
- **removal**: removing a head gives what zeroing its slice of the attention output by hand gives.

All of it in batches of one, two and three samples, but for classes that take only one.

A module may call SDPA several times in one forward. `call` counts those from 0 in the order of the module's code
(`where.call` in an edit): the text, then each image prompt, under an IP-Adapter; the image, then the text, in Wan with
an image; the understanding tokens among themselves (causal), then the generated tokens over all, in Cosmos3. All calls
of a module are of its site's one `kind`.

A class that "never calls SDPA" has nothing to record: a `Scope` on it raises and says why. T5FilmDecoder asks for
unscaled logits, which diffusers computes with its eager processor; Kandinsky6SR and the LTX2 diffusion decoder attend
within windows that they express as masks for torch's flex attention.

"SDPA calls" counts those of one forward of two samples, "sites" the attention modules that a `Scope` finds; "-":
nothing to check.
`PYTHONPATH=src:kernels:tests python -m configurations.table` writes this page from `tests/configurations`.

| class | SDPA calls | sites | output | entropies | calls | removal | remarks |
|---|---|---|---|---|---|---|---|
"""
_HOOKS_HEAD = f"""## Hooks, caches and guiders

Every public hook, cache and guider of diffusers {diffusers.__version__}, for a few steps of a tiny model, without a
`Scope` and inside one. Where nothing is recorded or edited the outputs are the same bit by bit; and recording is

- **recorded**: every attention call is in the table;
- **reused**: what is computed is in the table, and what is taken from a cache or skipped is in `recording.reused`, by
  site, step and branch: the two together are every site in every step. Editing what a cache has kept raises;
- **refused**: something else stands in the place of a site's attention; recording or editing that site raises and
  names it.

| hook, cache or guider | a recording | how |
|---|---|---|
"""
_PERTURBED_HEAD = f"""## Perturbed-attention pipelines

Every `PAG` pipeline of diffusers {diffusers.__version__}, with and without guidance, without an IP-Adapter and, where
it takes one, with it, for one image, and for two prompts with two images of each. "recorded": every attention call of
the denoiser's sites is in the table, with the entropy of the queries and keys that reached SDPA, under the right step,
sample and branch: "uncond" (with guidance), "cond" and "perturbed". A head that is removed in one branch changes the
rows of no other.

A perturbed layer gives the perturbed branch its values as they are, without attention: the branch has no rows there,
and an edit of it at such layers alone raises. In Stable Diffusion 3 it attends, within a mask, and has rows. Where
`pag_adaptive_scale` brings the scale to nothing, diffusers runs the branch all the same, and it is recorded.

| pipeline | with guidance | without | with an IP-Adapter | remarks |
|---|---|---|---|---|
"""


def main() -> None:
    # tiny tensors are not worth threads
    torch.set_num_threads(1)
    lines = []
    for name, case in CASES.items():
        print(name, file=sys.stderr)
        lines.append(row(name, examine(name, case)))
    lines += [without_entry(name) for name in sorted(WITHOUT_ENTRY)]
    PAGE.write_text(head() + "\n".join(lines) + "\n\n" + sections())


def head() -> str:
    return _HEAD.format(classes=len(reaching_classes()))


def row(name: str, found: Examination) -> str:
    """The page's line for an entry."""
    marks = [_mark(getattr(found, check)) for check in ("output", "entropy", "recorded", "removal")]
    cells = [name, str(found.calls), str(found.sites), *marks, "; ".join(remarks(found))]
    return f"| {' | '.join(cells)} |"


def outcome(line: str) -> list[str]:
    """An entry's name and what came of it: the calls of a class may depend on how many samples there are."""
    name, _, *rest = line.split(" | ")
    return [name, *rest]


def without_entry(name: str) -> str:
    return f"| {name} | - | - | - | - | - | - | {WITHOUT_ENTRY[name]} |"


def sections() -> str:
    """The part of the page after the classes."""
    return f"{hooks()}\n{perturbed()}"


def perturbed() -> str:
    """The page's section on perturbed-attention pipelines."""
    return _PERTURBED_HEAD + "\n".join(_perturbed_row(name, case) for name, case in PERTURBED.items()) + "\n"


def _perturbed_row(name: str, case: PerturbedCase) -> str:
    unguided = "-" if case.unguided else "recorded"
    image_prompt = "recorded" if case.image_prompt else "takes none"
    return f"| {name} | recorded | {unguided} | {image_prompt} | {case.says} |"


def hooks() -> str:
    """The page's section on hooks, caches and guiders."""
    lines = [f"| {name} | {case.outcome} | {case.says} |" for name, case in HOOKS.items()]
    lines += [f"| {name} | - | {why} |" for name, why in sorted(WITHOUT_HOOK_ENTRY.items())]
    return _HOOKS_HEAD + "\n".join(lines) + "\n"


def remarks(found: Examination) -> list[str]:
    """The remarks on an entry: failures, what can't be seen, what attends outside of every site."""
    said = list(dict.fromkeys(found.problems().values()))
    said += [f"{count} unseen: {reason}" for reason, count in sorted(found.unseen.items())]
    said += [f"{count} outside of every site, in {kind}" for kind, count in sorted(found.outside.items())]
    if not found.calls:
        said.append("never calls SDPA")
    return [text.replace("|", "\\|") for text in said]


def _mark(outcome: str | None) -> str:
    if outcome is None:
        return "-"
    return "no" if outcome else "yes"


if __name__ == "__main__":
    main()
