"""Small calls of every kernel, for compute-sanitizer, under whose tools bench/gpu.py runs this.

PYTHONPATH=src:kernels compute-sanitizer python tests/gpu/sanitized.py [DEVICE] [--calls N] [--tokens N]
"""

import argparse

import torch

from headscope.ops import Distance, GroupEntropy, GroupMass, HeadEdit, attention

# dim, queries, keys; dtype; causal
CALLS = [
    (*shape, dtype, causal)
    for shape in ((40, 70, 77), (64, 130, 130), (160, 33, 45))
    for dtype in (torch.float16, torch.float32)
    for causal in (False, True)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", nargs="?", default="cuda")
    parser.add_argument("--calls", type=int, help="as many, the first of all")
    parser.add_argument("--tokens", type=int, default=130, help="at most")
    options = parser.parse_args()
    torch.manual_seed(0)
    for dim, queries, keys, dtype, causal in CALLS[: options.calls]:
        call(options.device, dim, min(queries, options.tokens), min(keys, options.tokens), dtype, causal)
    if options.device == "cuda":
        torch.cuda.synchronize()


def call(device: str, dim: int, queries: int, keys: int, dtype: torch.dtype, causal: bool) -> None:
    """Forward with everything, and backward."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32, leaf: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=leaf)

    query = normal(2, 4, queries, dim, dtype=dtype, leaf=True)
    key, value = (normal(2, 2, keys, dim, dtype=dtype, leaf=True) for _ in range(2))
    mask = None if causal else normal(1, 4, queries, keys, leaf=True)
    gate = torch.tensor([[1.0, 0.0, 0.5, 1.0]], device=device, requires_grad=True)
    temperature = torch.rand(2, 4, device=device) + 0.5
    edit = HeadEdit(gate, normal(4, queries, dim), temperature, normal(1, 4, keys, leaf=True), normal(2, 1, keys))
    groups = torch.randint(-1, 3, (2, keys), device=device)
    statistics = [
        *("entropy", "logsumexp", "max_logit", "max_prob", "collision_entropy", "key_mass"),
        Distance((1, queries), (1, keys)),
        GroupMass(groups, 3),
        GroupEntropy(groups, 3),
    ]
    result = attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=True,
        edit=edit,
        statistics=statistics,
        backend="triton",
    )
    flowing = ("entropy", "logsumexp", "group_mass")
    total = result.output.float().sum() + sum(result.statistics[name].sum() for name in flowing)
    leaves = [query, key, value, gate, edit.key_bias, *([] if mask is None else [mask])]
    torch.autograd.grad(total, leaves)


if __name__ == "__main__":
    main()
