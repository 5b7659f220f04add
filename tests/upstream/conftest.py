"""Reports upstream tests that could not run as "not checked", and prints the table of effects and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import NOT_CHECKED


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors: threads only fight for the cores."""
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of what was compared with the real sources, and a line for what was not."""
    stats = terminalreporter.stats
    rows = [value for report in stats.get("passed", []) for key, value in report.user_properties if key == "exact"]
    if rows:
        terminalreporter.section("against the real sources")
        terminalreporter.write_line(f"{'configuration':<58} {'effect':>9} {'error':>9}")
        for name, effect, error in rows:
            terminalreporter.write_line(f"{name:<58} {effect:>9.2e} {error:>9.1e}")
    skipped = [r for r in stats.get("skipped", []) if NOT_CHECKED in str(r.longrepr)]
    if skipped:
        reasons = sorted({str(report.longrepr[-1]).removeprefix("Skipped: ") for report in skipped})
        terminalreporter.write_line(f"upstream: {len(skipped)} tests NOT CHECKED ({'; '.join(reasons)})", yellow=True)
