"""Processes that share the units of a run.

Reading order: launch (a whole sweep); worker (one process's share); behind (reading ahead, writing behind); progress
(what a person sees); executors (where the processes run).
"""
