"""What the package says in its log: silent unless asked, INFO for what was tapped and why, DEBUG per chunk."""

import logging
import subprocess
import sys

import pytest
import tiny_reference as tiny

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy


@pytest.fixture
def log(caplog):
    """Records of a patched run that prunes once, and of unpatching."""
    caplog.set_level(logging.DEBUG, logger="tokentrim_hooks")
    pipeline = tiny.make()
    with tokentrim.patched(pipeline, ForcedPolicy({2: (1,)})):
        tiny.run(pipeline)
    return [record for record in caplog.records if record.name.startswith("tokentrim_hooks")]


def lines(log, level, start):
    return [record.getMessage() for record in log if record.levelno == level and record.getMessage().startswith(start)]


def test_info_says_which_adapter_matched_and_what_was_tapped(log):
    (patched,) = lines(log, logging.INFO, "patched ")
    assert "ReferencePipeline" in patched and "self-forcing" in patched and "ForcedPolicy" in patched
    (tapped,) = lines(log, logging.INFO, "tapped ")
    assert tapped.startswith("tapped tokentrim_hooks.reference.model.attention, ")


def test_debug_has_one_line_per_accepted_chunk(log):
    assert len(lines(log, logging.DEBUG, "chunk ")) == tiny.CHUNKS


def test_a_healthy_run_has_no_warning(log):
    assert log and max(record.levelno for record in log) < logging.WARNING


def test_info_is_a_few_lines_however_long_the_video(log):
    assert sum(record.levelno == logging.INFO for record in log) < 8


def test_nothing_is_printed_unless_asked_for():
    script = (
        "import logging, tokentrim_hooks; log = logging.getLogger('tokentrim_hooks.handle'); "
        "log.error('unheard'); assert logging.getLogger('tokentrim_hooks').handlers"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
