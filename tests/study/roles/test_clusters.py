"""Clusters of heads: planted ones are found, none are made of one cloud."""

import numpy as np
import pytest

from headscope.study.roles.clusters import adjusted_rand, cluster_heads


def profiles(centres, heads, sources=24, spread=0.1, noise=0.3, seed=0):
    """[sources, heads, columns]; every centre has so many heads."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.asarray(centres, float), heads, axis=0)
    places = places + spread * generator.normal(size=places.shape)
    return places + noise * generator.normal(size=(sources, *places.shape))


def test_adjusted_rand_by_hand():
    # Hubert and Arabie: pairs together in both 2; in the first 6, in the second 4; of 15
    first, second = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    assert adjusted_rand(first, second) == pytest.approx((2 - 6 * 3 / 15) / ((6 + 3) / 2 - 6 * 3 / 15))
    assert adjusted_rand(first, first[::-1]) == 1
    assert adjusted_rand(np.zeros(4, int), np.zeros(4, int)) == 1


def test_three_planted_clusters_are_found():
    centres = [[0, 0, 0, 0], [3, 0, 3, 0], [0, 3, 0, 3]]
    labels, table = cluster_heads(profiles(centres, 8), np.array(list("abcc")), 0)
    assert table.filter("chosen")["clusters"].to_list() == [3]
    assert [len(set(part)) for part in np.split(labels, 3)] == [1, 1, 1]
    assert len(set(labels)) == 3
    row = table.filter("chosen").row(0, named=True)
    assert row["agreement"] > row["chance_high"]


@pytest.mark.full
def test_one_cloud_is_seldom_cut():
    cut = 0
    for seed in range(20):
        cloud = profiles([[0, 0, 0, 0]], 24, spread=1.0, seed=seed)
        labels, table = cluster_heads(cloud, np.array(list("abcc")), seed)
        cut += table["chosen"].any()
        assert table["chosen"].any() == (len(set(labels)) > 1)
    # more than 4 of 20 at 5 % has a chance of 0.3 %
    assert cut <= 4


def test_kinds_of_number_count_alike_whatever_their_units():
    data = profiles([[0, 0, 0, 0], [3, 0, 3, 0], [0, 3, 0, 3]], 8)
    blocks = np.array(list("abcc"))
    scaled = data * np.array([1e3, 1, 1e-3, 1e-3])
    for one, two in zip(cluster_heads(data, blocks, 0), cluster_heads(scaled, blocks, 0), strict=True):
        np.testing.assert_allclose(np.array(one, dtype=float), np.array(two, dtype=float), rtol=1e-6)


@pytest.mark.parametrize("shape", [(24, 3, 4), (3, 24, 4), (24, 24, 0)])
def test_too_few_heads_sources_or_numbers_are_one_cluster(shape):
    data = np.random.default_rng(0).normal(size=shape)
    labels, table = cluster_heads(data, np.array(list("abcc")[: shape[2]], dtype=str), 0)
    assert labels.tolist() == [1] * shape[1]
    assert len(table) == 0
    assert table.columns == ["clusters", "agreement", "chance", "chance_high", "chosen"]
