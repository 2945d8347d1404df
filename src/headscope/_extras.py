"""Optional dependencies, imported when they are first needed."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import and return `module`, or say which extra of headscope brings it.

    `module` is a dotted module name; `extra` the name of the extra in headscope's metadata.
    Raises ImportError, naming the module, the extra and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); it comes with the extra {extra!r}: "
            f"pip install 'headscope[{extra}]'"
        ) from error
