"""The backward: its tiles (configs), its arguments, what its kernels share (tiles), four kernels, and their launch.

row_terms runs first; key_value_gradient, query_gradient and mask_gradient read what it wrote.
"""
