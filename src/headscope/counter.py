"""Random numbers addressed by a key: the same on every machine, in any order of calling.

A key is a sequence of strings and integers, such as ("noise", "faces/3", 500, 0). Its sha256 becomes the key of a
Philox counter generator, of which only the raw 64-bit stream is used, because NumPy guarantees that one across
versions. The step from bits to numbers is done here, and with nothing but additions, multiplications, divisions and
square roots, all of which IEEE 754 rounds correctly; the C library's logarithm and sine, which differ in the last
bit between machines, take no part.
"""

from __future__ import annotations

import hashlib
import math
import operator

import numpy as np

__all__ = [
    "LARGEST_SEED",
    "check_seed",
    "check_whole",
    "counter_integers",
    "counter_normal",
    "counter_permutation",
    "counter_uniform",
]

_KEY_DOMAIN = b"headscope.zoo.counter/1"

# tables hold seeds in 32 bits
LARGEST_SEED = 2**31 - 1


def check_whole(name: str, number: object) -> None:
    """Raises ValueError for what counts nothing: 2.5, True, "2"."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name}: got {number!r}, expected a whole number")


def whole(name: str, number: object, least: int | None = None) -> int:
    """The number as Python's own int, of NumPy's kinds too. Raises as `check_whole`, and ValueError below `least`."""
    number = number.item() if isinstance(number, np.integer) else number
    check_whole(name, number)
    assert isinstance(number, int)
    if least is not None and number < least:
        raise ValueError(f"{name}: got {number}, expected at least {least}")
    return number


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that results couldn't be labelled with."""
    check_whole("seed", seed)
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed: got {seed}, expected 0 to {LARGEST_SEED}")


def _raw(key: tuple[str | int, ...], count: int) -> np.ndarray:
    """`count` raw 64-bit words of the stream that `key` names, uint64 [count]."""
    digest = hashlib.sha256(_KEY_DOMAIN)
    for part in key:
        if isinstance(part, str):
            encoded = b"s" + part.encode()
        elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
            encoded = b"i" + str(int(part)).encode()
        else:
            raise TypeError(f"key: got a part {part!r} of type {type(part).__name__}, expected str or int")
        # the length makes ("ab", "c") and ("a", "bc") different keys
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    words = np.frombuffer(digest.digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=words, counter=0).random_raw(count)


def _size(shape: int | tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(dimension < 0 for dimension in dimensions):
        raise ValueError(f"shape: got {shape}, expected dimensions of at least 0")
    return dimensions, math.prod(dimensions)


def counter_uniform(*key: str | int, shape: int | tuple[int, ...] = ()) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [*shape], multiples of 2^-53."""
    dimensions, count = _size(shape)
    return ((_raw(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(dimensions)


def counter_integers(*key: str | int, high: int, shape: int | tuple[int, ...] = ()) -> np.ndarray:
    """Integers in [0, high), int64 [*shape]; high at most 2^32, where the bias is below 2^-21."""
    high = operator.index(high)
    if not 1 <= high <= 2**32:
        raise ValueError(f"high: got {high}, expected 1 to 2**32")
    return np.floor(counter_uniform(*key, shape=shape) * high).astype(np.int64)


def counter_permutation(*key: str | int, count: int) -> np.ndarray:
    """A permutation of 0 ... count - 1, int64 [count]."""
    return np.argsort(_raw(key, count), kind="stable").astype(np.int64)


def counter_normal(*key: str | int, shape: int | tuple[int, ...] = ()) -> np.ndarray:
    """Standard normal numbers, float64 [*shape], by the Box-Muller transform.

    Each number uses two words of the key's stream, so a longer shape starts with the numbers of a shorter one.
    """
    dimensions, count = _size(shape)
    words = _raw(key, 2 * count) >> np.uint64(11)
    # (0, 1]: the logarithm of 0 never comes up
    radius = np.sqrt(-2.0 * _log((words[0::2].astype(np.float64) + 1.0) * 2.0**-53))
    return (radius * _cos_turns(words[1::2].astype(np.float64) * 2.0**-53)).reshape(dimensions)


def _log(values: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive finite float64 values, within 2 units in the last place of 1."""
    mantissa, exponent = np.frexp(values)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    # ln m = 2 artanh s, |s| < 0.172: the series is exact to float64 after s^23
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    series = np.full_like(ratio, 1.0 / 23.0)
    for denominator in range(21, 0, -2):
        series = series * square + 1.0 / denominator
    return exponent * 0.6931471805599453 + 2.0 * ratio * series


def _cos_turns(turns: np.ndarray) -> np.ndarray:
    """cos(2 pi turns) for turns in [0, 1)."""
    # reduced exactly to the nearest quarter turn, then at most an eighth of a turn remains
    quarter = np.floor(turns * 4.0 + 0.5)
    angle = (turns - quarter * 0.25) * 6.283185307179586
    square = angle * angle
    cosine = np.full_like(angle, 1.0 / math.factorial(16))
    sine = np.full_like(angle, 1.0 / math.factorial(17))
    for half in range(7, -1, -1):
        cosine = 1.0 / math.factorial(2 * half) - square * cosine
        sine = 1.0 / math.factorial(2 * half + 1) - square * sine
    sine = sine * angle
    phase = quarter.astype(np.int64) % 4
    return np.select([phase == 0, phase == 1, phase == 2], [cosine, -sine, -cosine], sine)
