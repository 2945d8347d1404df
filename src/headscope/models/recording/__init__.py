"""What is seen: statistics and tensors of attention modules, and the tables, maps and plots made of them.

Reading order: recording (what a context records), tensors (head outputs, q, k and v), tables (as rows), maps and
prompts (what each token of a prompt attends to), plots."""
