"""Features of an image: what a head may attend to, as a map of numbers over the pixels, or over the tokens of a grid.

Reading order: features (which there are, and those of an item); pixels (their formulas); tokens (from pixels to tokens,
how much of a map a grid resolves, and maps of places alone).
"""

from headscope.features.features import (
    BUILT_IN,
    COUNTERPART,
    ON_FEATURE,
    PART,
    Feature,
    FeatureItem,
    OwnFeature,
    columns_of,
    described,
    feature_map,
    feature_maps,
    has_feature,
    pixels_of,
)
from headscope.features.relations import Relation, relation
from headscope.features.tokens import on_tokens, position_maps, resolved, top_quarter

__all__ = [
    "BUILT_IN",
    "COUNTERPART",
    "ON_FEATURE",
    "PART",
    "Feature",
    "FeatureItem",
    "OwnFeature",
    "Relation",
    "columns_of",
    "described",
    "feature_map",
    "feature_maps",
    "has_feature",
    "on_tokens",
    "pixels_of",
    "position_maps",
    "relation",
    "resolved",
    "top_quarter",
]
