"""Prints what the suites against foreign packages measured, and which of their checks were left open."""

from __future__ import annotations

from typing import Any

KEYS = ("figure", "not checked")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Figures of each package, then open questions, which are no passes."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    lines = [f"{key}: {value}" for report in reports for key, value in report.user_properties if key in KEYS]
    if lines:
        terminalreporter.section("foreign packages")
    for line in sorted(set(lines)):
        terminalreporter.write_line(line)
