"""A limit on how long the slow tests may take, whatever the machine: `--minutes`, which the gate sets.

The files come in an order drawn from `--order`, so that what a slow machine leaves out at one commit comes at another;
what was left out is counted at the end.
"""

import hashlib
import time

import pytest

LEFT_OUT = "the minutes that it had were over"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="begin no test later than this many minutes after the first")
    parser.addoption("--order", help="any text, such as a commit: with it, test files run in an order drawn from it")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    text = config.getoption("--order")
    if text:
        # within a file as they stand, since they share what is set up for it
        items.sort(key=lambda item: hashlib.sha256(f"{text} {item.nodeid.partition('::')[0]}".encode()).digest())


class Limit:
    def __init__(self, minutes: float) -> None:
        self.seconds, self.began = 60 * minutes, None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        if now - self.began > self.seconds:
            pytest.skip(LEFT_OUT)


def pytest_configure(config: pytest.Config) -> None:
    minutes = config.getoption("--minutes")
    if minutes is not None:
        config.pluginmanager.register(Limit(minutes))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(LEFT_OUT in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_sep("=", f"{count} tests left out: {LEFT_OUT}", yellow=True)
