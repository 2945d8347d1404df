"""Small calls of every kernel, for compute-sanitizer: python tests/gpu/sanitized.py, run by run.py under its tools."""

import torch

from headscope.ops import Distance, GroupEntropy, GroupMass, HeadEdit, attention


def main() -> None:
    torch.manual_seed(0)
    for dim, queries, keys in ((40, 70, 77), (64, 130, 130), (160, 33, 45)):
        for dtype in (torch.float32, torch.float16):
            for causal in (False, True):
                query = torch.randn(2, 4, queries, dim, device="cuda", dtype=dtype, requires_grad=True)
                key, value = (
                    torch.randn(2, 2, keys, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
                )
                mask = None if causal else torch.randn(1, 4, queries, keys, device="cuda", requires_grad=True)
                gate = torch.tensor([[1.0, 0.0, 0.5, 1.0]], device="cuda", requires_grad=True)
                edit = HeadEdit(
                    gate,
                    torch.randn(4, queries, dim, device="cuda"),
                    torch.rand(2, 4, device="cuda") + 0.5,
                    torch.randn(1, 4, keys, device="cuda", requires_grad=True),
                    torch.randn(2, 1, keys, device="cuda"),
                )
                groups = torch.randint(-1, 3, (2, keys), device="cuda")
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
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
