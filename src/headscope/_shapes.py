"""The names of dimensions in annotations, and the shapes that many functions share.

`Float[Tensor, "batch heads queries dim"]` is a floating-point tensor of four dimensions. Within the arguments and the
result of one function a name stands for one size. `#batch` is that size or 1, `_length` any size, and `...` any number
of dimensions. Annotations cost nothing when the code runs; the tests check them (tests/shapes.py), and they alone need
jaxtyping.

    batch       samples
    heads       attention heads; kv_heads: those of keys and values, a divisor of heads
    queries     tokens that attend
    keys        tokens that are attended to
    dim         channels of each query and key; dim_v: of each value
    groups      groups of keys
    rows        of a batch inside a Scope: samples, times guidance branches, times frames where each attends by itself
    items       images with their prompts; channels, height, width: of images, or of latents
"""

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int32, Int64, Integer, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Float64, Int32, Int64, Integer, Shaped, UInt8
    except ImportError:

        class _Noted:
            """A shape as a note for people, where jaxtyping isn't installed."""

            def __class_getitem__(cls, shape: tuple[Any, str]) -> Any:
                return Annotated[shape]

        Bool = Float = Float64 = Int32 = Int64 = Integer = Shaped = UInt8 = _Noted

# logits, probabilities and gradients with respect to them
Scores = Float[Tensor, "batch heads queries keys"]
# the indices of a piece's queries in the whole call
RowIndices = Int64[Tensor, " queries"]
# added to the logits, or True where a query may attend to a key
Mask = Bool[Tensor, "#batch #heads #queries #keys"] | Float[Tensor, "#batch #heads #queries #keys"]
# gate and temperature of an edit
PerHead = Float[Tensor, "#batch heads"]
# key_bias and key_scale of an edit
PerKey = Float[Tensor, "#batch #heads keys"]
# an edit's fill, which takes the place of a removed head's output
FillTensor = Float[Tensor, "#batch #heads #queries #dim_v"]
# a number for each query
RowValue = Float[Tensor, "batch heads queries"]
# its gradient; several: one for each of as many cotangents
RowGradient = Float[Tensor, "*several batch heads queries"]
# a number for each query and group of keys
GroupValue = Float[Tensor, "batch heads queries groups"]
# a statistic's result: a number or a vector for each row, or a number for each key
StatisticValue = Float[Tensor, "batch heads ..."]
# its gradient: of the same shape, or with a dimension in front for several cotangents
StatisticGradient = Float[Tensor, "..."]
# what a statistic's formula reads beside the probabilities
StatisticTensor = Int32[Tensor, "#batch #heads _length"] | Float[Tensor, "#batch #heads _length"]
StatisticTensors = tuple[StatisticTensor, ...]
# queries, keys and values of a site's attention call; keys have a head for each group of heads, or one for each that is
# patched
SiteQuery = Float[Tensor, "rows heads queries dim"]
SiteKey = Float[Tensor, "rows _key_heads keys dim"]
SiteValue = Float[Tensor, "rows _key_heads keys dim_v"]
SiteOutput = Float[Tensor, "rows heads queries dim_v"]
# images or latents, with or without noise, and what a denoiser answers
Sample = Float[Tensor, "items channels height width"]
# images for people to look at
Images = UInt8[np.ndarray, "items height width 3"]
# another input of a denoiser, such as a prompt's tokens
Conditioning = Shaped[Tensor, "items ..."]
# a score of each item
ItemScore = Float64[Tensor, " items"]
