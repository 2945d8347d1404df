"""A sweep on paper: everything that is decided before any work starts.

Reading order: sets (heads edited together), config (the configuration); choosing, texts, sources, in_memory and items
(images, prompts and the model); heads (the heads to edit); functions (scores and tasks of the user's); units (units of
work and their kinds); planning (the plan).
"""
