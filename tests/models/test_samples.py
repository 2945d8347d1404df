"""Every sample has its own rows, however a module walks through the batch: against attention captured by hand."""

import math

import polars as pl
import pytest
import torch
import torch.nn.functional as functional
from diffusers import MochiTransformer3DModel

from headscope import Scope
from headscope.models.structure.sites import find_sites


def attention_of(query, key):
    """[heads, queries, keys], float64."""
    return (query.double() @ key.double().mT / query.shape[-1] ** 0.5).softmax(-1)


class Attention(torch.nn.Module):
    """Attention without weights over [rows, tokens, 8]: to all of its rows at once, or to so many at a time."""

    heads = 2

    def __init__(self, at_a_time=None, calls=1):
        super().__init__()
        self.at_a_time = at_a_time
        self.calls = calls
        self.seen = []

    def forward(self, tokens):
        query = tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for _ in range(self.calls):
            parts = query.split(self.at_a_time or len(query))
            query = torch.cat([functional.scaled_dot_product_attention(part, part, part) for part in parts])
        self.seen.append(query)
        return query.transpose(1, 2).flatten(2)


class Walk(torch.nn.Module):
    """Runs its attention on so many samples at a time, some of them not at all."""

    def __init__(self, attention, at_a_time, skipped=0):
        super().__init__()
        self.attention = attention
        self.at_a_time = at_a_time
        self.skipped = skipped

    def forward(self, tokens, timestep=None):
        whole = len(tokens) - self.skipped
        parts = [self.attention(part) for part in tokens[:whole].split(self.at_a_time)]
        return torch.cat([*parts, tokens[whole:]])


def expected_rows(tokens, calls):
    """{(call, sample, head): entropy of its mean over queries}"""
    found = {}
    query = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    for call in range(calls):
        for sample, own in enumerate(query):
            p = attention_of(own, own)
            for head, mean in enumerate(torch.special.entr(p).sum(-1).mean(-1).tolist()):
                found[call, sample, head] = mean
        query = functional.scaled_dot_product_attention(query, query, query)
    return found


WALKS = {
    "all at once": (lambda: Attention(), 4),
    "one row after the other": (lambda: Attention(1), 4),
    "two after two, twice": (lambda: Attention(2, calls=2), 4),
    "three, then one": (lambda: Attention(3), 4),
    "one sample a run": (lambda: Attention(), 1),
    "one sample a run, attended to twice": (lambda: Attention(calls=2), 1),
    "two samples a run, one row after the other, twice": (lambda: Attention(1, calls=2), 2),
}


@pytest.mark.parametrize("name", WALKS)
def test_walks_through_the_batch(name):
    make, run = WALKS[name]
    model = Walk(make(), run)
    tokens = 3 * torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    stock = model(tokens, timestep=5.0)
    scope = Scope(model)
    with scope.record("entropy", "head_output", reduce=None) as recording:
        assert torch.allclose(model(tokens, timestep=5.0), stock, atol=1e-5)
        model(tokens, timestep=5.0)
    expected = expected_rows(tokens, model.attention.calls)
    table = recording.to_polars()
    for forward in range(2):
        rows = table.filter(table["forward"] == forward).select("call", "sample", "head", "entropy_mean").rows()
        assert len(rows) == len(expected)
        assert {(call, sample, head): mean for call, sample, head, mean in rows} == pytest.approx(expected, abs=1e-5)
    # by sample, in both forwards
    kept = recording.samples("head_output", "attention", model.attention.calls - 1, 5)
    assert kept.shape[0] == 8
    # an edit of the third sample is of that one, and a fill is each sample's own
    with scope.edit([{}, {}, {"attention": [0, 1]}, {}]):
        edited = model(tokens, timestep=5.0)
    assert (edited - stock).flatten(1).abs().amax(1).gt(1e-4).tolist() == [False, False, True, False]
    assert not edited[2].any()


def test_samples_that_do_not_run_have_no_rows():
    model = Walk(Attention(), 3, skipped=1)
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    said = "3 rows, expected a multiple or a part of the batch of 4"
    with pytest.raises(ValueError, match=said), Scope(model).record("entropy"):
        model(tokens, timestep=5.0)
    model.at_a_time = 1
    with Scope(model).record("entropy") as recording:
        model(tokens, timestep=5.0)
        model(tokens, timestep=5.0)
    samples = recording.to_polars().group_by("forward", "call").agg(pl.col("sample").unique().sort()).sort("forward")
    assert samples.rows() == [(0, 0, [0, 1, 2]), (1, 0, [0, 1, 2])]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_that_takes_its_tokens_first_is_unseen(batch_first):
    """Its input may have the samples first all the same, and then it attends from one sample to the next."""
    sites, unseen = find_sites(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2, batch_first=batch_first)))
    assert [site.name for site in sites] == (["0"] if batch_first else [])
    assert [(entry.name, "batch_first=False" in entry.reason) for entry in unseen] == (
        [] if batch_first else [("0", True)]
    )


# Mochi attends to one sample after the other, without the padding of its text
TEXT = (5, 3, 1)
FRAMES, SIZE = 2, 4


# it asks for autocast in float32, which there isn't on the CPU
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


@pytest.fixture(scope="module")
def mochi():
    torch.manual_seed(0)
    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=12,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
    ).eval()


def mochi_inputs(samples, text=TEXT):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5)[None] < torch.tensor(text)[:, None]
    whole = {
        "hidden_states": 2 * torch.randn(3, 4, FRAMES, SIZE, SIZE, generator=generator),
        "encoder_hidden_states": 2 * torch.randn(3, 5, 16, generator=generator),
        "timestep": torch.full((3,), 500.0),
        "encoder_attention_mask": mask,
    }
    return {name: tensor[list(samples)] for name, tensor in whole.items()}


def run(model, inputs):
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("samples", [(0,), (0, 1), (0, 1, 2)])
def test_mochi(mochi, samples, monkeypatch):
    calls = []
    stock_attention = functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **options):
        if query.shape[0] == 1 and query.shape[2] > SIZE * SIZE // 4:
            calls.append((query, key))
        return stock_attention(query, key, value, *args, **options)

    inputs = mochi_inputs(samples)
    with monkeypatch.context() as patched:
        patched.setattr(functional, "scaled_dot_product_attention", spy)
        stock = run(mochi, inputs)
    scope = Scope(mochi)
    sites = [site.name for site in scope.sites if site.kind == "joint"]
    with scope.record("entropy", "max_prob", sites=sites) as recording:
        assert torch.allclose(run(mochi, inputs), stock, atol=1e-5)
    table = recording.to_polars().with_columns(pl.col("site", "query_group").cast(pl.String))
    image = FRAMES * (SIZE // 2) ** 2
    assert len(calls) == len(sites) * len(samples)
    assert table.select("site", "sample", "head", "query_group", "frame").is_unique().all()
    captured = iter(calls)
    for site in sites:
        for sample, own in enumerate(samples):
            query, key = next(captured)
            keys = image + TEXT[own]
            assert key.shape[2] == keys
            p = attention_of(query[0], key[0])
            entropy, most = torch.special.entr(p).sum(-1), p.amax(-1)
            rows = table.filter((table["site"] == site) & (table["sample"] == sample))
            expected = {}
            for head in range(2):
                size = image // FRAMES
                for frame in range(FRAMES):
                    expected["image", frame, head] = slice(frame * size, (frame + 1) * size)
                expected["text", None, head] = slice(image, None)
            assert len(rows) == len(expected)
            for row in rows.iter_rows(named=True):
                part = expected[row["query_group"], row["frame"], row["head"]]
                assert (row["queries"], row["keys"]) == (len(entropy[0, part]), keys)
                assert row["entropy_mean"] == pytest.approx(float(entropy[row["head"], part].mean()), abs=1e-5)
                assert row["entropy_normalised_mean"] == pytest.approx(row["entropy_mean"] / math.log(keys), abs=1e-6)
                assert row["max_prob_max"] == pytest.approx(float(most[row["head"], part].max()), abs=1e-5)


def test_edits_of_mochi_are_of_the_right_sample(mochi):
    scope = Scope(mochi)
    site = next(site.name for site in scope.sites if site.kind == "joint")
    together = mochi_inputs((0, 1, 2))
    stock = run(mochi, together)
    with scope.edit([{}, {site: [1]}, {}]):
        edited = run(mochi, together)
    assert (edited - stock).flatten(1).abs().amax(1).gt(1e-5).tolist() == [False, True, False]
    with scope.edit({site: [1]}):
        alone = run(mochi, mochi_inputs((1,)))
    assert torch.allclose(edited[1:2], alone, atol=1e-5)
    asked = []
    with scope.edit({site: lambda where: asked.append((where.call, where.sample)) or []}):
        run(mochi, together)
    assert set(asked) == {(0, sample) for sample in range(3)}
    # a fill of each sample's own output changes nothing; of another's, what that one had
    even = mochi_inputs((0, 1, 2), text=(4, 4, 4))
    stock = run(mochi, even)
    with scope.record("head_output", sites=[site], reduce=None) as recording:
        run(mochi, even)
    assert recording.samples("head_output", site, 0, 500).shape == (3, 2, 12, 8)
    with scope.edit({site: [0, 1]}, fill=recording):
        assert torch.allclose(run(mochi, even), stock, atol=1e-5)
    with scope.edit({site: [0, 1]}, fill=recording.take([2, 1, 1])):
        changed = (run(mochi, even) - stock).flatten(1).abs().amax(1)
    assert changed.gt(1e-5).tolist() == [True, False, True]


def test_samples_with_texts_of_different_lengths_have_no_mean_of_their_tensors(mochi):
    scope = Scope(mochi)
    said = "has 11 tokens in one sample and 13 in another"
    with pytest.raises(ValueError, match=said), scope.record("head_output", sites="*"):
        run(mochi, mochi_inputs((0, 1)))
