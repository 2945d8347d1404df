"""Sharing the clean forward's work changes no number: against stock diffusers with a head's slice zeroed by hand."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

import tiny
from headscope.models import Scope
from headscope.ops import HeadEdit
from headscope.sweep.compute.calls import Diverged, all_calls
from headscope.sweep.compute.sharing import Prefix
from headscope.zoo import load_pipeline


def bundled():
    images = torch.randn(3, 3, 32, 32, generator=torch.manual_seed(1))
    return load_pipeline("unet").unet, lambda rows: (images[rows], torch.full((len(rows),), 400))


def conditional_unet():
    """Skip connections into up blocks that attend too."""
    torch.manual_seed(0)
    unet = tiny.conditional_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 7, 32)
    return unet, lambda rows: (latents[rows], torch.full((len(rows),), 400), text[rows])


def sd3():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    ).eval()
    latents, text, pooled = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16), torch.randn(3, 16)
    return transformer, lambda rows: (latents[rows], text[rows], pooled[rows], torch.full((len(rows),), 400))


def flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    latents, text, pooled = torch.randn(3, 16, 16), torch.randn(3, 6, 32), torch.randn(3, 32)
    places = torch.zeros(16, 3)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4

    def inputs(rows):
        return latents[rows], text[rows], pooled[rows], torch.full((len(rows),), 0.4), places, torch.zeros(6, 3)

    return transformer, inputs


def answers(denoiser, inputs):
    return lambda rows: denoiser(*inputs(list(rows)), return_dict=False)[0]


def zero_head(denoiser: nn.Module, site, head: int):
    """Stock diffusers with the head's slice zeroed where the heads are joined."""
    width = slice(head * site.head_dim, (head + 1) * site.head_dim)
    stock = torch.nn.functional.scaled_dot_product_attention
    module = denoiser.get_submodule(site.name)
    inside = []

    def attend(*arguments, **options):
        output = stock(*arguments, **options)
        if inside:
            output = output.transpose(1, 2).flatten(2).clone()
            output[..., width] = 0
            output = output.unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
        return output

    handles = [
        module.register_forward_pre_hook(lambda *_: inside.append(True)),
        module.register_forward_hook(lambda *_: inside.clear()),
    ]
    torch.nn.functional.scaled_dot_product_attention = attend

    def restore():
        torch.nn.functional.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()

    return restore


@pytest.mark.parametrize("make", [bundled, conditional_unet, sd3, flux])
def test_shared_forwards_equal_whole_ones(make):
    """Every head of every site, edits of three items as rows of one batch, in mixed order."""
    denoiser, inputs = make()
    forward = answers(denoiser, inputs)
    scope = Scope(denoiser)
    prefix = Prefix.learn(denoiser, [site.name for site in scope.sites], forward)
    assert prefix.reason is None
    with torch.inference_mode():
        with prefix.clean([frozenset([site.name]) for site in scope.sites]) as kept:
            forward([0, 1, 2])
        for site in scope.sites:
            rows = [item for _ in range(site.heads) for item in (2, 0)]
            gates = torch.ones(len(rows), site.heads)
            gates[torch.arange(len(rows)), torch.arange(site.heads).repeat_interleave(2)] = 0
            with (
                scope.edit({site.name: HeadEdit(gates)}),
                prefix.replay(kept, frozenset([site.name]), torch.tensor(rows)),
            ):
                shared = forward(rows).unflatten(0, (site.heads, 2))
            for head in range(site.heads):
                restore = zero_head(denoiser, site, head)
                whole = forward([2, 0])
                restore()
                assert float((shared[head] - whole).norm() / whole.norm()) < 1e-5


def test_later_sites_run_less():
    denoiser, inputs = sd3()
    sites = [site.name for site in Scope(denoiser).sites]
    prefix = Prefix.learn(denoiser, sites, answers(denoiser, inputs))
    left = [prefix.fraction_left([site]) for site in sites]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.35
    # an edit of two sites begins at the first
    assert prefix.fraction_left([sites[0], sites[-1]]) == left[0]


def test_skipped_modules_do_not_run():
    denoiser, inputs = sd3()
    forward = answers(denoiser, inputs)
    sites = [site.name for site in Scope(denoiser).sites]
    prefix = Prefix.learn(denoiser, sites, forward)
    with prefix.clean([frozenset([sites[-1]])]) as kept:
        forward([0])
    ran = []
    for name in ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2"):
        first = denoiser.get_submodule(name).norm1
        first.forward = counted(first.forward, name, ran)
    with prefix.replay(kept, frozenset([sites[-1]]), torch.tensor([0])):
        forward([0])
    assert ran == []
    forward([0])
    assert ran == ["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2"]


def test_what_no_replay_reads_is_not_kept():
    """In Flux's single blocks the MLP's projection is read by its activation alone, which is skipped with it."""
    denoiser, inputs = flux()
    forward = answers(denoiser, inputs)
    sites = [site.name for site in Scope(denoiser).sites]
    prefix = Prefix.learn(denoiser, sites, forward)
    with prefix.clean([frozenset([site]) for site in sites]) as kept:
        forward([0, 1])
    by_name = {call.name: kept.values[call.start] for call in all_calls(prefix._root) if call.start in kept.values}
    projected, activated = (by_name[f"single_transformer_blocks.0.{name}_mlp"] for name in ("proj", "act"))
    assert projected.shape == activated.shape == (2, 22, 128)
    assert projected.untyped_storage().nbytes() == 4
    assert activated.untyped_storage().nbytes() == 4 * 2 * 22 * 128


def counted(forward, name, ran):
    def run(*arguments, **options):
        ran.append(name)
        return forward(*arguments, **options)

    return run


def test_models_are_left_as_they_were():
    denoiser, inputs = sd3()
    forward = answers(denoiser, inputs)
    before = forward([0, 1])
    prefix = Prefix.learn(denoiser, [site.name for site in Scope(denoiser).sites], forward)
    with pytest.raises(ZeroDivisionError), prefix.clean([]):
        raise ZeroDivisionError
    assert all("forward" not in module.__dict__ for module in denoiser.modules())
    assert torch.equal(forward([0, 1]), before)


class Awkward(nn.Module):
    """A denoiser with one attention site and, before it, a module that `spoil` describes."""

    def __init__(self, spoil: nn.Module) -> None:
        super().__init__()
        self.first = spoil
        self.site = tiny.ddpm().unet.mid_block.attentions[0]

    def forward(self, sample, return_dict=False):
        hidden = sample.repeat(1, 32, 1, 1) if sample.shape[1] == 1 else sample
        hidden = hidden * 1.0
        self.first(hidden)
        return (self.site(hidden),)


class InPlace(nn.Module):
    """Changes what it was given, and returns nothing."""

    def forward(self, hidden):
        hidden.mul_(3.0)


class MixesRows(nn.Module):
    """Its output depends on which rows came together: sharing it would be wrong."""

    def forward(self, hidden):
        return hidden.mean(0, keepdim=True)


def test_modules_that_change_their_input_run_again():
    model = Awkward(InPlace())
    sample = torch.randn(2, 1, 4, 4)
    prefix = Prefix.learn(model, ["site"], lambda rows: model(sample[rows])[0])
    assert prefix.shares
    whole = model(sample)[0]
    with prefix.clean([frozenset(["site"])]) as kept:
        model(sample)
    with prefix.replay(kept, frozenset(["site"]), torch.tensor([0, 1])):
        assert torch.allclose(model(sample)[0], whole, rtol=1e-5, atol=1e-6)


class UsesTheMean(Awkward):
    def forward(self, sample, return_dict=False):
        hidden = sample.repeat(1, 32, 1, 1)
        return (self.site(hidden + self.first(hidden)),)


def test_a_model_that_mixes_rows_is_not_shared():
    model = UsesTheMean(MixesRows())
    sample = torch.randn(2, 1, 4, 4)
    prefix = Prefix.learn(model, ["site"], lambda rows: model(sample[rows])[0])
    assert not prefix.shares
    assert "a row alone differs" in str(prefix.reason)


def test_another_order_of_calls_is_noticed():
    denoiser, inputs = sd3()
    forward = answers(denoiser, inputs)
    sites = [site.name for site in Scope(denoiser).sites]
    prefix = Prefix.learn(denoiser, sites, forward)
    denoiser.transformer_blocks = denoiser.transformer_blocks[:2]
    with pytest.raises(Diverged, match="runs where"), prefix.clean([frozenset([sites[-1]])]):
        forward([0])
