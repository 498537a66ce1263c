"""The tests of this directory run in a virtual machine, which has a kernel with nbd.

Here they are only collected; then one machine for each kernel runs all that were selected and
sends pytest's own reports back.  A test names its kernel with ``@pytest.mark.kernel("6.12")``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

INSIDE = "PYEROFS_TEST_VM"  # set in the guest
HERE = Path(__file__).parent
DEFAULT = "6.1"
PATIENCE = 120.0  # seconds without any report, emulated and on a busy machine

pytest.register_assert_rewrite("tests.vm.tools")

Reports = dict[str, list[pytest.TestReport]]
_ran: dict[str, Reports | str] = {}  # by kernel: the reports by test, or why there are none


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel(version): which kernel a test of tests/vm needs")


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Show what the machine said in place of running the test."""
    if INSIDE in os.environ or HERE not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures that tests have measured inside."""
    found = [
        line.removeprefix("@@ ")
        for ran in _ran.values()
        if not isinstance(ran, str)
        for reports in ran.values()
        for report in reports
        if report.when == "call"
        for line in report.capstdout.splitlines()
        if line.startswith("@@ ")
    ]
    if found:
        terminalreporter.section("measured in the machine")
        for line in found:
            terminalreporter.line(line)


def _kernel_of(item: pytest.Item) -> str:
    mark = item.get_closest_marker("kernel")
    return str(mark.args[0]) if mark else DEFAULT


def _reports_of(item: pytest.Item) -> list[pytest.TestReport]:
    version = _kernel_of(item)
    if version not in _ran:
        wanted = [
            other.nodeid
            for other in item.session.items
            if HERE in other.path.parents and _kernel_of(other) == version
        ]
        _ran[version] = _boot(item, version, wanted)
    found = _ran[version]
    if isinstance(found, str):
        return [_report(item, "skipped", (str(item.path), 0, f"Skipped: {found}"))]
    missing = "the machine came to its end before this test did (see the console)"
    return found.get(item.nodeid) or [_report(item, "failed", missing)]


def _report(item: pytest.Item, outcome: Any, why: Any) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, why, "setup")


def _boot(item: pytest.Item, version: str, wanted: list[str]) -> Reports | str:
    from tests.vm import kernels, machine

    config = item.config
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    scratch = factory.mktemp(f"vm-{version}")
    try:
        machine.check()
        kernel = kernels.kernel(version)
    except kernels.Unavailable as e:
        return str(e)
    command = [
        sys.executable, "-m", "tests.vm.guest", "-p", "no:cacheprovider", "-q", "--color=no",
        "--tb=short",        f"--rootdir={config.rootpath}", *wanted,
    ]  # fmt: skip
    environment = {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), "/usr/sbin:/usr/bin:/sbin:/bin"]),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        INSIDE: version,
    }
    found: Reports = defaultdict(list)
    there = os.getcwd()
    os.chdir(config.rootpath)
    try:
        for line in machine.run(kernel, command, environment, scratch, patience=PATIENCE):
            with (scratch / "reports").open("a") as said:  # for those who look while it runs
                said.write(line + "\n")
            report = config.hook.pytest_report_from_serializable(
                config=config, data=json.loads(line)
            )
            if isinstance(report, pytest.TestReport):
                found[report.nodeid].append(report)
            elif report is not None:
                print(report.longrepr, file=sys.stderr)
    finally:
        os.chdir(there)
    if len(found) < len(wanted):
        console = (scratch / "console").read_text(errors="replace").splitlines()
        print("\n".join(console[-40:]), file=sys.stderr)
    return found
