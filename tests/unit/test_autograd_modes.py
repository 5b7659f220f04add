"""Ctrl-C at every place of a block that changes a mode of torch, or keeps the random stream: all is as before it.

``torch.no_grad()`` and its kind do not stand that; so no mode of torch's is entered by ``with`` in the core.
"""

from __future__ import annotations

import dis
import gc
import itertools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import tokentrim_hooks
from tokentrim_hooks.pruning import autograd_modes, fleeting
from tokentrim_hooks.pruning.autograd_modes import without_gradients, writing
from tokentrim_hooks.pruning.call_scope import BUSY
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.pruning.fleeting import FleetingMarks
from tokentrim_hooks.rollout.repeat import proof
from tokentrim_hooks.rollout.repeat.proof import RandomStreamKept

LOOKS = {"CALL", "CALL_KW", "CALL_FUNCTION", "CALL_METHOD", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}
"""Instructions behind which Python looks for signals."""


pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="NOT CHECKED: needs a table of exceptions")


def places_of(code: types.CodeType) -> set[int]:
    """Where a signal's exception comes up as from the instruction before: that one is what a ``try`` encloses, or not.

    So not where a ``try`` ends between the two, for there the exception belongs to it.
    """
    table = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]

    def handler(offset: int) -> int | None:
        return next((entry.target for entry in table if entry.start <= offset < entry.end), None)

    pairs = itertools.pairwise(dis.get_instructions(code))
    return {b.offset for a, b in pairs if a.opname in LOOKS and handler(a.offset) == handler(b.offset)}


class CtrlC:
    """Raises at number ``at`` of the places of a module's functions where a signal's exception can come up."""

    def __init__(self, module: Any, at: int = -1) -> None:
        self.places, self._file, self._at = 0, module.__file__, at

    def _enter(self, frame: Any, _event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename != self._file:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        behind = places_of(frame.f_code)

        def look(frame: Any, event: str, _argument: Any) -> Any:
            if event == "opcode" and frame.f_lasti in behind:
                self.places += 1
                if self.places - 1 == self._at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return look

        return look

    def __enter__(self) -> CtrlC:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *failure: Any) -> None:
        sys.settrace(None)


def everywhere(module: Any, run: Any) -> Any:
    """Run with Ctrl-C at each place in turn; yields with its traceback alive, as somebody may keep it."""
    with CtrlC(module) as whole:
        run()
    assert whole.places
    for at in range(whole.places):
        with pytest.raises(KeyboardInterrupt) as kept, CtrlC(module, at):
            run()
        yield kept


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("made_in", (torch.enable_grad, torch.inference_mode))
def test_modes_are_as_before(mode: Any, made_in: Any) -> None:
    with made_in():
        tensor = torch.zeros(3)
    for run in (lambda: without_gradients(tensor.sum), lambda: writing(tensor, tensor.fill_, 1)):
        with mode():
            before = modes()
            for kept in everywhere(autograd_modes, run):
                assert modes() == before
                del kept
        assert modes() == (True, False)


def test_no_mode_of_torchs_is_entered_by_lines_of_python() -> None:
    """Gradients are switched on only, where the sampler has them off and puts that right."""
    root = Path(tokentrim_hooks.__file__).parent
    rooms = [root / room for room in ("handle", "patching", "pruning", "ranks", "rollout")]
    for file in (file for room in rooms for file in room.rglob("*.py")):
        assert not re.search(r"(with|,) torch\.(no_grad|inference_mode|random)\b", file.read_text()), file


def test_the_random_stream_is_not_put_back_later() -> None:
    """When a traceback is forgotten, which may be amid the next video."""

    def run() -> None:
        with RandomStreamKept(torch.device("cpu")):
            torch.randn(3)

    for kept in everywhere(proof, run):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        del kept
        gc.collect()
        assert torch.equal(torch.get_rng_state(), before)


def test_ctrl_c_while_a_call_is_taken_off_the_busy_ones() -> None:
    BUSY.maybe = True
    assert not BUSY.now and not BUSY.maybe


def test_rows_that_were_hidden_are_seen_again_whatever_came_while_they_were_put_back() -> None:
    values = [torch.randn(1, 4, 2, 3) for _ in range(3)]
    before = [one.clone() for one in values]
    marks = FleetingMarks()

    def hide_and_show() -> None:
        marks.hide(CacheRows(values=values, start=0, stop=4, rows_per_frame=2), torch.ones(1, 2, 2, dtype=torch.bool))
        marks.take_off()

    for _ in everywhere(fleeting, hide_and_show):
        marks.take_off()
        assert all(map(torch.equal, values, before)) and not marks.rows
