"""A user's own statistic, through the public API only: as docs/statistics.md shows it, compiled, and after an edit."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import headscope
from ops.backends import require_backend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"

SOURCE = '''
import torch
import triton
import triton.language as tl

import headscope
from headscope_kernels.attention import RowStatistic


@triton.jit
def update(
    accumulators, rescale, shift, normaliser, weights, exponents, rows, columns, keys, tensors, CONSTANTS: tl.constexpr
):
    late = tl.where(columns >= CONSTANTS[0], 1.0, 0.0)
    return (accumulators[0] * rescale + tl.sum(weights * late[None, :], 1),)


@triton.jit
def finish(accumulators, normaliser, max_logit, max_exponent, CONSTANTS: tl.constexpr):
    return FACTOR * accumulators[0] / normaliser


class LateMass(headscope.Statistic):
    """FACTOR times the mass on keys from `first` on."""

    key = "late_mass"

    def __init__(self, first):
        super().__init__((first,))

    def formula(self, logits, probabilities, rows, tensors):
        return FACTOR * probabilities[..., self.constants[0]:].sum(-1)

    def kernel(self):
        return RowStatistic(finish=finish, update=update, accumulators=(0,), constants=self.constants)
'''


def _load(folder: Path, factor: str):
    """The class from a file, as a user writes it (Triton reads the source of its functions)."""
    path = folder / f"late_mass_{factor.replace('.', '_')}.py"
    path.write_text(SOURCE.replace("FACTOR", factor))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.LateMass


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_own_statistic(tmp_path, backend):
    """Eager and compiled, beside a built-in one; and another function gives another result."""
    require_backend(backend)
    query, key, value = (torch.randn(2, 2, 9, 8) for _ in range(3))
    probabilities = (query @ key.mT * 8**-0.5).softmax(-1)
    for factor in ("1.0", "3.0"):
        statistic = _load(tmp_path, factor)(4)

        def run(query, statistic=statistic):
            return headscope.attention(query, key, value, statistics=["entropy", statistic], backend=backend).statistics

        expected = float(factor) * probabilities[..., 4:].sum(-1)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got in (run(query), compiled(query)):
            torch.testing.assert_close(got["late_mass"], expected, rtol=1e-5, atol=1e-5)
            assert set(got) == {"entropy", "late_mass"}


def test_cpu_kernel_serves_the_built_in_ones_only(tmp_path):
    require_backend("cpu")
    query = torch.randn(1, 1, 4, 8)
    statistic = _load(tmp_path, "2.0")(1)
    with pytest.raises(RuntimeError, match="'late_mass' isn't built into it; it gives entropy"):
        headscope.attention(query, query, query, statistics=[statistic], backend="cpu")
    # without a choice of backend it is served all the same
    assert headscope.attention(query, query, query, statistics=[statistic]).statistics["late_mass"].shape == (1, 1, 4)


def test_triton_says_what_it_lacks():
    class Plain(headscope.Statistic):
        key = "plain_sum"

        def formula(self, logits, probabilities, rows, tensors):
            return probabilities.sum(-1)

    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="'plain_sum' has no Triton functions; it gives entropy, logsumexp"):
        headscope.attention(query, query, query, statistics=["plain_sum"], backend="triton")


def test_built_in_keys_are_taken():
    with pytest.raises(ValueError, match="'entropy' is a built-in statistic, expected another key"):
        type("Mine", (headscope.Statistic,), {"key": "entropy"})


def test_the_page_runs(tmp_path):
    """docs/statistics.md from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    path = tmp_path / "page_of_statistics.py"
    path.write_text("\n".join(blocks))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    fused = headscope.attention(
        module.query, module.key, module.value, statistics=["fused_perplexity"], backend="triton"
    ).statistics["fused_perplexity"]
    torch.testing.assert_close(fused, module.result.statistics["perplexity"], rtol=1e-4, atol=1e-4)
