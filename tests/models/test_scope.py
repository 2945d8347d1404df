"""Scope on real diffusers models: what it records and edits is what the model does."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import AttnProcessor as EagerProcessor

import headscope
import tiny
from headscope import HeadEdit, Scope
from running import hooks, run


class SelfAttention(torch.nn.Module):
    """Attention without weights over [rows, tokens, 8]."""

    heads = 2

    def forward(self, tokens):
        query = tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)


class Packed(torch.nn.Module):
    """Two sequences without a dimension of samples, token after token; one after the other through one attention."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.embed = torch.nn.Embedding(16, 8)
        self.attend = SelfAttention()

    def forward(self, input_ids, other_ids):
        first, second = (self.embed(ids).unflatten(0, (self.rows, -1)) for ids in (input_ids, other_ids))
        return torch.cat([self.attend(first).flatten(), self.attend(second).flatten()])


# found by its key, as libraries beside diffusers find it
BY_NAME = {"sdpa": lambda tokens: functional.scaled_dot_product_attention(tokens, tokens, tokens)}


class Elsewhere(torch.nn.Module):
    def forward(self, tokens):
        return BY_NAME["sdpa"](tokens)


class Halfway(torch.nn.Module):
    """One attention that is a site, and one whose code does not say that it is."""

    def __init__(self):
        super().__init__()
        self.encoder = Elsewhere()
        self.decoder = SelfAttention()

    def forward(self, tokens):
        return self.decoder(self.encoder(tokens))


def draw(pipeline, prompts=("a red fox", "a blue boat"), **options):
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np", **options}
    return pipeline(list(prompts), latents=latents, **options).images


def captured(unet, sample):
    """The query, key and value of every attention call, in order."""
    calls = []
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append((query, key, value))
        return stock(query, key, value, **options)

    functional.scaled_dot_product_attention = spy
    try:
        run(unet, sample)
    finally:
        functional.scaled_dot_product_attention = stock
    return calls


def test_sites_of_an_unconditional_model(unet):
    scope = Scope(unet)
    assert [site.name for site in scope.sites] == ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
    assert {(site.kind, site.heads, site.head_dim) for site in scope.sites} == {("self", 4, 8)}
    assert scope.unseen == ()


def test_sites_of_a_conditional_model(diffusion):
    kinds = {site.name.rsplit(".", 1)[1]: site.kind for site in Scope(diffusion).sites}
    assert kinds == {"attn1": "self", "attn2": "cross"}


def test_joint_attention_is_told_apart():
    assert {site.kind for site in Scope(tiny.sd3_transformer()).sites} == {"joint"}


def test_recording_leaves_the_output_as_it_was(unet, sample):
    stock = run(unet, sample)
    scope = Scope(unet)
    with scope.record("entropy", "logsumexp", "max_logit", "max_prob"):
        recorded = run(unet, sample)
    assert float((recorded - stock).abs().max()) <= 1e-5
    assert torch.equal(run(unet, sample), stock)
    assert hooks(unet) == 0


def test_recorded_entropies_equal_those_of_captured_queries_and_keys(unet, sample):
    calls = captured(unet, sample)
    scope = Scope(unet)
    with scope.record("entropy") as recording:
        run(unet, sample)
    table = recording.to_polars()
    assert len(table) == 2 * 3 * 4
    for site, (query, key, _) in zip(scope.sites, calls, strict=True):
        logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        rows = table.filter(table["site"].cast(str) == site.name).sort("sample", "head")
        assert rows["entropy_mean"].to_numpy() == pytest.approx(entropy.mean(-1).flatten().numpy(), abs=1e-4)
        assert rows["entropy_std"].to_numpy() == pytest.approx(
            entropy.std(-1, correction=0).flatten().numpy(), abs=1e-4
        )
        normalised = entropy.mean(-1).flatten().numpy() / np.log(key.shape[2])
        assert rows["entropy_normalised_mean"].to_numpy() == pytest.approx(normalised, abs=1e-4)
        assert set(rows["keys"]) == {key.shape[2]}
        assert set(rows["queries"]) == {query.shape[2]}


def test_removing_a_head_equals_zeroing_its_slice_by_hand(unet, sample):
    scope = Scope(unet)
    for site in scope.sites:
        module = unet.get_submodule(site.name)
        for head in range(site.heads):
            dims = slice(head * site.head_dim, (head + 1) * site.head_dim)

            def zero_slice(module, args, dims=dims):
                hidden = args[0].clone()
                hidden[..., dims] = 0
                return (hidden, *args[1:])

            handle = module.to_out[0].register_forward_pre_hook(zero_slice)
            by_hand = run(unet, sample)
            handle.remove()
            with scope.edit({site.name: [head]}):
                edited = run(unet, sample)
            assert float((edited - by_hand).abs().max()) <= 1e-5
            assert float((edited - run(unet, sample)).abs().max()) > 1e-4


def test_a_batch_carries_a_different_edit_in_every_row(unet, sample):
    scope = Scope(unet)
    first, second = (site.name for site in scope.sites)
    edits = [{first: [0]}, {}, {first: [1, 2], second: [3]}]
    with scope.edit(edits):
        together = run(unet, sample)
    for row, edit in enumerate(edits):
        with scope.edit(edit):
            alone = run(unet, sample[row : row + 1])
        assert float((together[row] - alone[0]).abs().max()) <= 1e-5


def test_fills(unet, sample):
    scope = Scope(unet)
    site = scope.sites[0]
    query, key, value = captured(unet, sample)[0]
    output = functional.scaled_dot_product_attention(query, key, value)
    expected = {
        "mean": output.mean(0, keepdim=True),
        "uniform": value.mean(2, keepdim=True),
    }
    with scope.record("head_output") as reference:
        run(unet, sample)
    for name, fill in (("mean", reference), ("uniform", "uniform")):
        with scope.edit({site.name: [2]}, fill=fill):
            filled = run(unet, sample)
        with scope.edit({site.name: HeadEdit(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), expected[name])}):
            by_tensor = run(unet, sample)
        assert float((filled - by_tensor).abs().max()) <= 1e-5, name
        with scope.edit({site.name: [2]}):
            assert float((filled - run(unet, sample)).abs().max()) > 1e-4, name


def test_mean_head_outputs_survive_safetensors_names(unet, sample):
    scope = Scope(unet)
    with scope.record("head_output") as reference:
        run(unet, sample)
        run(unet, sample, timestep=9)
    loaded = headscope.Recording.from_tensors(reference.to_tensors())
    for timestep in (7, 9):
        for site in scope.sites:
            key = (site.name, 0, float(timestep), None)
            assert torch.equal(loaded.mean_head_output(*key), reference.mean_head_output(*key))
    with pytest.raises(KeyError, match="recorded timesteps there"):
        loaded.mean_head_output(scope.sites[0].name, 0, 8.0, None)


def test_pipeline_calls_know_steps_timesteps_and_branches(diffusion):
    stock = draw(diffusion)
    scope = Scope(diffusion)
    with scope.record("entropy") as recording:
        recorded = draw(diffusion)
    assert np.abs(recorded - stock).max() <= 1e-5
    assert np.array_equal(draw(diffusion), stock)
    table = recording.to_polars()
    assert table["step"].unique().sort().to_list() == [0, 1, 2]
    steps = dict(table.select("step", "timestep").unique().iter_rows())
    assert [steps[step] for step in range(3)] == [float(t) for t in diffusion.scheduler.timesteps]
    assert sorted(table["branch"].unique().cast(str)) == ["cond", "uncond"]
    assert table["sample"].unique().sort().to_list() == [0, 1]
    with scope.record("entropy") as unguided:
        draw(diffusion, guidance_scale=1.0)
    assert unguided.to_polars()["branch"].null_count() == len(unguided.to_polars())


def test_the_conditional_branch_is_the_one_that_sees_the_prompt(diffusion):
    """Cross-attention of the unconditional half doesn't change with the prompt; the other half's does."""
    scope = Scope(diffusion)
    entropies = {}
    for prompt in ("a red fox", "fourteen blue boats at sea"):
        with scope.record("entropy") as recording:
            draw(diffusion, prompts=(prompt,), num_inference_steps=1)
        table = recording.to_polars()
        table = table.filter(
            table["site"].cast(str).str.ends_with("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
        )
        for branch in ("cond", "uncond"):
            rows = table.filter(table["branch"].cast(str) == branch).sort("head")
            entropies[prompt, branch] = rows["entropy_mean"].to_numpy()
    first, second = "a red fox", "fourteen blue boats at sea"
    assert np.allclose(entropies[first, "uncond"], entropies[second, "uncond"], atol=1e-6)
    assert not np.allclose(entropies[first, "cond"], entropies[second, "cond"], atol=1e-6)


def test_edits_hit_both_branches_and_only_their_steps(diffusion):
    scope = Scope(diffusion)
    site = next(site for site in scope.sites if site.kind == "self").name
    stock = draw(diffusion)
    with scope.edit({site: [0]}, steps=range(0)):
        assert np.abs(draw(diffusion) - stock).max() <= 1e-5
    with scope.edit([{site: [0]}, {}]):
        edited = draw(diffusion)
    assert np.abs(edited[0] - stock[0]).max() > 1e-5
    assert np.abs(edited[1] - stock[1]).max() <= 1e-5
    with scope.edit({site: [0]}, steps=range(2, 3)):
        late = draw(diffusion)
    assert np.abs(late - stock).max() > 1e-6
    assert not np.allclose(late[0], edited[0], atol=1e-6)


def test_processors_changed_since_the_scope_was_made_are_noticed(sample):
    model = tiny.ddpm().unet
    scope = Scope(model)
    name = scope.sites[1].name
    model.get_submodule(name).set_processor(EagerProcessor())
    with pytest.raises(ValueError, match="can't be seen"), scope.record("entropy"):
        pass
    with pytest.raises(KeyError, match="can't be seen"), scope.edit({name: [0]}):
        pass


def test_attention_that_goes_another_way_inside_a_context_is_an_error(sample):
    """Nothing is ever recorded silently less."""
    model = tiny.ddpm().unet
    scope = Scope(model)
    with scope.record("entropy"):
        model.get_submodule(scope.sites[1].name).set_processor(EagerProcessor())
        with pytest.raises(RuntimeError, match="ran without torch's scaled_dot_product_attention"):
            run(model, sample)


def test_a_list_of_edits_is_by_sample_and_never_by_branch(diffusion):
    scope = Scope(diffusion)
    site = scope.sites[0].name
    with pytest.raises(ValueError, match="edits: got 4 rows"), scope.edit([{site: [0]}, {}, {}, {}]):
        draw(diffusion)


def test_steps_are_counted_from_the_recording_context(unet, sample):
    scope = Scope(unet)
    with scope.edit({scope.sites[0].name: [0]}):
        run(unet, sample)
        with scope.record("entropy") as recording:
            run(unet, sample)
    assert set(recording.to_polars()["step"]) == {0}


def test_a_denoiser_called_directly_has_no_branches(diffusion):
    """The pipeline remembers its last guidance scale, which says nothing of other calls."""
    draw(diffusion)
    scope = Scope(diffusion)
    with scope.record("entropy") as recording, torch.inference_mode():
        diffusion.unet(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 7, 32))
    assert recording.to_polars()["branch"].null_count() == len(recording.to_polars())


def test_a_second_denoiser_is_said_to_be_unseen(unet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Scope(SimpleNamespace(unet=unet, transformer_2=None, same=unet))
    with pytest.warns(UserWarning, match="SimpleNamespace has another denoiser, 'unet_2', whose attention"):
        Scope(SimpleNamespace(unet=unet, unet_2=tiny.ddpm().unet))


def test_what_cannot_be_seen_is_said(sample):
    model = tiny.ddpm().unet
    name = "mid_block.attentions.0"
    model.get_submodule(name).set_processor(EagerProcessor())
    scope = Scope(model)
    assert [entry.name for entry in scope.unseen] == [name]
    with pytest.raises(ValueError, match=f"can't be seen.*\n.*{name}"), scope.record("entropy"):
        pass
    with pytest.raises(KeyError, match="can't be seen"), scope.edit({name: [0]}):
        pass
    with scope.record("entropy", sites=["down_blocks.1.attentions.0"]) as recording:
        run(model, sample)
    assert len(recording) == 1


def test_a_packed_sequence_is_one_sample():
    torch.manual_seed(0)
    model = Packed(rows=1)
    ids = torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6])
    with torch.inference_mode(), Scope(model).record("entropy", "q", reduce=None) as recording:
        model(*ids)
    table = recording.to_polars()
    assert list(table.select("call", "sample", "head", "queries").iter_rows()) == [
        (call, 0, head, queries) for call, queries in enumerate((2, 4)) for head in range(2)
    ]
    for call, own in enumerate(ids):
        query = model.embed(own).detach().unflatten(-1, (2, -1)).transpose(0, 1).double()
        entropy = torch.special.entr((query @ query.mT / query.shape[-1] ** 0.5).softmax(-1)).sum(-1)
        recorded = table.filter(table["call"] == call)["entropy_mean"].to_numpy()
        assert np.allclose(recorded, entropy.mean(-1).numpy(), atol=1e-5)


def test_samples_that_cannot_be_told_apart_are_refused():
    model, ids = Packed(rows=2), torch.arange(4)
    message = "site 'attend' calls attention on 2 rows, expected 1: .* no dimension"
    with Scope(model).record("entropy"), pytest.raises(ValueError, match=message):
        model(ids, ids)


def test_attention_outside_of_every_site_is_left_out_by_naming_sites():
    model = Halfway()
    scope = Scope(model)
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    stock = model(tokens)
    assert [site.name for site in scope.sites] == ["decoder"]
    message = r"Halfway calls attention outside of scope.sites, in 'encoder' \(Elsewhere\).*name the sites"
    with scope.record("entropy"), pytest.raises(RuntimeError, match=message):
        model(tokens)
    for sites in ("*", ["decoder"]):
        with scope.record("entropy", sites=sites) as recording:
            assert torch.allclose(model(tokens), stock, atol=1e-6)
        assert len(recording) == 1
    # the recording of all sites is refused also where another one names its sites
    with scope.record("entropy", sites="*"), scope.record("entropy"), pytest.raises(RuntimeError, match=message):
        model(tokens)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda s: s.record("entropi"), ValueError, "statistics: got 'entropi'"),
        (lambda s: s.record(), ValueError, "statistics: got none"),
        (lambda s: s.record("entropy", sites=["nowhere"]), KeyError, "site: got 'nowhere'"),
        (lambda s: s.record("entropy", sites=[]), ValueError, "sites: got none"),
        (lambda s: s.record("entropy", sites=iter(())), ValueError, "sites: got none"),
        (lambda s: s.record("entropy", sites=5), TypeError, "sites: got 5"),
        (lambda s: s.record_tokens("a", sites=[5]), TypeError, r"sites: got \[5\]"),
        (lambda s: s.record("entropy", into=3), TypeError, "into: got int"),
        (lambda s: s.record("head_output", reduce="max"), ValueError, "reduce: got 'max'"),
        (lambda s: s.edit({"nowhere": [0]}), KeyError, "site: got 'nowhere'"),
        (lambda s: s.edit({"mid_block.attentions.0": [4]}), ValueError, "got head 4, expected 0 to 3"),
        (lambda s: s.edit({"mid_block.attentions.0": [0]}, fill="average"), ValueError, "fill: got 'average'"),
        (lambda s: s.edit([]), ValueError, "edits: got an empty sequence"),
        (lambda s: s.edit({"mid_block.attentions.0": [True, False]}), TypeError, "got head True of type bool"),
        (lambda s: s.record_tokens("a", heads={"mid*": [-1]}), ValueError, "got head -1, expected 0 to 3"),
        (lambda s: s.record_tokens("a", heads={"mid*": [1, 1]}), ValueError, "expected some heads, each once"),
        (lambda s: s.record_tokens("a", heads={"mid*": []}), ValueError, "expected some heads, each once"),
        (lambda s: s.record_tokens("a", heads={"mid*": 1}), TypeError, "got int, expected heads' numbers"),
        (lambda s: s.record_tokens("a", sites="down*", heads={"mid*": [1]}), ValueError, "not among the sites"),
        (lambda s: s.edit({"mid_block.attentions.0": [0]}, steps=3), TypeError, "steps: got int"),
        (lambda s: s.edit({"mid_block.attentions.0": HeadEdit()}), ValueError, "HeadEdit without a gate"),
    ],
)
def test_bad_requests_get_one_clear_error(unet, act, error, message):
    with pytest.raises(error, match=message), act(Scope(unet)):
        pass


def test_a_batch_of_another_size_is_refused(unet, sample):
    scope = Scope(unet)
    with pytest.raises(ValueError, match="edits: got 2 rows"), scope.edit([{scope.sites[0].name: [0]}, {}]):
        run(unet, sample)


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match="no attention site"):
        Scope(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="pipeline_or_model: got str"):
        Scope("stable-diffusion")
