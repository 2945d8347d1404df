"""Recorded statistics and tensors of attention modules, and the tables, maps and plots made of them.

Reading order: parts (statistics by query group), tensors (head outputs, q, k, v), tables (statistics as rows), plots,
recording (what `scope.record` gives); prompts and tokens (the words of a prompt), maps (what attends to each of them).
"""
