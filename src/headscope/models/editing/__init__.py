"""Edits of attention heads, as a user writes them and as one attention call needs them.

Reading order: edits (what can be asked, and its checks), rows (one attention call and the samples of its rows), editing
(from what was asked to the changes of one call), combining (several changes as one call of the operator).
"""
