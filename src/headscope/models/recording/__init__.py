"""Recorded statistics and tensors of attention modules, and the tables, maps and plots made of them.

Reading order: regions (masks of the picture at an attention call), parts (statistics by query group and class), tensors
(head outputs, q, k, v), tables (statistics as rows), plots, recording (what `scope.record` gives), context (what it
takes); prompts and tokens (the words of a prompt), maps (what attends to each of them).
"""
