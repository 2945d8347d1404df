"""How attention is reached: torch's function is replaced while a Scope's contexts are open.

Reading order: overrides (what stands in the place of torch's function), routing (which attention module a call comes
from), wrapping (the denoiser's own call), branches (conditional or not), forwards (one run of the denoiser), caches
(diffusers hooks that leave attention out)."""
