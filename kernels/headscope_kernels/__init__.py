"""Triton kernels of headscope; imports torch and triton only."""
