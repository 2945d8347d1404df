"""Sites are listed, and recorded, in the order in which they run."""

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from configurations import CASES
from configurations.examine import build, run, watched
from headscope import Scope
from headscope.models.structure.order import execution_order
from headscope.models.structure.sites import find_sites

# those whose modules are made in another order than they run in, of each kind
GATING = ["UNet2DModel", "UNet2DConditionModel", "UNetMotionModel", "Kandinsky3UNet", "Lumina2Transformer2DModel"]


def check(name):
    """Every site that runs, against hooks."""
    model = build(name, CASES[name])
    names = [site.name for site in find_sites(model)[0]]
    with watched(model, names, frames_for_heads=CASES[name].frames_for_heads) as calls:
        run(model, CASES[name])
    executed = list(dict.fromkeys(call.site for call in calls if call.site is not None))
    assert [name for name in names if name in set(executed)] == executed
    # none is lost by being put in order
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", GATING)
def test_sites_are_in_the_order_of_execution(name):
    check(name)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name not in GATING])
def test_sites_of_every_class_are_in_the_order_of_execution(name):
    check(name)


def test_rows_are_in_the_order_of_execution():
    """Though calls of one shape are reduced together: here the first, the third and the last."""
    name = "UNet2DModel"
    model = build(name, CASES[name])
    scope = Scope(model)
    with scope.record("entropy", "key_mass", "max_prob") as recording:
        run(model, CASES[name])
        run(model, CASES[name])
    table = recording.to_polars()
    rows = list(dict.fromkeys(table.select("forward", "site").iter_rows()))
    assert rows == [(forward, site.name) for forward in (0, 1) for site in scope.sites]
    assert len(scope.sites) > 2
    assert table["queries"].n_unique() > 1 or table["keys"].n_unique() > 1


class Leaf(nn.Module):
    def forward(self, tokens):
        return functional.scaled_dot_product_attention(tokens, tokens, tokens)


class Fixture(nn.Module):
    """Ways to walk through children, none in the order in which they are made."""

    def __init__(self):
        super().__init__()
        self.last, self.tail, self.inner, self.outer = Leaf(), Leaf(), Leaf(), Leaf()
        self.zipped, self.beside = (nn.ModuleList([Leaf(), Leaf(), Leaf()]) for _ in range(2))
        self.counted, self.along = (nn.ModuleList([Leaf(), Leaf()]) for _ in range(2))
        self.by_name = nn.ModuleDict({"b": Leaf(), "a": Leaf()})
        self.unnamed = Leaf()
        self.again = self.inner
        self.hidden = Leaf()
        self.first = nn.Sequential(Leaf(), nn.Sequential(Leaf()))

    def _prepare(self, tokens):
        # looked at, not run
        if self.last is not None and len(self.zipped) > 1:
            tokens = self.first(tokens)
        return self.outer(self.again(tokens))

    def forward(self, tokens):
        count = len([self.tail, self.last])
        tokens = self._prepare(tokens)
        blocks = list(zip(self.beside, self.zipped[1:], strict=False))
        tokens = self.zipped[0](tokens)
        for beside, zipped in blocks:
            tokens = zipped(beside(tokens))
        for index in range(len(self.along)):
            tokens = self.counted[index](self.along[index](tokens))
        for block in self.by_name.values():
            tokens = block(tokens)
        tokens = getattr(self, "hidden")(tokens)  # noqa: B009
        tokens = self.tail(self.beside[-1](tokens))
        return self.last(tokens) * count


def test_ways_to_walk_through_children():
    model = Fixture()
    leaves = [name for name, module in model.named_modules() if isinstance(module, Leaf)]
    with watched(model, leaves) as calls:
        model(torch.randn(1, 1, 2, 4))
    executed = [call.site for call in calls]
    listed = execution_order(model, leaves)
    assert sorted(listed) == sorted(leaves)
    # what the code doesn't name comes last
    assert listed[-2:] == ["unnamed", "hidden"]
    assert listed[:-2] == [name for name in dict.fromkeys(executed) if name != "hidden"]


def test_without_code_the_order_is_that_of_making():
    namespace: dict = {"nn": nn, "Leaf": Leaf}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.b, self.a = Leaf(), Leaf()\n"
        "    def forward(self, tokens):\n"
        "        return self.b(self.a(tokens))\n",
        namespace,
    )
    assert execution_order(namespace["Typed"](), ["a", "b"]) == ["b", "a"]
