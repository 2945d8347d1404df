"""Prompt-token maps, and statistics over the picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from headscope import GroupMass, Scope
from headscope.models.maps import label_tokens


@pytest.fixture(scope="module")
def diffusion():
    return tiny.stable_diffusion()


def draw(pipeline, prompts=("a red fox", "blue"), **options):
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np", **options}
    return pipeline(list(prompts), latents=latents, **options).images


def test_maps_are_the_means_of_the_attention_to_the_words(diffusion):
    """Against the operator's masses of every key, per head, site and step."""
    scope = Scope(diffusion)
    cross = [site.name for site in scope.sites if site.kind == "cross"]
    everyone = GroupMass(torch.arange(77), 77)
    with (
        scope.record_tokens(["a red fox", "blue"]) as maps,
        scope.record_tokens(["a red fox", "blue"], sites=cross[:1], heads={cross[0]: [1]}, steps=range(1, 2)) as some,
        scope.record(everyone, sites=cross, reduce=None) as recording,
    ):
        draw(diffusion)
    assert set(maps.sites) == set(cross)
    assert some.sites == (cross[0],)
    table = recording.to_polars()
    table = table.filter(table["branch"].cast(str) == "cond")

    def masses(rows, sample):
        chosen = rows.filter(rows["sample"] == sample)
        return np.mean([np.array(values).reshape(64, 77) for values in chosen["group_mass"]], 0)

    # the tokenizer's vocabulary is letters
    fox = [token.position for token in maps.tokens(0) if token.kind == "word"][-3:]
    assert [token.text for token in maps.tokens(0) if token.position in fox] == list("fox")
    assert maps.positions("fox") == fox
    first = table.filter(table["site"].cast(str) == cross[0])
    expected = masses(first, 0)[:, fox].sum(1).reshape(8, 8)
    assert maps.map("fox", sites=cross[:1]).numpy() == pytest.approx(expected, abs=1e-5)
    # coarser sites are resized to the finest; the mean keeps their mass
    every = np.mean([float(maps.map("fox", sites=[name]).mean()) for name in cross])
    assert maps.map("fox").shape == (8, 8)
    assert float(maps.map("fox").mean()) == pytest.approx(every, rel=0.02)
    own = first.filter((first["head"] == 1) & (first["step"] == 1))
    expected = masses(own, 1)[:, some.positions("blue", sample=1)].sum(1).reshape(8, 8)
    assert some.map("blue", sample=1).numpy() == pytest.approx(expected, abs=1e-5)


def test_marks_and_padding_stand_apart(diffusion):
    with Scope(diffusion).record_tokens("a red fox") as maps:
        draw(diffusion, ("a red fox",))
    kinds = [token.kind for token in maps.tokens()]
    assert kinds == ["start", *["word"] * 7, "end", *["padding"] * 68]
    whole = sum(maps.map(kind) for kind in ("start", "end", "padding")) + maps.map("a red fox")
    assert torch.allclose(whole, torch.ones(8, 8), atol=1e-5)
    with pytest.raises(ValueError, match="words: got 'dog'"):
        maps.map("dog")


def test_joint_attention_has_maps_too():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    scope = Scope(model)
    with scope.record_tokens("?") as maps, torch.inference_mode():
        model(**inputs)
    assert set(maps.sites) == {site.name for site in scope.sites}
    assert {token.kind for token in maps.tokens()} == {"unknown"}
    whole = maps.map(range(5))
    assert whole.shape == (4, 3)
    assert 0 < float(whole.min()) <= float(whole.max()) < 1


def test_tokens_of_two_encoders_follow_each_other():
    clip = tiny.tokenizer()

    class Letters:
        bos_token_id, eos_token_id, model_max_length = None, 1, 512

        def __call__(self, prompt, truncation, max_length):
            return SimpleNamespace(input_ids=[*(10 + ord(letter) for letter in prompt), 1][:max_length])

        def convert_ids_to_tokens(self, index):
            return chr(index - 10)

    pipeline = SimpleNamespace(tokenizer=clip, tokenizer_2=clip, tokenizer_3=Letters())
    labels = label_tokens(pipeline, "fox", 77 + 6)
    assert [token.kind for token in labels[:6]] == ["start", "word", "word", "word", "end", "padding"]
    assert [(token.text, token.kind) for token in labels[77:]] == [
        ("f", "word"),
        ("o", "word"),
        ("x", "word"),
        ("", "end"),
        ("", "padding"),
        ("", "padding"),
    ]


def test_plots(diffusion):
    scope = Scope(diffusion)
    site = scope.sites[0].name
    with scope.record_tokens("a red fox") as maps, scope.record("entropy", reduce=None) as recording:
        image = draw(diffusion, ("a red fox",))[0]
    figure = maps.plot("red", "fox", image=image)
    assert [trace.name for trace in figure.data[1:]] == ["red", "fox"]
    assert np.array_equal(figure.data[2].z, maps.map("fox").numpy())
    figure = recording.plot("entropy", site, heads=[2], step=1, branch="cond")
    table = recording.to_polars()
    row = table.filter(
        (table["site"].cast(str) == site)
        & (table["head"] == 2)
        & (table["step"] == 1)
        & (table["branch"].cast(str) == "cond")
    )
    assert np.array_equal(figure.data[0].z, np.array(row["entropy"][0]).reshape(8, 8))
    with pytest.raises(ValueError, match="reduce=None"):
        recording.plot("max_prob", site)
    with pytest.raises(ValueError, match="nothing was recorded"):
        recording.plot("entropy", site, step=9)


def test_two_statistics_of_one_name_are_told_apart(diffusion):
    scope = Scope(diffusion.unet)
    site = next(site.name for site in scope.sites if site.kind == "self")
    one, two = GroupMass(torch.arange(64) % 2, 2), GroupMass(torch.arange(64) % 3, 2)
    with (
        torch.inference_mode(),
        scope.record(one, sites=[site]),
        scope.record(two, sites=[site]),
        pytest.raises(ValueError, match="means different things"),
    ):
        diffusion.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32))
