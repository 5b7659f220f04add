"""Hypothesis profiles (HYPOTHESIS_PROFILE = dev, ci or nightly); what was compared with real sources, what was not."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from record_checks import pytest_addoption, pytest_configure

from tokentrim_hooks.errors import TokenTrimError, TokenTrimWarning

__all__ = ["pytest_addoption", "pytest_configure"]
"""Hooks of ``--record-checks``; pytest finds them by their names here."""

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def messages_of_two_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each error and warning that a test meets, with the values that it has then: what happened, and what to do."""
    longer: list[str] = []

    def noted(kind: type[BaseException]) -> Any:
        def init(self: Any, *words: Any, **more: Any) -> None:
            super(kind, self).__init__(*words, **more)
            longer.extend(str(word) for word in words[:1] if str(word).count("\n") > 1)

        return init

    for kind in (TokenTrimError, TokenTrimWarning):
        monkeypatch.setattr(kind, "__init__", noted(kind))
    yield
    assert not longer, "a message of more than two lines:\n" + "\n---\n".join(longer)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of effects and errors against real sources, and a line for what was not checked: a skip is no pass."""
    stats = terminalreporter.stats
    rows = [value for report in stats.get("passed", []) for key, value in report.user_properties if key == "exact"]
    if rows:
        terminalreporter.section("against the real sources")
        terminalreporter.write_line(f"{'configuration':<58} {'effect':>9} {'error':>9}")
        for name, effect, error in rows:
            terminalreporter.write_line(f"{name:<58} {effect:>9.2e} {error:>9.1e}")
    skipped = [report for report in stats.get("skipped", []) if "not checked" in str(report.longrepr).lower()]
    if skipped:
        reasons = sorted({str(report.longrepr[-1]).removeprefix("Skipped: ") for report in skipped})
        terminalreporter.section(f"{len(skipped)} tests NOT CHECKED")
        terminalreporter.write_line("\n".join(reasons))
