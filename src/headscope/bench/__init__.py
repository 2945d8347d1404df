"""How fast denoisers run with headscope watching them, beside what else one could do.

Reading order: configurations (models and what they take), denoisers (pipelines around them), encoders (prompts, for
sweeps), ways (stock, headscope, its peers), measure (seconds, bytes, operations), results (table, plot, file).
"""

from headscope.bench.denoisers import DENOISERS
from headscope.bench.results import Settings, run_bench

__all__ = ["DENOISERS", "Settings", "run_bench"]
