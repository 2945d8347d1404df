"""Settings that must come before torch and Triton are imported."""

import os

# without a GPU the Triton kernels run in Triton's interpreter; the choice is made when triton is first imported
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
