"""The command: stages in order of value, each in a separate process, as long as the budget holds them."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from card.stage import ROOT, die_with_parent


@dataclass(frozen=True)
class Stage:
    """A stage's expected time.

    Attributes:
        seconds: expected on a card with 16 cores; of the last, what makes a start worth it: it takes what is left.
        timed: nothing else may run beside it; the next stage is prepared beside one that isn't.
    """

    seconds: float
    timed: bool = True


STAGES = {
    "smoke": Stage(40, timed=False),
    "speed": Stage(95),
    "contract": Stage(120, timed=False),
    "model": Stage(60),
    "sweep": Stage(90),
    "rest": Stage(60),
}
MODES = {
    "rehearse": "without a GPU: every line, and numbers that mean nothing",
    "compile": "without a GPU: each stage's kernels, for sm_90, and what compiling them costs",
}
# for a stage that takes longer than expected, at the expense of later ones
PATIENCE = 1.5
# to write what it has and end
GRACE = 5.0


class Running:
    """A stage's process, from its preparation on."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.unlimited = name, options.mode == "compile"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "card.stage", name, "--out", str(options.out), "--mode", options.mode],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def finish(self, seconds: float) -> str:
        """Gives the stage its turn; how it ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{time.monotonic() + seconds:.3f}\n")
            self.process.stdin.flush()
        try:
            code = self.process.wait(None if self.unlimited else seconds + GRACE)
        except subprocess.TimeoutExpired:
            self.end()
            return f"cut off after {seconds + GRACE:.0f} s"
        self.end()
        return "done" if code == 0 else f"failed, code {code}"

    def end(self) -> None:
        """With everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_stages(names: list[str], options: argparse.Namespace) -> dict[str, str]:
    """Run the stages; returns how each ended."""
    started = time.monotonic()
    ends: dict[str, str] = {}
    prepared: Running | None = None
    for index, name in enumerate(names):
        left = options.budget - (time.monotonic() - started)
        expected = STAGES[name].seconds
        if left < expected:
            ends[name] = f"skipped: {left:.0f} s are left, it takes {expected:.0f}"
            print(f"== {name} {ends[name]}", flush=True)
            continue
        print(f"== {name}, {time.monotonic() - started:.0f} s", flush=True)
        later = sum(STAGES[other].seconds for other in names[index + 1 :])
        seconds = left if options.mode == "rehearse" else min(left, max(PATIENCE * expected, left - later))
        running = prepared if prepared and prepared.name == name else Running(name, options)
        prepared = None
        following = names[index + 1 : index + 2]
        beside = options.mode != "compile" and not STAGES[name].timed
        if beside and following and left - expected >= STAGES[following[0]].seconds:
            prepared = Running(following[0], options)
        ends[name] = running.finish(seconds - GRACE)
        print(f"== {name}: {ends[name]}", flush=True)
    if prepared:
        prepared.end()
    return ends


def main(description: str) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (540)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where gpu-STAGE.json go")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"by name, in order: {','.join(STAGES)}")
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="measure", help=text)
    parser.add_argument("--needs", action="store_true", help="the packages that stages need, and which are missing")
    options = parser.parse_args()
    if options.mode == "compile":
        options.budget = float("inf")
    if options.needs:
        from card.needs import show

        return show()
    names = [name for name in options.stages.split(",") if name]
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"--stages: got {', '.join(unknown)}, expected names out of {', '.join(STAGES)}")
    if not options.budget > 0:
        parser.error(f"--budget: got {options.budget:g}, expected a positive number of seconds")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    folders = [ROOT / "bench", ROOT / "src", ROOT / "kernels", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if str(folder))
    os.environ["TRITON_INTERPRET"] = "1" if options.mode == "rehearse" else "0"
    ends = run_stages(names, options)
    from card.summary import show as summary

    print(summary(options.out, ends), flush=True)
