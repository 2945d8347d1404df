"""Prompt-token maps, and statistics over the picture."""

import contextlib
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from headscope import GroupMass, Scope
from headscope.models.recording.tokens import label_tokens


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


class Letters:
    """A T5 of letters."""

    bos_token_id, eos_token_id, model_max_length = None, 1, 512

    def __call__(self, prompt, truncation, max_length):
        return SimpleNamespace(input_ids=[*(10 + ord(letter) for letter in prompt), 1][:max_length])

    def convert_ids_to_tokens(self, index):
        return chr(index - 10)

    def rows(self, length, *prompts):
        """The input of its encoder."""
        ids = [self(prompt, True, length).input_ids for prompt in prompts]
        return {(*own, *[0] * (length - len(own))) for own in ids}


def test_tokens_of_two_encoders_follow_each_other():
    clip, letters = tiny.tokenizer(), Letters()
    pipeline = SimpleNamespace(tokenizer=clip, tokenizer_2=clip, tokenizer_3=letters, text_encoder_3=object())
    encoded = {"tokenizer_3": letters.rows(6, "", "ox")}
    labels = label_tokens(pipeline, {"prompt": "fox", "prompt_3": "ox"}, 77 + 6, encoded)
    assert [token.kind for token in labels[:6]] == ["start", "word", "word", "word", "end", "padding"]
    assert [(token.text, token.kind) for token in labels[77:]] == [
        ("o", "word"),
        ("x", "word"),
        ("", "end"),
        *[("", "padding")] * 3,
    ]
    # one alone, which is told from both by its length; and neither, where nothing was seen of them
    assert [token.text for token in label_tokens(pipeline, {"prompt": "ox"}, 6, encoded)[:2]] == ["o", "x"]
    longer = {"tokenizer_3": letters.rows(80, "fox")}
    assert [token.text for token in label_tokens(pipeline, {"prompt": "fox"}, 80, longer)[:3]] == list("fox")
    assert {token.kind for token in label_tokens(pipeline, {"prompt": "fox"}, 80, {})} == {"unknown"}
    # the third encoder may be left out: zeros stand in its place
    pipeline.text_encoder_3 = None
    labels = label_tokens(pipeline, {"prompt": "fox"}, 77 + 6, {})
    assert [token.kind for token in labels[76:]] == ["padding", *["unknown"] * 6]


def test_tokens_that_the_encoder_was_not_given_are_unknown():
    """As where a pipeline puts prompts in lower case, or into a template."""
    letters = Letters()
    pipeline = SimpleNamespace(tokenizer=letters)
    assert [
        t.text for t in label_tokens(pipeline, {"prompt": "Fox"}, 6, {"tokenizer": letters.rows(6, "Fox")})[:3]
    ] == [*"Fox"]
    for rows in (letters.rows(6, "fox"), letters.rows(12, "Fox")):
        assert {t.kind for t in label_tokens(pipeline, {"prompt": "Fox"}, 6, {"tokenizer": rows})} == {"unknown"}


def test_prompts_are_those_of_the_call(diffusion):
    scope = Scope(diffusion)
    with scope.record_tokens() as taken, scope.record_tokens(["a red fox", "blue"]) as named:
        draw(diffusion)
    assert taken.prompts == named.prompts == ("a red fox", "blue")
    for sample, word in ((0, "fox"), (1, "blue")):
        assert torch.equal(taken.map(word, sample), named.map(word, sample))
    # two images of each
    with scope.record_tokens() as taken, scope.record_tokens(["a red fox", "blue"]):
        diffusion(["a red fox", "blue"], num_images_per_prompt=2, num_inference_steps=1, output_type="latent")
    assert taken.prompts == ("a red fox", "a red fox", "blue", "blue")
    assert taken.map("blue", 3).shape == (8, 8)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("a dog", "prompts: got 'a dog' for sample 0, which the pipeline was called with 'a red fox' for"),
        ("a red fox", "prompts: got 'a red fox' for sample 1, which the pipeline was called with 'blue' for"),
        (["blue", "a red fox"], "prompts: got 'blue' for sample 0"),
        (["a red fox", "blue", "x"], "prompts: got 3 for 2 samples, expected one for each, or one for all"),
    ],
)
def test_other_prompts_than_those_of_the_call_are_errors(diffusion, named, message):
    scope = Scope(diffusion)
    with pytest.raises(ValueError, match=re.escape(message)), scope.record_tokens(named):
        draw(diffusion)
    assert len(scope._contexts) == 0


def test_prompts_do_not_change_within_a_context(diffusion):
    scope = Scope(diffusion)
    with scope.record_tokens():
        draw(diffusion, ("blue",))
        with pytest.raises(ValueError, match=r"called with 'blue', and now is with 'a fox', in one context"):
            draw(diffusion, ("a fox",))
    with pytest.raises(TypeError, match="prompts: got an entry of type int"), scope.record_tokens([1]):  # type: ignore[list-item]
        pass
    with pytest.raises(ValueError, match="prompts: got an empty list"), scope.record_tokens([]):
        pass


def test_embeddings_instead_of_prompts(diffusion):
    """Nothing tells whose they are: the words must be named, and a warning says that they are taken on trust."""
    scope = Scope(diffusion)
    words, nothing = diffusion.encode_prompt("a red fox", "cpu", 1, True)
    options = {"prompt_embeds": words, "negative_prompt_embeds": nothing, "num_inference_steps": 1}
    with (
        pytest.raises(ValueError, match=r"prompts: got none, and the pipeline is called without them"),
        scope.record_tokens(),
    ):
        diffusion(**options, output_type="latent")
    with (
        pytest.warns(UserWarning, match="nothing tells whether they are 'a red fox'"),
        scope.record_tokens("a red fox") as maps,
    ):
        diffusion(**options, output_type="latent")
    assert maps.map("fox").shape == (8, 8)
    with (
        pytest.raises(ValueError, match="prompts: got none, and no call of the pipeline is running"),
        scope.record_tokens(),
        torch.inference_mode(),
    ):
        diffusion.unet(torch.randn(1, 4, 8, 8), 5, words)


def test_words_of_the_encoder_that_the_denoiser_sees():
    """Of Flux's two, the first gives no tokens."""
    pipeline = tiny.flux()
    with Scope(pipeline).record_tokens() as maps:
        pipeline(
            "a fox", prompt_2="a cat", num_inference_steps=1, max_sequence_length=12, height=16, width=16,
            output_type="latent",
        )  # fmt: skip
    kinds = [token.kind for token in maps.tokens()]
    assert len(kinds) == 12
    assert "".join(token.text for token in maps.tokens() if token.kind == "word") == "acat"
    assert maps.map("cat").ndim == 2
    with pytest.raises(ValueError, match="words: got 'fox'"):
        maps.map("fox")


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


def test_a_forward_that_fails_adds_nothing(diffusion):
    class Stopped(Exception):
        pass

    def stop(module, args, output):
        raise Stopped

    scope = Scope(diffusion)
    inputs = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 5, torch.randn(2, 77, 32))
    found = []
    for fails in (False, True):
        with scope.record_tokens("a red fox") as maps, torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fails:
                handle = diffusion.unet.conv_out.register_forward_hook(stop)
                with pytest.raises(Stopped):
                    diffusion.unet(10 * inputs[0], *inputs[1:])
                handle.remove()
            diffusion.unet(*inputs)
        found.append(torch.stack([maps.map([position], 1) for position in range(77)]))
    assert torch.equal(*found)


def test_pictures_of_two_sizes_have_no_map_together(diffusion):
    said = r"has a picture of 4 x 2 places after one of 4 x 4 in one context"
    site = next(site.name for site in Scope(diffusion).sites if site.kind == "cross" and "mid" in site.name)
    with Scope(diffusion).record_tokens(sites=[site]):
        for width, expected in ((16, contextlib.nullcontext()), (8, pytest.raises(ValueError, match=said))):
            with expected:
                diffusion("a red fox", num_inference_steps=1, height=16, width=width, output_type="latent")
