"""The places where the processes of a sweep run: here, this machine's devices, a Ray cluster, a Slurm array.

All of them call `work.worker.work` on the same run directory, and units are claimed there. How many there are changes
nothing else.
"""

EXECUTORS = ("local", "processes", "ray", "slurm")

__all__ = ["EXECUTORS"]
