"""Grey images with one histogram: what is left of a difference between groups when contrast can't be what makes it.

Exact histogram specification (Coltuc, Bolon and Chassery 2006): the pixels of an image are put in one strict order, and
the one of rank r gets the level that the common histogram has at that rank. So every image of a size has the very same
levels, each as often. Pixels of one level are ordered by the sums of the 3 x 3, then of the 5 x 5 pixels around them,
borders repeated, and those that are still alike by their place. All of that is done in integers.
"""

from __future__ import annotations

import numpy as np

__all__ = ["HISTOGRAM", "with_common_histogram"]

# how often each level occurs in the training images of lfw and faces_grey together, 60 of either with 1,024 pixels each
_COUNTS = """
    110 86 70 66 74 81 92 110 119 145 171 161 161 193 182 185 201 214 234 225 252 271 280 317 296 288 310 291 262
    317 298 271 301 290 280 294 325 322 333 338 302 365 415 354 412 441 424 397 399 457 433 451 477 480 503 501 508
    465 542 529 494 547 501 567 573 564 553 575 536 579 592 578 670 646 644 647 644 660 662 676 712 704 690 675 716
    737 663 757 740 747 726 756 780 718 799 767 750 797 824 823 844 860 860 916 889 870 901 909 916 963 955 953 956
    1003 1029 1043 985 992 1045 1044 1013 1015 892 1011 924 960 896 950 937 980 1002 1002 1005 1037 1060 997 1027
    1023 986 939 954 971 918 901 839 806 854 781 734 779 764 856 798 810 906 807 816 845 781 698 695 719 722 678 704
    677 661 672 635 622 585 517 547 509 510 439 478 429 440 410 383 392 395 385 395 348 332 315 269 285 310 288 285
    288 270 265 271 291 281 254 250 234 249 221 191 183 186 201 164 151 177 154 178 155 135 141 136 118 104 117 115
    90 97 98 88 85 77 85 60 70 70 50 61 79 56 51 60 51 50 44 37 24 30 23 14 17 22 15 6 15 10 15 16 12 36 88
"""
HISTOGRAM = np.array(_COUNTS.split(), np.int64)


def with_common_histogram(image: np.ndarray) -> np.ndarray:
    """A grey image with the levels of `HISTOGRAM`, uint8 [height, width, 3] with three channels alike, as `image` is.

    Raises:
        ValueError: the channels differ.
    """
    grey = image[..., 0]
    if (image != grey[..., None]).any():
        raise ValueError("image: its channels differ, expected a grey one")
    places = np.arange(grey.size)
    near, wide = (_sums(grey, reach).ravel() for reach in (1, 2))
    order = np.lexsort((places, wide, near, grey.ravel()))
    # the level whose share of the histogram holds the middle of the rank's
    cumulative = np.cumsum(HISTOGRAM)
    levels = np.searchsorted(cumulative * 2 * grey.size, (2 * places + 1) * cumulative[-1], side="right")
    matched = np.empty(grey.size, np.uint8)
    matched[order] = levels
    return np.repeat(matched.reshape(grey.shape)[..., None], 3, axis=-1)


def _sums(grey: np.ndarray, reach: int) -> np.ndarray:
    """Of each pixel the sum over those that are at most so far away in rows and columns, int64."""
    padded = np.pad(grey.astype(np.int64), reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return windows.sum(axis=(2, 3))
