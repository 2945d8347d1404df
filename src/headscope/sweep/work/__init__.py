"""Who does it: processes that share the units of a run.

Reading order: runner (the whole), worker (one process's share), behind (reading ahead, writing behind), progress,
executors (where the processes run)."""
