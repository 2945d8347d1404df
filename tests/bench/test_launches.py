"""What recording adds to a denoising step of Stable Diffusion 1.5, counted on the meta device: nothing is computed.

A value that the host would read back has no value there: reading one raises, so that a run that ends has read none.
"""

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headscope import Scope

# allocate, and launch nothing
_ALLOCATING = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted")


class Launches(TorchDispatchMode):
    """Counts operators that a GPU would be given work by: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.of_headscope = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not is_view and not func._schema.name.startswith(_ALLOCATING)
        self.of_headscope += func.namespace == "headscope"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def step():
    """One step of SD 1.5's configuration at 512 pixels, 8 images, float16."""
    # attention_head_dim is the number of heads there: 8
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half().eval()
        latents, text = torch.randn(8, 4, 64, 64).half(), torch.randn(8, 77, 768).half()
        timestep = torch.full((8,), 500)

    def run():
        with torch.inference_mode():
            return unet(latents, timestep, text, return_dict=False)[0]

    return unet, run


def count(run):
    run()
    with Launches() as launches:
        run()
    return launches


def test_recording_adds_a_few_launches_per_shape_and_none_per_site(step):
    unet, run = step
    scope = Scope(unet)
    assert len(scope.sites) == 32
    stock = count(run)
    with scope.record("entropy"):
        recording = count(run)
    with scope.edit({"*": [0]}):
        removing = count(run)
    print(f"launches per step: stock {stock.count}, recording {recording.count}, removing {removing.count}")
    assert stock.of_headscope == 0
    # one operator takes the place of one
    assert recording.of_headscope == removing.of_headscope == len(scope.sites)
    # the timestep is copied, for a loop may count on in its own tensor
    copies = 1
    # at the end of the forward, calls of each shape are stacked and reduced: stack, std_mean, aminmax
    shapes = 4
    assert recording.count - stock.count == 3 * shapes + copies
    assert removing.count - stock.count == copies


def test_a_read_would_be_noticed(step):
    _, run = step
    with pytest.raises(RuntimeError, match="meta tensors"):
        float(run().sum())
