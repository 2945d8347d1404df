"""The attention modules of a denoiser (its sites), and what their tokens are.

Reading order: source (a function's source, parsed), order (in which order modules run), sites (the attention modules),
index (sites by their names), layout (which tokens are image, text or frames)."""
