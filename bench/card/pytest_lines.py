"""A plugin for pytest: each test's outcome as a line of JSON at once, and no test after a lost card.

    python -m pytest -p card.pytest_lines ...

A process of xdist in which the card was lost, or in which a test hangs, ends; xdist starts another one and goes on with
the other tests. That it ended is reported once more, for the same test, as a crash.
"""

import faulthandler
import json
import os
import sys
from typing import Any

from card.workers import is_broken

# a first call of every edit compiles for long
HANGS_AFTER = 100.0
MARK = "told: "
_worker = "PYTEST_XDIST_WORKER" in os.environ
_lost = False


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Kernels first: plain torch on a GPU is the less of a surprise."""
    items.sort(key=lambda item: "portable" in item.nodeid)


def pytest_runtest_logstart() -> None:
    if _worker:
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)


def pytest_runtest_logreport(report: Any) -> None:
    global _lost
    reason = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr)
        _lost = _lost or is_broken(reason)
    if not _worker and (report.failed or report.when == "call" or report.skipped):
        line = {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "seconds": report.duration}
        print(f"\n{MARK}{json.dumps(line | {'reason': reason[:1500]})}", flush=True)


def pytest_runtest_logfinish() -> None:
    if _worker:
        faulthandler.cancel_dump_traceback_later()
        if _lost:
            sys.stdout.flush()
            os._exit(3)
