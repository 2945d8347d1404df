"""Gradients through a Scope: gradient checkpointing, and every head's importance from a few backwards."""

import numpy as np
import pytest
import torch

import tiny
from headscope import GroupMass, HeadEdit, Scope, Task
from headscope.zoo import load_pipeline, open_group


class Picture:
    def __init__(self, key):
        self.key, self.caption = key, ""
        self.image = np.random.default_rng(len(key)).integers(0, 256, (16, 16, 3), np.uint8)


ITEMS = [Picture("test/1"), Picture("test/22"), Picture("test/333")]


def gradients(model, scope, context, checkpointing, timesteps=(0.2, 0.7)):
    """d loss / d input of two forwards whose backwards come after both, and the recording of the context."""
    inputs = tiny.flux_inputs()
    hidden = inputs.pop("hidden_states").requires_grad_()
    if checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()
    with context() as recording:
        loss = 0
        for weight, timestep in enumerate(timesteps, 1):
            given = {**inputs, "hidden_states": hidden, "timestep": torch.full((2,), timestep)}
            loss = loss + weight * model(**given, return_dict=False)[0].square().mean()
        (grad,) = torch.autograd.grad(loss, hidden)
    return grad, recording


def test_a_checkpointed_forward_is_recorded_once():
    model = tiny.flux_transformer(double=1, single=2)
    scope = Scope(model)
    plain, recorded = gradients(model, scope, lambda: scope.record("entropy", "head_output"), False)
    again, checkpointed = gradients(model, scope, lambda: scope.record("entropy", "head_output"), True)
    assert float((again - plain).abs().max()) <= 1e-6
    assert len(checkpointed) == len(recorded) == 6
    one, other = recorded.to_polars(), checkpointed.to_polars()
    assert one.drop("entropy_std").equals(other.drop("entropy_std"))


def test_a_checkpointed_forward_with_data_of_its_statistics():
    """The repetition saves what the forward saved, the groups of keys, too."""
    model = tiny.flux_transformer(double=1, single=2)
    scope = Scope(model)
    # 5 tokens of text and 12 of the image
    mass = GroupMass(torch.arange(17) % 2, 2)
    plain, recorded = gradients(model, scope, lambda: scope.record("logsumexp", mass), False)
    again, checkpointed = gradients(model, scope, lambda: scope.record("logsumexp", mass), True)
    assert float((again - plain).abs().max()) <= 1e-6
    assert len(checkpointed) == len(recorded) == 6


def test_an_edit_acts_in_the_repetition_as_it_did_in_its_forward():
    """The second forward is edited, the first is not; both are run again in the backward."""
    model = tiny.flux_transformer(double=1, single=2)
    scope = Scope(model)

    def context():
        return scope.edit({"*": lambda where: [0] if where.timestep > 0.5 else []})

    plain, _ = gradients(model, scope, context, False)
    checkpointed, _ = gradients(model, scope, context, True)
    assert float((checkpointed - plain).abs().max()) <= 1e-6
    unedited, _ = gradients(model, scope, lambda: scope.record("entropy"), False)
    assert float((unedited - plain).abs().max()) > 1e-5


def test_a_backward_after_the_context_is_refused():
    model = tiny.flux_transformer()
    model.enable_gradient_checkpointing()
    inputs = tiny.flux_inputs()
    inputs["hidden_states"].requires_grad_()
    stock = {m: m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()}
    with Scope(model).record("entropy"):
        loss = model(**inputs, return_dict=False)[0].sum()
    with pytest.raises(RuntimeError, match="call backward inside the contexts of its forward"):
        loss.backward()
    assert all(m.__dict__.get("_gradient_checkpointing_func") is function for m, function in stock.items())


@pytest.fixture(scope="module")
def task():
    return Task.of(tiny.ddpm())


def loss_at(task, scope, inputs, site, head, gate):
    gates = torch.ones(len(ITEMS), scope.site(site).heads)
    gates[:, head] = gate
    with torch.inference_mode(), scope.edit({site: HeadEdit(gates)}):
        return task.loss(inputs).numpy()


def test_first_and_second_order_are_those_of_finite_differences(task):
    """With outputs' number of +-1 vectors the Gauss-Newton term is close to its expectation."""
    scope = Scope(task.denoiser)
    found = scope.attribute(task, ITEMS, [300], cotangents=32, sites="mid*", batch=2)
    inputs = task.noisy_inputs(task.prepare(ITEMS), 300)
    step = 0.05
    for index, (site, head) in enumerate(found.heads):
        ahead, here, behind = (loss_at(task, scope, inputs, site, head, 1 + step * sign) for sign in (1, 0, -1))
        assert found.loss[:, 0] == pytest.approx(here, rel=1e-4)
        assert found.g[:, 0, index] == pytest.approx((behind - ahead) / (2 * step), abs=2e-3 * np.abs(here).max())
    # the prediction's own change gives the Gauss-Newton term
    site, head = found.heads[0]
    with torch.inference_mode():
        predictions = []
        for gate in (1 + step, 1 - step):
            gates = torch.ones(1, scope.site(site).heads)
            gates[:, head] = gate
            with scope.edit({site: HeadEdit(gates)}):
                predictions.append(task.predict(inputs).double())
    slope = (predictions[0] - predictions[1]) / (2 * step)
    exact = slope.square().flatten(1).mean(1).numpy()
    # the estimate's relative standard deviation is sqrt(2 / 32) = 0.25
    assert found.c[:, 0, 0] == pytest.approx(exact, rel=0.9)


def test_the_integral_over_the_path_is_the_loss_of_removing_every_head(task):
    scope = Scope(task.denoiser)
    found = scope.attribute(task, ITEMS, [300], cotangents=1, integrate=6)
    inputs = task.noisy_inputs(task.prepare(ITEMS), 300)
    with torch.inference_mode(), scope.edit({site.name: range(site.heads) for site in scope.sites}):
        removed = task.loss(inputs).numpy()
    assert found.integrated is not None
    assert found.integrated.sum(2)[:, 0] == pytest.approx(removed - found.loss[:, 0], rel=1e-2, abs=1e-5)


def test_attributions_do_not_depend_on_the_batch_and_become_a_table(task):
    scope = Scope(task.denoiser)
    first = scope.attribute(task, ITEMS, [100, 700], batch=3, cotangents=2)
    second = scope.attribute(task, ITEMS, [100, 700], batch=1, cotangents=2)
    for name in ("loss", "g", "c"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-3, abs=1e-6), name
    third = scope.attribute(task, ITEMS, torch.tensor([100, 700]), batch=np.int64(3), cotangents=np.int8(2))
    assert third.timesteps == (100, 700)
    assert np.array_equal(third.loss, first.loss)
    table = first.to_polars()
    assert len(table) == 3 * 2 * 8
    row = table.filter((table["item"].cast(str) == "test/22") & (table["timestep"] == 700) & (table["head"] == 3))
    index = [position for position, (_, head) in enumerate(first.heads) if head == 3]
    assert row["g"].to_list() == first.g[1, 1, index].tolist()
    assert row["importance"].to_list() == (first.g + first.c)[1, 1, index].tolist()
    best = first.ranking()[0]
    assert (first.g + first.c).mean((0, 1)).argmax() == first.heads.index(best)


def test_bad_requests(task):
    scope = Scope(task.denoiser)
    with pytest.raises(ValueError, match="cotangents: got 0"):
        scope.attribute(task, ITEMS, [1], cotangents=0)
    # no batches at all would be losses of 0
    with pytest.raises(ValueError, match="batch: got -1"):
        scope.attribute(task, ITEMS, [1], batch=-1)
    with pytest.raises(ValueError, match=r"integrate: got 2\.5"):
        scope.attribute(task, ITEMS, [1], integrate=2.5)
    with pytest.raises(ValueError, match="sites: got none"):
        scope.attribute(task, ITEMS, [1], sites=[])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"rules out; call it outside"):
        scope.attribute(task, ITEMS, [1])
    with pytest.raises(ValueError, match="items, timesteps: got none"):
        scope.attribute(task, [], [1])
    with pytest.raises(ValueError, match="another model"):
        scope.attribute(Task.of(tiny.ddpm()), ITEMS, [1])


@pytest.mark.full
def test_attribution_ranks_heads_as_exact_ablation_does():
    """On the bundled model, zero ablation; the first order alone does not."""
    from scipy.stats import spearmanr

    pipeline = load_pipeline("unet")
    task, scope = Task.of(pipeline), Scope(pipeline.unet)
    group = open_group("faces")
    items = [group.item(index) for index in group.indices("discover")[:8]]
    timesteps = [100, 400, 700]
    found = scope.attribute(task, items, timesteps, cotangents=4)
    exact = np.zeros(found.g.shape)
    with torch.inference_mode():
        for column, timestep in enumerate(timesteps):
            inputs = task.noisy_inputs(task.prepare(items), timestep)
            for index, (site, head) in enumerate(found.heads):
                with scope.edit({site: [head]}):
                    exact[:, column, index] = task.loss(inputs).numpy() - found.loss[:, column]
    mean = exact.mean((0, 1))
    both = float(spearmanr((found.g + found.c).mean((0, 1)), mean).statistic)
    first = float(spearmanr(found.g.mean((0, 1)), mean).statistic)
    print(f"Spearman with exact zero ablation: g + c {both:.3f}, g alone {first:.3f}")
    assert both >= 0.9
    assert first < both
