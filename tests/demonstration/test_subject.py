"""What an exported model's card says of its heads is what a plain loop finds."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.demonstration import describe_heads
from headscope.models import Scope
from headscope.sweep import SweepConfig
from headscope.sweep.plan.items import load_task
from headscope.zoo import loading, open_group

WEIGHTS = Path(loading.__file__).parent / "weights" / "pixeldit"
GROUPS = ("twins", "distinct", "photographs")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    shutil.copytree(WEIGHTS, folder / "model")
    card = "# A model\n\nSome text.\n\n## What its heads do\n\nAn earlier one.\n"
    (folder / "model" / "MODEL_CARD.md").write_text(card)
    settings = {"groups": GROUPS, "items": 2, "bands": 1, "reference_items": 16}
    summary = describe_heads(folder / "model", folder / "work", **settings, progress=False)
    return folder, summary


def test_the_card_and_the_file_say_the_same(described):
    folder, summary = described
    assert json.loads((folder / "model" / "heads.json").read_text()) == summary
    card = (folder / "model" / "MODEL_CARD.md").read_text()
    assert card.startswith("# A model\n\nSome text.\n\n## What its heads do\n")
    assert "An earlier one" not in card
    assert str(folder) not in card
    assert (folder / "model" / "heads.png").stat().st_size > 1000
    for group in GROUPS:
        (row,) = re.findall(rf"^\| {group} \| .*$", card, re.MULTILINE)
        assert f"{100 * summary['all_heads'][group]['value']:+.1f}" in row
        for entry in summary["largest"][group]:
            assert f"h{entry['head']}: {100 * entry[group]['value']:+.1f}" in row
    # photographs have one source in a split
    assert "[one source]" in card
    rows = re.findall(r"^\| twins, distinct \| (?:block \d\.attn1 h\d|all three) \| .*$", card, re.MULTILINE)
    (tie,) = summary["ties"]
    for row, entry in zip(rows, (*tie["heads"], tie["together"]), strict=True):
        for name in ("twins", "distinct"):
            assert f"{100 * entry[name]['value']:+.1f}" in row


def test_heads_were_chosen_on_discover(described):
    _, summary = described
    for group in GROUPS:
        every = summary["single_heads_discover"][group]
        assert len(every) == 48
        largest = sorted(every, key=lambda name: -every[name])[:3]
        assert [f"{entry['site']} {entry['head']}" for entry in summary["largest"][group]] == largest
    (tie,) = summary["ties"]
    twins, distinct = (summary["single_heads_discover"][name] for name in ("twins", "distinct"))
    carrying = sorted(twins, key=lambda name: distinct[name] - twins[name])[:3]
    assert [f"{entry['site']} {entry['head']}" for entry in tie["heads"]] == carrying


def test_all_heads_and_counterparts_by_a_plain_loop(described):
    _, summary = described
    task = load_task(SweepConfig(model="pixeldit", groups=("twins",)))
    scope, group = Scope(task.denoiser), open_group("twins")
    (timestep,) = summary["timesteps"]
    reference = [group.item(index) for index in _spread(group.indices("train"), 16)]
    items = [group.item(index) for index in _spread(group.indices("confirm"), 2)]
    with torch.inference_mode():
        with scope.record("head_output", reduce="mean") as means:
            task.predict(task.noisy_inputs(task.prepare(reference), timestep))
        inputs = task.noisy_inputs(task.prepare(items), timestep)
        clean = task.loss(inputs)
        with scope.edit({site.name: list(range(8)) for site in scope.sites}, fill=means):
            edited = task.loss(inputs)
        effect = float((edited - clean).sum() / clean.sum())
        assert summary["all_heads"]["twins"]["value"] == pytest.approx(effect, rel=1e-4)
        # of a single timestep it is the least noisy, too
        assert summary["all_heads"]["twins"]["least_noisy"]["value"] == pytest.approx(effect, rel=1e-4)
        chosen = [(entry["site"], entry["head"]) for entry in summary["ties"][0]["heads"]]
        edits = {site: [head for other, head in chosen if other == site] for site, _ in chosen}
        with scope.edit(edits, fill=means):
            effect = float((task.loss(inputs) - clean).sum() / clean.sum())
        assert summary["ties"][0]["together"]["twins"]["value"] == pytest.approx(effect, rel=1e-3, abs=1e-5)
        assert summary["clean_loss"]["twins"][str(timestep)] == pytest.approx(float(clean.mean()), rel=1e-5)
        # attention of one chosen head, materialised
        site, head = (summary["ties"][0]["heads"][0][name] for name in ("site", "head"))
        with scope.record("q", "k", reduce=None) as recording:
            task.predict(inputs)
    query, key = (recording.samples(name, site, 0, timestep)[:, head].double() for name in ("q", "k"))
    p = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1).numpy()
    mass, share = [], []
    for row, item in enumerate(items):
        # of each token the part that covers most of it, the lowest of equals
        assert item.part_mask is not None
        patches = item.part_mask.reshape(8, 4, 8, 4).transpose(0, 2, 1, 3).reshape(64, 16)
        part = np.array([np.bincount(patch, minlength=5).argmax() for patch in patches])
        glyphs = np.flatnonzero(part > 0)
        others = (part[glyphs, None] != part) & (part > 0)
        mass.append((p[row, glyphs] * others).sum(1).mean())
        share.append(others.mean(1).mean())
    found = summary["counterparts"]["twins"][f"{site} {head}"]
    np.testing.assert_allclose(found, [np.mean(mass), np.mean(share)], atol=1e-5)


def _spread(indices, count):
    return [indices[position * len(indices) // count] for position in range(count)]


def test_what_is_no_exported_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: '.*' lacks"):
        describe_heads(tmp_path, tmp_path / "work", progress=False)
