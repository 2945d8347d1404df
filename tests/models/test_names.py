"""Names of branches, steps, sites, samples that aren't there are errors that list what there is."""

import pytest
import torch

from headscope import Scope
from headscope.models.hooks.branches import BRANCHES


@pytest.fixture(scope="module")
def site(diffusion):
    return Scope(diffusion).sites[0].name


def draw(pipeline, guidance=5.0, **options):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "latent", **options}
    return pipeline("a red fox", latents=latents, **options).images


@pytest.mark.parametrize("branches", [("conditional",), "conditional", ("cond", "both"), ["part_"], ()])
def test_unknown_branches_are_refused_before_the_model_runs(diffusion, site, branches):
    with (
        pytest.raises(ValueError, match=f"branches: .*{', '.join(BRANCHES)}"),
        Scope(diffusion).edit({site: [0]}, branches=branches),
    ):
        raise AssertionError("the context was entered")


def test_a_single_branch_needs_no_sequence(diffusion, site):
    scope, images = Scope(diffusion), []
    for branches in ("cond", ("cond",), "uncond"):
        with scope.edit({site: [0]}, branches=branches):
            images.append(draw(diffusion))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_branches_that_are_no_names(diffusion, site):
    scope = Scope(diffusion)
    for branches, said in ((3, "got int"), ((1,), "got an entry of type int")):
        with pytest.raises(TypeError, match=f"branches: {said}"), scope.edit({site: [0]}, branches=branches):
            pass


def test_a_branch_that_never_ran_is_an_error_at_the_end(diffusion, site):
    scope = Scope(diffusion)
    with pytest.raises(ValueError, match=r"'perturbed', which never ran .* uncond, cond$"):  # noqa: SIM117
        with scope.edit({site: [0]}, branches=("cond", "perturbed")):
            draw(diffusion)
    with pytest.raises(ValueError, match=r"'uncond', which never ran .* no guidance \(which counts as \"cond\"\)$"):  # noqa: SIM117
        with scope.edit({site: [0]}, branches="uncond"):
            draw(diffusion, guidance=1.0)
    # the model's own error comes first; and where nothing ran, nothing is missing
    with pytest.raises(ZeroDivisionError), scope.edit({site: [0]}, branches="perturbed"):
        print(draw(diffusion).shape[0] / 0)
    with scope.edit({site: [0]}, branches="perturbed"):
        pass
    # the scope is as it was
    with scope.edit({site: [0]}, branches="cond"):
        draw(diffusion, guidance=1.0)


def test_steps_that_never_ran_are_an_error_at_the_end(diffusion, site):
    scope = Scope(diffusion)
    for context in (
        lambda: scope.edit({site: [0]}, steps=range(5, 9)),
        lambda: scope.record_tokens("a red fox", steps=range(5, 9)),
    ):
        with pytest.raises(ValueError, match=r"steps: got range\(5, 9\), none of which ran .* steps 0 to 1$"):  # noqa: SIM117
            with context():
                draw(diffusion)
    for context in (
        lambda: scope.edit({site: [0]}, steps=[0, 1]),
        lambda: scope.record_tokens("a red fox", steps=[0, 1]),
    ):
        with pytest.raises(TypeError, match="steps: got list"), context():
            pass


def test_what_was_recorded_is_listed(diffusion, site):
    scope = Scope(diffusion)
    with (
        scope.record("entropy", sites=[site], reduce=None) as recording,
        scope.record("head_output", sites=[site]) as means,
        scope.record_tokens("a red fox") as maps,
    ):
        draw(diffusion)
    for wrong, listed in (
        ({"site": "mid"}, site),
        ({"step": 7}, "0, 1"),
        ({"sample": 1}, "0"),
        ({"branch": "both"}, "cond, uncond"),
        ({"frame": 2}, "None"),
        ({"call": 2}, "0"),
        ({"heads": [1, 4]}, "0, 1, 2, 3"),
        ({"statistic": "max_prob"}, "entropy"),
    ):
        asked = {"statistic": "entropy", "site": site, **wrong}
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .* {listed}$"):
            recording.plot(asked.pop("statistic"), asked.pop("site"), **asked)
    timestep = int(diffusion.scheduler.timesteps[0])
    with pytest.raises(KeyError, match=f"expected head_output at '{site}'"):
        means.mean("head_output", "mid", 0, timestep, "cond")
    with pytest.raises(KeyError, match="branches: cond, uncond"):
        means.mean("head_output", site, 0, timestep, "both")
    with pytest.raises(KeyError, match=maps.sites[0]):
        maps.map("fox", sites=["mid"])
    with pytest.raises(IndexError, match="sample: got 1, expected 0 to 0"):
        maps.map([0], sample=1)
    with pytest.raises(IndexError, match="sample: got -1, expected 0 to 0"):
        maps.tokens(-1)


def test_statistics_and_heads(diffusion, site):
    scope = Scope(diffusion)
    with pytest.raises(ValueError, match=r"got 'entropi', expected some of .*entropy.* head_output, q, k, v$"):  # noqa: SIM117
        with scope.record("entropi"):
            pass
    with pytest.raises(ValueError, match=r"heads\['.*'\]: got head 4, expected 0 to 3"):  # noqa: SIM117
        with scope.record_tokens("a red fox", heads={site: [0, 4]}):
            pass
