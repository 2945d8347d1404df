"""A run belongs to the code of the user's own scores."""

import importlib
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import headscope
from headscope.models.tasks import NoisyInputs
from headscope.sweep.compute.scores import checked_score, image_scores, own_scores
from headscope.sweep.plan.functions import code_of

SCORE = """
def largest(edited, clean, target, inputs):
    return {scale} * (edited - clean).abs().flatten(1).amax(1)
"""
IMAGE_SCORE = """
def brighter(clean, edited):
    return {scale} * (edited.astype(float) - clean).mean((1, 2, 3))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module of the user's, and let Python forget the one of that name that it has imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written = set()

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        written.add(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


# the smallest sweep that edits something
SMALLEST = {
    "groups": ["faces"],
    "splits": ["discover"],
    "items": 1,
    "timesteps": [100],
    "observe": False,
    "fills": ["zero"],
    "progress": False,
}
ONE_HEAD = [("mid_block.attentions.0", 0)]


@pytest.mark.parametrize("field", ["scores", "image_scores"])
def test_changed_code_is_another_run(ddpm_directory, tmp_path, write, field):
    source, function = {"scores": (SCORE, "largest"), "image_scores": (IMAGE_SCORE, "brighter")}[field]
    scores = {
        "scores": {"scores": ["my_scores:largest"]},
        "image_scores": {"scores": ["generate"], "image_scores": ["my_scores:brighter"], "generate_steps": 2},
    }[field]

    def run():
        return headscope.sweep(tmp_path / "run", model=ddpm_directory, heads=ONE_HEAD, **SMALLEST, **scores)

    write("my_scores", source.format(scale=1))
    (kind,) = run().tables
    before = run().table(kind).collect()
    write("my_scores", source.format(scale=2))
    with pytest.raises(ValueError, match=rf"code of my_scores:{function}: changed since .*; put it back to go on"):
        run()
    write("my_scores", source.format(scale=1))
    assert run().table(kind).collect().equals(before)


def test_code_is_that_of_both_modules(write):
    """The one that is named, and the one that defines the function."""
    write("my_metrics", SCORE.format(scale=1))
    write("my_scores", "from my_metrics import largest")
    one = code_of(["my_scores:largest", "loss", "mse"])
    assert list(one) == ["my_scores:largest"]
    write("my_metrics", SCORE.format(scale=2))
    write("my_scores", "from my_metrics import largest")
    two = code_of(["my_scores:largest"])
    assert two != one
    write("my_scores", "from my_metrics import largest\nlargest.weight = 3")
    assert code_of(["my_scores:largest"]) not in (one, two)


def test_without_source_the_name_is_all(write):
    assert code_of(["math:hypot"]) == {}
    # a callable object's class is compiled, and the module that makes it isn't
    write("my_scores", "import operator\nfirst = operator.itemgetter(0)")
    assert list(code_of(["my_scores:first"])) == ["my_scores:first"]
    with pytest.raises(ValueError, match="expected an importable module:function"):
        code_of(["my_scores:second"])


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_score_that_works_in_place_harms_no_other(ddpm_directory, tmp_path, write, autocast):
    """Nor itself: each has copies of its own. Scores may be of the predictions' dtype."""
    write(
        "in_place",
        "def spoils(edited, clean, target, inputs):\n"
        "    for tensor in (edited, clean, target, inputs.sample):\n"
        "        tensor.zero_()\n"
        "    return edited.flatten(1).amax(1)\n"
        "def largest(edited, clean, target, inputs):\n"
        "    return (edited - clean).abs().flatten(1).amax(1)\n",
    )

    def table(name: str, scores: list[str]):
        asked = {"sites": ["mid_block.*"], "autocast": autocast, "scores": ["loss", "distance", *scores]}
        run = headscope.sweep(tmp_path / name, model=ddpm_directory, **SMALLEST, **asked)
        return run.table("ablations").collect()

    alone, spoilt = table("alone", ["in_place:largest"]), table("spoilt", ["in_place:spoils", "in_place:largest"])
    assert spoilt["spoils"].to_list() == [0.0] * len(spoilt)
    assert alone["largest"].to_numpy().min() > 0
    for column in ("clean", "edited", "distance", "largest"):
        assert spoilt[column].to_list() == alone[column].to_list()


def test_neither_conditioning_nor_images_are_shared_by_scores(write):
    write(
        "in_place",
        "def texts(edited, clean, target, inputs):\n"
        "    inputs.conditioning['text'].zero_()\n"
        "    return edited.flatten(1).amax(1)\n"
        "def images(clean, edited):\n"
        "    clean[:] = edited\n"
        "    return clean.mean((1, 2, 3))\n",
    )
    sample, text = torch.ones(2, 3), torch.ones(2, 4)
    own_scores(["in_place:texts"])["texts"](sample, sample, NoisyInputs(sample, 0, {"text": text}, sample))
    assert text.tolist() == [[1.0] * 4] * 2
    clean, edited = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 9, np.uint8)
    assert image_scores(["in_place:images"])["images"](clean, edited).tolist() == [9.0, 9.0]
    assert not clean.any()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("", "AttributeError: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(write, source, reason):
    write("broken_scores", source)
    for field, read in (("scores", own_scores), ("image_scores", image_scores)):
        with pytest.raises(ValueError, match=rf"^{field}: got 'broken_scores:f', .*module:function \({reason}"):
            read(["broken_scores:f"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([1.5, -2], dtype=torch.bfloat16), [1.5, -2]),
        (torch.tensor([1.5, -2], requires_grad=True), [1.5, -2]),
        (torch.tensor([True, False]), [1, 0]),
        (np.array([3, 4], np.uint8), [3, 4]),
        ([torch.tensor(1.5), torch.tensor(-2.0)], [1.5, -2]),
        ([Fraction(1, 2), 3], [0.5, 3]),
    ],
)
def test_real_numbers_of_every_kind_are_taken(values, expected):
    found = checked_score("mine", values, 2)
    assert found.dtype == np.float64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("values", "given"),
    [
        (torch.tensor([1 + 2j, 3]), "numbers of dtype complex64, expected real ones"),
        (np.array([1 + 2j, 3]), "numbers of dtype complex128, expected real ones"),
        ([1 + 0j, 3], "numbers of dtype complex128, expected real ones"),
        ([torch.tensor(1 + 2j), torch.tensor(3 + 0j)], "numbers of dtype complex64, expected real ones"),
        (["1.5", "2"], "numbers of dtype <U3, expected real ones"),
        ([None, object()], "list, expected real numbers"),
        # which NumPy would take for NaN, a number, and what lies behind the mask
        ([None, 1.0], r"list, expected real numbers \(one is None\)"),
        (np.array([Fraction(1, 2), "2"], object), r"ndarray, expected real numbers \(one is '2'\)"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), r"MaskedArray, expected real numbers \(some are masked\)"),
        ([10**400, 1], "list, expected real numbers"),
        ([[1.0], [1.0, 2.0]], "list, expected real numbers"),
        (np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"), "numbers of dtype datetime64"),
        ([1.0, 2.0, 3.0], r"an array \[3\], expected \[2\]"),
        (1.0, r"an array \[\], expected \[2\]"),
    ],
)
def test_other_scores_are_refused_by_name(values, given):
    with pytest.raises(ValueError, match=rf"^image_scores: mine gave {given}"):
        checked_score("mine", values, 2)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("StopIteration()", ValueError, "my_scores:bad raised StopIteration: "),
        ("KeyError('mask')", ValueError, "my_scores:bad raised KeyError: 'mask'"),
        # fewer rows may fit
        ("MemoryError('too many')", MemoryError, "too many"),
    ],
)
def test_errors_of_scores_say_whose_they_are(write, error, expected, message):
    write("my_scores", f"def bad(*given):\n    raise {error}\n")
    sample = torch.zeros(2, 3)
    inputs = NoisyInputs(sample, 0, {}, sample)
    with pytest.raises(expected, match=message):
        own_scores(["my_scores:bad"])["bad"](sample, sample, inputs)
    with pytest.raises(expected, match=message):
        image_scores(["my_scores:bad"])["bad"](np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8))


def test_a_complex_score_ends_the_run(ddpm_directory, tmp_path, write):
    write("my_scores", "def spectrum(edited, clean, target, inputs):\n    return edited.flatten(1).sum(1) * 1j\n")
    with pytest.raises(
        headscope.sweep.SweepFailed, match=r"scores: my_scores:spectrum gave numbers of dtype complex64, expected"
    ):
        headscope.sweep(
            tmp_path / "run", model=ddpm_directory, heads=ONE_HEAD, scores=["my_scores:spectrum"], **SMALLEST
        )
