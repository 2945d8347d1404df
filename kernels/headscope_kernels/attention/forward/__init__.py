"""The forward: its arguments, its tiles (configs, candidates), the kernel with the formulas, and its launch."""
