"""Run by the test machine: pytest, with each report written to a serial port as a line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

PORT = "/dev/ttyS1"


class Reporter:
    """Passes on what pytest reports."""

    def __init__(self, config: pytest.Config | None = None) -> None:
        self._port = open(PORT, "w")  # noqa: SIM115  as long as the process
        self._config: Any = config

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._say(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(report)

    def _say(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._port.write(json.dumps(data) + "\n")
        self._port.flush()


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:], plugins=[Reporter()]))
