"""What is changed: edits as a user writes them, and as one attention call needs them.

Reading order: edits (what can be asked), editing (from there to the edit of one call)."""
