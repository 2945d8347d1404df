"""A backend that a test needs."""

import pytest

from headscope.ops import backend_status


def require_backend(name: str) -> None:
    """Skip where a backend can't be here; fail where it should be."""
    reason = backend_status()[name]
    if reason is None:
        return
    if name == "cpu" and "source" in reason:
        pytest.skip(reason)
    pytest.fail(f"backend {name} should be available: {reason}")
