"""The fault table: a line a fault, with what was measured, and `N passed, N failed` at the end. `make faults` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ["test_faults.py", "test_state.py", "test_guard.py", "test_world.py", "test_data.py", "test_stream.py"]


class Table:
    """Prints each outcome as it comes."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.passed += report.outcome == "passed"
        self.failed += report.outcome != "passed"
        name = report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")
        measured = "".join(f", {what} {value}" for what, value in report.user_properties)
        print(f"\r{report.outcome:7s} {name} ({report.duration:.1f} s{measured})", flush=True)
        if report.outcome != "passed":
            print(report.longreprtext)


def main() -> int:
    table = Table()
    words = ["-m", "slow or not slow", "-k", "fault or kill or disk or nan or slow or guard or resume or shard", "-p", "no:terminal"]
    status = pytest.main([*words, *[str(HERE / name) for name in FILES]], plugins=[table])
    print(f"{table.passed} passed, {table.failed} failed")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
