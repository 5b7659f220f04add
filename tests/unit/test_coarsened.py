"""Coarse keys: which die when some of the tokens that they cover are dead."""

from __future__ import annotations

import pytest
import torch

from tokentrim_hooks import KeyLayout, Role, Segment
from tokentrim_hooks.pruning.key_selection import DeadTokens, coarsened


@pytest.mark.parametrize("rule", ["any", "all"])
@pytest.mark.parametrize("shape", [(4, 4, 4), (5, 3, 7), (1, 1, 1), (16, 5, 6)])
@pytest.mark.parametrize("scale", [(2, 2, 2), (4, 4, 4), (1, 3, 2)])
def test_coarsened_agrees_with_counting(rule, shape, scale):
    """Every coarse key, by brute force over the tokens that exist."""
    dead = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) < (0.2 if rule == "any" else 0.8)
    result = coarsened(dead, scale, rule)
    assert result.shape == (2, *(-(-size // step) for size, step in zip(shape, scale, strict=True)))
    for sample, t, h, w in torch.cartesian_prod(*(torch.arange(size) for size in result.shape)).tolist():
        cell = [slice(i * step, (i + 1) * step) for i, step in zip((t, h, w), scale, strict=True)]
        covered = dead[sample][tuple(cell)]
        assert bool(result[sample, t, h, w]) == bool(covered.any() if rule == "any" else covered.all())


@pytest.mark.parametrize(("rule", "dead"), [("any", [0, 3]), ("all", [0])])
def test_ledger_selects_coarse_keys(rule, dead):
    """Tokens 0, 1, 4, 5 (one 2x2 cell) and 15 of a 4x4 grid."""
    ledger = DeadTokens(coarse=rule)
    layout = KeyLayout((Segment(Role.CONTEXT, (0, 1), 2, 2, (2, 2, 2)), Segment(Role.CURRENT, (2,), 4, 4)))
    assert ledger.kill(layout, [[0, 1, 4, 5, 15]], 2, (4, 4)) == 10
    (group,) = ledger.live(layout, 1)
    assert (~group.alive[0]).nonzero().flatten().tolist() == dead
    assert layout.length == 4 + 16


def test_a_coarse_key_with_a_live_frame_survives_all_but_not_any():
    layout = KeyLayout((Segment(Role.CONTEXT, (0, 1), 1, 1, (2, 1, 1)), Segment(Role.CURRENT, (2,), 1, 1)))
    for rule, alive in (("any", [False, True]), ("all", [True, True])):
        ledger = DeadTokens(coarse=rule)
        ledger.kill(KeyLayout((Segment(Role.CONTEXT, (0,), 1, 1),)), [[0]], 1, (1, 1))
        assert ledger.live(layout, 1)[0].alive[0].tolist() == alive
