"""kill -9 at chosen moments, then a run to the end."""

import subprocess
import sys
import time
from collections.abc import Iterable


def finish(script: str, *arguments: str) -> float:
    """Run a script in a process of its own to its end; how long it took, in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def kill_then_finish(script: str, *arguments: str, delays: Iterable[float]) -> None:
    """Start the script, which prints "ready" when its work begins, and kill it so many seconds later, each in turn."""
    for delay in delays:
        command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.kill()
    finish(script, *arguments)
