"""Everything that open contexts put into a denoiser and into torch."""

from collections.abc import Mapping

from torch import nn

from headscope.models.hooks import routing
from headscope.models.hooks.caches import HookWatch
from headscope.models.hooks.routing import Frame
from headscope.models.hooks.wrapping import ForwardWrap, Watched


class Attachment:
    """The routed attention, the observed modules and the bracket around the denoiser's forward, until `remove`.

    Args:
        called: the module that users call: the denoiser, or what torch.compile made of it.
        frames: by the name of each attention site, the frame that its attention is sent to.
        watched: told of the denoiser's forwards.

    Attributes:
        sites: the names of the observed sites.
        hooks: the denoiser's hooks of diffusers, which may leave a site out.

    Raises:
        RuntimeError: another Scope is active on the model.
    """

    def __init__(self, called: nn.Module, frames: Mapping[str, Frame], watched: Watched) -> None:
        denoiser: nn.Module = getattr(called, "_orig_mod", called)
        modules = dict(denoiser.named_modules())
        if any(routing.is_observed(modules[name]) for name in frames):
            raise RuntimeError(
                "another Scope is active on this model, or a part of it, and each would hide attention from the other;"
                " use one Scope for both"
            )
        self.sites = tuple(frames)
        self.hooks = HookWatch(denoiser)
        self._watched = watched
        self._observed: list[nn.Module] = []
        self._wrap: ForwardWrap | None = None
        self._routed = False
        # Ctrl-C may come half way, too
        try:
            for name, frame in frames.items():
                self._observed.append(modules[name])
                routing.observe(modules[name], frame)
            self._wrap = ForwardWrap(called, watched)
            routing.install()
            self._routed = True
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model and torch as they were."""
        if self._routed:
            routing.uninstall()
            self._routed = False
        # where Ctrl-C came between a forward's end and our own
        routing.unwatch(self._watched)
        for module in self._observed:
            routing.forget(module)
        self._observed.clear()
        if self._wrap is not None:
            self._wrap.remove()
            self._wrap = None
        self.hooks.remove()
