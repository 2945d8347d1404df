"""What a sweep is to do, before any work starts.

Reading order: config (what is asked), choosing, items, sources and texts (images, prompts and timesteps), in_memory
(a model that isn't on disk), units (the pieces of work)."""
