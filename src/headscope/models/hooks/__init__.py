"""The way to the attention of a running model: torch's function is replaced while a Scope's contexts are open.

Reading order: overrides (what else users put in place of torch's function), routing (sends each attention call to the
module that makes it), branches (guidance branches: with the prompt, without it), forwards (one run of the denoiser),
calls (one attention call in it), wrapping (begin and end of the denoiser's forward), caches (diffusers' hooks that
leave attention out), attachment (puts all of that in place), contexts (what a Scope has open, told of each forward).
Besides: passing (layers that gradients of head gates only pass through).
"""
