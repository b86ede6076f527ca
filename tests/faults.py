"""The fault table: a line a fault, with what was measured, and `N passed, N failed` last. `make faults` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


class Table:
    """Prints each outcome as it comes."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        self.passed += report.passed
        self.failed += not report.passed
        name = report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")
        measured = "".join(f"; {what}: {value}" for what, value in report.user_properties)
        print(f"{'passed' if report.passed else 'FAILED'}  {name} ({report.duration:.0f} s{measured})", flush=True)
        if not report.passed:
            print(report.longreprtext, flush=True)


def main() -> int:
    table = Table()
    # pyproject.toml's options are for `make test`, which leaves the slow ones out and prints in pytest's own way
    arguments = ["-o", "addopts=", "-m", "fault", "-p", "no:terminal", *sys.argv[1:]]
    status = pytest.main([*arguments, str(Path(__file__).parent)], plugins=[table])
    print(f"{table.passed} passed, {table.failed} failed")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
