"""headscope: see and edit what every attention head of a diffusion model does."""

__version__ = "0.1.0"
