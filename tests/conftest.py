"""Settings that must come before torch and Triton are imported, and models that several folders use."""

import os
import signal

import pytest

from interpreter import replace_once_a_launch
from minutes import (  # noqa: F401 - pytest finds its hooks here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)

# without a GPU the Triton kernels run in Triton's interpreter; the choice is made when triton is first imported
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# two processes of two spinning threads each would slow each other down many times over
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell that starts tests in the background has them ignore Ctrl-C, and some tests are about what it does
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# before headscope is imported: from then on the dimensions in its annotations are checked
import shapes

shapes.install()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    replace_once_a_launch()


@pytest.fixture(scope="session")
def ddpm_directory(tmp_path_factory):
    """A tiny pixel-space pipeline on disk, as `--model DIR` takes it."""
    import tiny

    path = tmp_path_factory.mktemp("ddpm")
    tiny.ddpm(size=32).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def diffusion_directory(tmp_path_factory):
    """A tiny text-to-image pipeline on disk."""
    import tiny

    path = tmp_path_factory.mktemp("stable_diffusion")
    tiny.stable_diffusion().save_pretrained(path)
    return str(path)
