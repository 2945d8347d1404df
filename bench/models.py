"""Denoisers with headscope watching them, beside what a user would pick otherwise, into bench/results.

    python bench/models.py [--model sd15] [--device cuda --dtype float16] [--rounds 11]

The same as `headscope bench --out bench/results`. Ways are interleaved round by round; a ratio is the median
over rounds, with its quartiles.
"""

import sys

from headscope.cli import app

if __name__ == "__main__":
    app(["bench", "--out", "bench/results", *sys.argv[1:]])
