"""What there is: the attention modules of a denoiser, and what their tokens are.

Reading order: source (what a module's source says), order (in which order modules run), sites (the attention modules),
layout (which tokens are image, text or frames)."""
