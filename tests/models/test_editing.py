"""Edits: by pattern, as functions, from recordings, of queries, keys and values, several at once."""

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import PNDMScheduler

from headscope import HeadEdit, Patch, Recording, Scope, Where, attention
from running import run


def draw(pipeline, prompts=("a red fox", "a blue boat"), **options):
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent", **options}
    return pipeline(list(prompts), latents=latents, **options).images


def largest(a, b):
    return float((a - b).abs().max())


def test_patterns(unet, sample):
    scope = Scope(unet)
    with scope.edit({site.name: [1] for site in scope.sites}):
        expected = run(unet, sample)
    with scope.edit({"*": [1]}):
        assert torch.equal(run(unet, sample), expected)
    with scope.record("entropy", sites="mid_block*") as recording:
        run(unet, sample)
    assert set(recording.to_polars()["site"].cast(str)) == {"mid_block.attentions.0"}
    with pytest.raises(KeyError, match="expected a pattern of"), scope.edit({"*.attn2": [0]}):
        pass


@pytest.mark.parametrize("field", ["temperature", "key_bias", "key_scale"])
def test_the_other_fields_of_an_edit(unet, sample, field):
    """The site's attention under the edit equals the operator on its queries, keys and values."""
    scope = Scope(unet)
    site = scope.sites[0]
    generator = torch.Generator().manual_seed(0)
    shape = (3, site.heads) if field == "temperature" else (3, 1, 64)
    edit = HeadEdit(**{field: torch.rand(shape, generator=generator) + 0.5})
    with scope.edit({site.name: edit}), scope.record("q", "k", "v", "head_output", reduce=None) as recording:
        run(unet, sample)
    query, key, value, output = (recording.samples(x, site.name, 0, 7) for x in ("q", "k", "v", "head_output"))
    expected = attention(query, key, value, edit=edit, backend="reference").output
    assert largest(output, expected) <= 1e-5
    assert largest(output, attention(query, key, value).output) > 1e-4


def test_functions_are_asked_about_every_sample_branch_and_step(diffusion):
    scope = Scope(diffusion)
    site = next(site for site in scope.sites if site.kind == "self")
    asked: list[Where] = []

    def choose(where):
        asked.append(where)
        return [0] if where.branch == "cond" and where.sample == 1 and where.step == 1 else None

    with scope.edit({site.name: choose}):
        by_function = draw(diffusion)
    with scope.edit([{}, {site.name: [0]}], steps=range(1, 2), branches=["cond"]):
        expected = draw(diffusion)
    assert largest(by_function, expected) <= 1e-5
    assert largest(expected, draw(diffusion)) > 1e-6
    timesteps = [float(t) for t in diffusion.scheduler.timesteps]
    assert [(w.step, w.timestep, w.branch, w.sample) for w in asked] == [
        (step, timesteps[step], branch, sample)
        for step in range(2)
        for branch in ("uncond", "cond")
        for sample in range(2)
    ]


def test_branches(diffusion):
    scope = Scope(diffusion)
    site = scope.sites[0].name
    results = []
    for branches in (["cond"], ["uncond"], ["cond", "uncond"], None):
        with scope.edit({site: [0]}, branches=branches):
            results.append(draw(diffusion))
    assert torch.equal(results[2], results[3])
    assert min(largest(results[0], results[1]), largest(results[0], results[2])) > 1e-6


def test_patching_all_of_a_head_gives_the_other_prompts_output(diffusion):
    """Queries, keys and values of another run give that run's head output; its output as a fill does the same."""
    scope = Scope(diffusion)
    site = next(site for site in scope.sites if site.kind == "cross").name
    with scope.record("q", "k", "v", "head_output", sites=[site], reduce=None) as source:
        draw(diffusion, num_inference_steps=1)
    patch = Patch([2], q=source, k=source, v=source)
    prompts = ("a green tree", "a cat")
    with scope.edit({site: patch}), scope.record("head_output", sites=[site], reduce=None) as patched:
        by_patch = draw(diffusion, prompts, num_inference_steps=1)
    with scope.edit({site: [2]}, fill=source):
        by_fill = draw(diffusion, prompts, num_inference_steps=1)
    assert largest(by_patch, by_fill) <= 1e-5
    assert largest(by_patch, draw(diffusion, prompts, num_inference_steps=1)) > 1e-6
    timestep = float(diffusion.scheduler.timesteps[0])
    for branch in ("cond", "uncond"):
        got, wanted = (r.samples("head_output", site, 0, timestep, branch) for r in (patched, source))
        assert largest(got[:, 2], wanted[:, 2]) <= 1e-5
    got, wanted = (r.samples("head_output", site, 0, timestep, "cond") for r in (patched, source))
    assert largest(got[:, 0], wanted[:, 0]) > 1e-5


def test_values_alone_are_patched(unet, sample):
    scope = Scope(unet)
    site = scope.sites[1]
    other = torch.randn(1, site.heads, 64, site.head_dim, generator=torch.Generator().manual_seed(2))
    with (
        scope.edit({site.name: Patch(v=other)}),
        scope.record("q", "k", "v", "head_output", reduce=None) as recording,
    ):
        run(unet, sample)
    query, key, value, output = (recording.samples(x, site.name, 0, 7) for x in ("q", "k", "v", "head_output"))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, other.expand_as(value))
    assert largest(output, expected) <= 1e-5
    # the recording tells what the model itself had
    assert largest(value, other.expand_as(value)) > 0.1


def test_resampling_from_other_samples(unet, sample):
    scope = Scope(unet)
    site = scope.sites[0]
    with scope.record("head_output", sites=[site.name], reduce=None) as recording:
        run(unet, sample)
    outputs = recording.samples("head_output", site.name, 0, 7)
    with scope.edit({site.name: [3]}, fill=recording.take([2, 0, 1])):
        resampled = run(unet, sample)
    with scope.edit({site.name: [3]}, fill=outputs[[2, 0, 1]]):
        assert torch.equal(run(unet, sample), resampled)
    with scope.edit({site.name: [3]}, fill=recording.take([1])):
        single = run(unet, sample)
    with scope.edit({site.name: [3]}, fill=outputs[1:2]):
        assert largest(run(unet, sample), single) <= 1e-6
    with scope.edit({site.name: [3]}, fill=recording):
        assert largest(run(unet, sample), run_unedited(scope, unet, sample)) <= 1e-5
    with pytest.raises(ValueError, match="of its 3 samples"), scope.edit({site.name: [0]}, fill=recording.take([5])):
        run(unet, sample)


def test_steps_of_one_timestep_are_patched_with_their_own(diffusion):
    """PNDM's schedule has a timestep twice. What a run had, put into its own steps, changes nothing."""
    scheduler = PNDMScheduler.from_config(diffusion.scheduler.config, skip_prk_steps=True)
    pipeline = diffusion.from_pipe(diffusion, scheduler=scheduler)
    scope = Scope(pipeline)
    with scope.record("head_output", "q", reduce=None) as recording:
        stock = draw(pipeline, num_inference_steps=3)
    timesteps = pipeline.scheduler.timesteps.tolist()
    twice = max(timesteps, key=timesteps.count)
    first, second = (recording.samples("q", scope.sites[0].name, 0, twice, "cond", visit) for visit in (0, 1))
    assert first.shape == second.shape
    assert largest(first, second) > 1e-6
    mean = recording.mean("q", scope.sites[0].name, 0, twice, "cond")
    assert largest(mean, torch.cat([first, second]).mean(0)) <= 1e-6
    for change, fill in (([0], recording), (Patch(q=recording), None)):
        with scope.edit({"*": change}, fill=fill):
            assert largest(draw(pipeline, num_inference_steps=3), stock) <= 1e-6


def test_of_several_runs_the_one_that_is_meant_is_named(unet, sample):
    scope = Scope(unet)
    name = scope.sites[0].name
    with scope.record("head_output", reduce=None) as recording:
        run(unet, sample[:1])
        run(unet, sample[1:2])
    message = r"it has 2 samples of head_output .*, and the batch 1; say which with recording\.take"
    with pytest.raises(ValueError, match=message), scope.edit({name: [0]}, fill=recording):
        run(unet, sample[1:2])
    with scope.edit({name: [0]}, fill=recording.take([1])):
        assert largest(run(unet, sample[1:2]), run_unedited(scope, unet, sample[1:2])) <= 1e-6
    for bad, error in (([-1], ValueError), ([], ValueError), ([True], TypeError), ("01", TypeError)):
        with pytest.raises(error, match="samples: got"):
            recording.take(bad)


def test_a_mean_is_of_all_that_was_recorded_by_then(unet, sample):
    """Nothing older is kept where edits took it to."""
    scope = Scope(unet)
    site = scope.sites[0]

    def filled(fill):
        with scope.edit({site.name: [3]}, fill=fill):
            return run(unet, sample, 400)

    with scope.record("head_output", sites=[site.name]) as recording:
        run(unet, sample, 400)
    before = recording.mean("head_output", site.name, 0, 400)
    assert torch.equal(filled(recording), filled(before))
    with scope.record("head_output", sites=[site.name], into=recording):
        run(unet, 2 * sample, 400)
    after = recording.mean("head_output", site.name, 0, 400)
    assert largest(after, before) > 1e-3
    assert torch.equal(filled(recording), filled(after))


def test_a_mean_used_in_inference_mode_serves_a_backward_later(unet, sample):
    scope = Scope(unet)
    site = scope.sites[0]
    with scope.record("head_output", sites=[site.name]) as recording:
        run(unet, sample)
    with torch.inference_mode(), scope.edit({site.name: [3]}, fill=recording):
        expected = run(unet, sample)
    gate = torch.ones(1, site.heads)
    gate[:, 3] = 0
    gate.requires_grad_()
    with scope.edit({site.name: HeadEdit(gate, recording)}):
        found = unet(sample, 7).sample
    assert largest(found.detach(), expected) <= 1e-5
    (gradient,) = torch.autograd.grad(found.sum(), gate)
    assert float(gradient.abs().max()) > 0


def run_unedited(scope, unet, sample):
    with scope.record("entropy"):
        return run(unet, sample)


def test_edits_compose_inner_after_outer(unet, sample):
    """output = g2 (g1 a + (1 - g1) f1) + (1 - g2) f2, whatever the fills are."""
    scope = Scope(unet)
    site = scope.sites[0]
    fill = torch.randn(1, site.heads, 64, site.head_dim, generator=torch.Generator().manual_seed(2))
    gates = torch.tensor([[0.0, 0.5, 1.0, 1.0]]), torch.tensor([[1.0, 0.25, 0.0, 1.0]])
    first, second = HeadEdit(gates[0], fill), HeadEdit(gates[1], "uniform")
    hot = HeadEdit(temperature=torch.tensor([[1.0, 1.0, 1.0, 3.0]]))
    with (
        scope.edit({site.name: [first, hot]}),
        scope.edit({site.name: [second, hot]}),
        scope.record("q", "k", "v", "head_output", reduce=None) as recording,
    ):
        run(unet, sample)
    query, key, value, output = (recording.samples(x, site.name, 0, 7) for x in ("q", "k", "v", "head_output"))
    own = attention(query, key, value, edit=HeadEdit(temperature=torch.tensor([[1.0, 1.0, 1.0, 9.0]]))).output
    uniform = value.mean(2, keepdim=True)
    one, two = (gate[..., None, None] for gate in gates)
    expected = two * (one * own + (1 - one) * fill) + (1 - two) * uniform
    assert largest(output, expected) <= 1e-5


def test_rows_may_differ_in_kind(unet, sample):
    scope = Scope(unet)
    first, second = (site.name for site in scope.sites)
    edits = [
        {first: HeadEdit(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), "uniform")},
        {first: [1], second: HeadEdit(temperature=torch.tensor([[2.0, 1.0, 1.0, 1.0]]))},
        {second: Patch([0], v=torch.zeros(1, 1, 1, 1))},
    ]
    with scope.edit(edits):
        together = run(unet, sample)
    for row, edit in enumerate(edits):
        with scope.edit(edit):
            alone = run(unet, sample[row : row + 1])
        assert largest(together[row], alone[0]) <= 1e-5


def test_a_rows_edits_are_made_in_their_own_order(unet, sample):
    """The last fill of a head is the one that is left."""
    name = Scope(unet).sites[0].name
    one, two = (HeadEdit(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), torch.tensor([level])) for level in (1.0, 2.0))
    lists = ([one, two], [two, one], [one, two, one])
    with Scope(unet).edit([{name: own} for own in lists]):
        together = run(unet, sample)
    for row, last in enumerate((two, one, one)):
        with Scope(unet).edit({name: last}):
            assert largest(run(unet, sample)[row], together[row]) <= 1e-6
    with Scope(unet).edit({name: one}):
        assert largest(run(unet, sample)[0], together[0]) > 1e-4


def test_a_function_gives_a_samples_own_row(unet, sample):
    scope = Scope(unet)
    gate = torch.ones(3, 4)
    gate[1, 0] = 0
    message = r"edits\['down_blocks.1.attentions.0'\]\(Where.*got a HeadEdit of several rows"
    with pytest.raises(TypeError, match=message), scope.edit({scope.sites[0].name: lambda where: HeadEdit(gate)}):
        run(unet, sample)
    with scope.edit({scope.sites[0].name: lambda where: HeadEdit(gate[where.sample][None])}):
        found = run(unet, sample)
    with scope.edit({scope.sites[0].name: HeadEdit(gate)}):
        assert torch.equal(run(unet, sample), found)


def test_heads_are_numbers_of_numpys_too(unet, sample):
    scope = Scope(unet)
    with scope.edit({"*": np.array([0, 3])}):
        found = run(unet, sample)
    with scope.edit({"*": [0, 3]}):
        assert torch.equal(run(unet, sample), found)


def test_an_edit_used_in_inference_mode_serves_a_backward_later(unet, sample):
    scope = Scope(unet)

    def gradient():
        leaf = sample.clone().requires_grad_()
        (found,) = torch.autograd.grad(unet(leaf, 7, return_dict=False)[0].square().sum(), leaf)
        return found

    with scope.edit({"*": [0]}):
        expected = gradient()
    with scope.edit({"*": [0]}):
        run(unet, sample)
        assert torch.equal(gradient(), expected)


class Grouped(torch.nn.Module):
    """Attention whose heads share keys and values: [batch, tokens, 16]."""

    heads = 4

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, tokens, timestep=None):
        query = tokens.unflatten(-1, (4, 4)).transpose(1, 2)
        key = query[:, : self.groups]
        output = torch.nn.functional.scaled_dot_product_attention(query, key, 2 * key, enable_gqa=True)
        return output.transpose(1, 2).flatten(2)


class Holder(torch.nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.attention = Grouped(groups)

    def forward(self, tokens, timestep=None):
        return self.attention(tokens)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("heads", [[1], [0, 3], [2, 3], None])
def test_keys_of_grouped_heads_are_patched_for_those_heads_alone(groups, heads):
    tokens, other = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(2))
    model = Holder(groups)
    scope = Scope(model)
    with scope.record("k", "v", reduce=None) as recording:
        model(other)
    stock = model(tokens).unflatten(-1, (4, 4))
    query = tokens.unflatten(-1, (4, 4)).transpose(1, 2)
    key = other.unflatten(-1, (4, 4)).transpose(1, 2)[:, :groups].repeat_interleave(4 // groups, 1)
    patched = {
        "k": attention(query, key, 2 * query[:, :groups].repeat_interleave(4 // groups, 1)).output.transpose(1, 2),
        "v": attention(query, query[:, :groups].repeat_interleave(4 // groups, 1), 2 * key).output.transpose(1, 2),
    }
    chosen = range(4) if heads is None else heads
    for quantity, wanted in patched.items():
        with scope.edit({"attention": Patch(heads, **{quantity: recording})}):
            found = model(tokens).unflatten(-1, (4, 4))
        for head in range(4):
            expected = wanted if head in chosen else stock
            assert largest(found[:, :, head], expected[:, :, head]) <= 1e-5
    with pytest.raises(ValueError, match="patch: got k of shape"), scope.edit({"*": Patch(k=torch.zeros(1, 3, 5, 4))}):
        model(tokens)


def test_muted_keys_are_none_that_a_row_may_see(unet, sample):
    """The normalised entropy of rows that see two keys of 64 alike is 1."""
    scope = Scope(unet)
    name = scope.sites[0].name
    bias = torch.full((1, 1, 64), -torch.inf)
    bias[..., :2] = 0
    with scope.edit({name: HeadEdit(key_bias=bias)}), scope.record("entropy", reduce=None) as recording:
        run(unet, sample)
    table = recording.to_polars().filter(pl.col("site") == name)
    normalised = np.stack(table["entropy"].to_list()) / np.log(2)
    assert table["entropy_normalised_mean"].to_numpy() == pytest.approx(normalised.mean(1), abs=1e-5)
    other = recording.to_polars().filter(pl.col("site") != name)
    assert other["entropy_normalised_mean"].to_numpy() == pytest.approx(other["entropy_mean"].to_numpy() / np.log(64))


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"mid_block.attentions.0": Patch()}, ValueError, "a Patch of nothing"),
        ({"mid_block.attentions.0": 3}, TypeError, "got int, expected heads"),
        ({"mid_block.attentions.0": "03"}, TypeError, "got str, expected heads"),
        ({"mid_block.attentions.0": ["a"]}, TypeError, "got str, expected heads"),
        ({"mid_block.attentions.0": torch.tensor([1])}, TypeError, "got Tensor, expected heads"),
        ({"mid_block.attentions.0": HeadEdit(torch.ones(1, 3))}, ValueError, r"got gate of shape \[1, 3\], expected"),
        ({"mid_block.attentions.0": HeadEdit(key_bias=torch.ones(1, 64))}, ValueError, r"key_bias of shape \[1, 64\]"),
        ({"mid_block.attentions.0": HeadEdit([1.0] * 4)}, TypeError, "got gate of type list"),
        ({"mid_block.attentions.0": HeadEdit(torch.ones(1, 4), np.zeros(4))}, ValueError, "fill: got array"),
        ({"mid_block.attentions.0": Patch(q=np.zeros(4))}, TypeError, "got q of type ndarray, expected a tensor"),
        ({"mid_block.attentions.0": Patch(q=Recording((), ("k",)))}, ValueError, "got a Recording without q"),
        ({"mid_block.attentions.0": Patch(v=torch.ones(1, 1, 1, 1, 1))}, ValueError, "got v of shape .*at most 4"),
        ({"mid_block.attentions.0": Patch(3, q=torch.zeros(1))}, TypeError, "got int, expected heads"),
        ({0: [1]}, TypeError, "got a key of type int, expected names"),
        ("mid_block.attentions.0", TypeError, "edits: got str, expected a mapping"),
        (["mid_block.attentions.0"], TypeError, r"edits\[0\]: got str, expected a mapping"),
        (None, TypeError, "edits: got NoneType, expected a mapping"),
        ({"mid_block.attentions.0": HeadEdit(torch.ones(1, 4), "average")}, ValueError, "fill: got 'average'"),
        (
            [{"mid_block.attentions.0": HeadEdit(torch.ones(2, 4))}, {}],
            TypeError,
            "expected one row where edits differ",
        ),
    ],
)
def test_bad_edits_get_one_clear_error(unet, edits, error, message):
    with pytest.raises(error, match=message), Scope(unet).edit(edits):
        pass
