"""How far float32 may take a planted model from its truth; roundings are counted as in tests/rounding.py.

Places and colour codes are exact, and so are their logits, however they are summed: keys of one logit have one weight.
What remains are the logits of heads that follow something, which the stem rounds, and the softmax and the sums after
it. All variances are in UNIT^2.
"""

import numpy as np

from headscope.zoo.planted import PlantedForward
from headscope.zoo.planted.designs import DESIGNS, FOLLOW, SLOTS
from headscope.zoo.planted.noise import shrinkage
from rounding import CERTAINTY, UNIT

# of 9 equal bits: 9 * 64 / 4
LARGEST_LOGIT = 144.0
# keys with less of a query's attention change nothing that float32 shows
CARRIES = 1e-9


def _stem_variance(truth: PlantedForward) -> np.ndarray:
    """Of each head's logits, what the stem's rounding adds, [heads, 1, 1].

    Luminance is summed in 2 roundings of at most the largest pixel; a gradient is of luminances that count as
    6 in the variance (one of them twice), with 3 roundings of at most twice that.
    """
    largest = np.abs(truth.sample).max() ** 2
    variance = {"luminance": 2 * largest, "edge": (6 * 2 + 3 * 4) * largest}
    return FOLLOW**2 * np.array([[[variance.get(DESIGNS[head.name].attends, 0.0)]] for head in truth.heads])


def _logit_variance(truth: PlantedForward) -> np.ndarray:
    """Of the logits that differ from the row's largest, as the softmax takes them, [items, heads, queries, keys]: two
    roundings of the product (its base is 2), one of the maximum's offset, and the power's own."""
    highest = truth.logits.max(-1, keepdims=True)
    variance = 2 * truth.logits**2 + highest**2 + (highest - truth.logits) ** 2 + 4 + _stem_variance(truth)
    return np.where(highest == truth.logits, _stem_variance(truth), variance)


def entropy_tolerance(truth: PlantedForward) -> np.ndarray:
    """Nats, [items, heads, queries]: the operator's own, and what the stem's rounding adds."""
    largest = max(LARGEST_LOGIT, float(np.abs(truth.logits).max()))
    logs = np.log(np.maximum(truth.attention, 1e-300))
    sensitivity = truth.attention * (logs + truth.entropy[..., None])
    stem = CERTAINTY * UNIT * np.sqrt((np.square(sensitivity) * _stem_variance(truth)).sum(-1))
    return 1e-5 + 4 * UNIT * largest + stem


def weight_tolerance(truth: PlantedForward) -> np.ndarray:
    """Of the probabilities, [items, heads, queries, keys]: their own logits', and the normaliser's, a sum of positive
    terms."""
    variance = _logit_variance(truth)
    normaliser = (np.square(truth.attention) * variance).sum(-1) + truth.attention.shape[-1] / 2 + 2
    return CERTAINTY * UNIT * truth.attention * np.sqrt(variance + normaliser[..., None])


def mean_tolerance(truth: PlantedForward, values: np.ndarray) -> np.ndarray:
    """Of sum_j p_j value_j, [items, heads, queries].

    Args:
        values: broadcastable to [items, heads, queries, keys].
    """
    attention = np.where(truth.attention > CARRIES, truth.attention, 0.0)
    terms = (attention > 0).sum(-1)
    mean = (attention * values).sum(-1)
    logits = (np.square(attention * (values - mean[..., None])) * _logit_variance(truth)).sum(-1)
    # a sum of so many terms in any order, and its normaliser, a sum of positive ones
    products = terms * mean**2 / 3 + (terms / 6 + 2) * np.square(attention * values).sum(-1)
    normaliser = (terms / 2 + 2) * mean**2
    return CERTAINTY * UNIT * np.sqrt(logits + products + normaliser) + CARRIES


def output_tolerance(truth: PlantedForward) -> np.ndarray:
    """Of the heads' outputs, [items, heads, tokens]."""
    return mean_tolerance(truth, truth.values[:, :, None])


def prediction_tolerance(truth: PlantedForward, *, clamped: bool = True) -> np.ndarray:
    """Of the prediction, whichever heads are removed and filled, [items, 3, 32, 32].

    Args:
        clamped: False where the pair of which either suffices may be between its two states, as with means in the place
            of both.
    """
    outputs, largest = output_tolerance(truth), max(1.0, float(np.abs(truth.values).max()))
    found = np.zeros(truth.sample.shape)
    for name, slot in SLOTS.items():
        members = [number for number, head in enumerate(truth.heads) if head.slot == name]
        if members:
            # a fill errs as an output does, and there are both
            error = 2 * outputs[:, members].sum(1)
            error = error * {"both": largest, "either": 0.0 if clamped else 16.0}.get(slot.rule, 1.0)
            # the readout rounds four times
            rounded = 4 * UNIT * {"both": largest**2, "either": 1.0}.get(slot.rule, len(members) * largest)
            down, across = divmod(slot.pixel, 2)
            scaled = shrinkage()[truth.timestep] * abs(slot.gain) * (error + rounded)
            found[:, slot.channel, down::2, across::2] = scaled.reshape(-1, 16, 16)
    return found


def loss_tolerance(truth: PlantedForward, loss: np.ndarray, *, clamped: bool = True) -> np.ndarray:
    """Of the loss, whichever heads are removed, [items]: the mean of 2 |error| tolerance, by Cauchy and Schwarz."""
    tolerance = _rms(prediction_tolerance(truth, clamped=clamped))
    return 2 * np.sqrt(loss) * tolerance + tolerance**2


def gradient_tolerance(truth: PlantedForward, target: np.ndarray, derivative: np.ndarray) -> np.ndarray:
    """Of g, [items, heads]: of both factors of the mean of error times derivative, and of float32's sum of it.

    Args:
        derivative: `truth.derivative(fill)`.
    """
    error, tolerance = truth.prediction() - target, prediction_tolerance(truth)
    own = derivative != 0
    of_error = _rms(derivative) * _rms(tolerance)[:, None]
    of_derivative = np.sqrt(np.square(error[:, None] * own).mean((2, 3, 4))) * _rms(tolerance)[:, None]
    products = np.square(derivative * error[:, None]).sum((2, 3, 4))
    summed = CERTAINTY * UNIT * np.sqrt((256 / 6 + 8) * products + 256 / 3 * products) / 3072
    return 2 * (of_error + of_derivative + summed)


def projected_tolerance(truth: PlantedForward, derivative: np.ndarray) -> np.ndarray:
    """Of d <v, prediction> / d gate for v of +-1, [items, heads]; tokens may err alike."""
    own = derivative != 0
    tolerance = (prediction_tolerance(truth)[:, None] * own).sum((2, 3, 4))
    return tolerance + CERTAINTY * UNIT * np.sqrt(256 * np.square(derivative).sum((2, 3, 4)))


def _rms(images: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(images).mean((-3, -2, -1)))
