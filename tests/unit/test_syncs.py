"""The synchronisation counter sees what stalls a GPU, and only that."""

import runpy

import pytest
import torch

from tokentrim_hooks.testing import count_syncs

X = torch.arange(6.0)
MASK = X > 2


@pytest.mark.parametrize(
    "action",
    [
        lambda: X.sum().item(),
        lambda: X.tolist(),
        lambda: bool(X.any()),
        lambda: int(X[2]),
        lambda: float(X[2]),
        lambda: X.cpu(),
        lambda: X.to("cpu"),
        lambda: X.numpy(force=True),
        lambda: X.nonzero(),
        lambda: torch.nonzero(X),
        lambda: torch.where(MASK),
        lambda: X[MASK],
        lambda: X.clone().__setitem__(MASK, 1.0),
        lambda: X.masked_select(MASK),
        lambda: torch.equal(X, X + 1),
        lambda: torch.allclose(X, X),
        lambda: torch.unique(X),
        lambda: 1 if X.sum() > 3 else 0,
        lambda: range(MASK.sum()),
        lambda: f"{X.sum()}",
    ],
)
def test_waits_are_counted_once(action):
    with count_syncs() as log:
        action()
    assert len(log) == 1, str(log)
    assert "test_syncs.py" in log.events[0].place and not log.events[0].ours


@pytest.mark.parametrize(
    "action",
    [
        lambda: X + 1,
        lambda: X.sort().values[:3],
        lambda: torch.where(MASK, X, -X),
        lambda: X.to(X.device, torch.float64),
        lambda: X.masked_fill(MASK, 0),
        lambda: X[torch.tensor([1, 2])],
        lambda: X.shape[0] + X.numel(),
        lambda: torch.stack([X, X]).mean(0),
    ],
)
def test_device_work_is_not_counted(action):
    with count_syncs() as log:
        action()
    assert len(log) == 0, str(log)


def test_host_work_on_what_was_fetched_is_not_counted():
    with count_syncs() as log:
        fetched = X.cpu()
        assert fetched.sum().item() == 15 and (fetched > 2).nonzero().tolist()
    assert len(log) == 1, str(log)


def test_whose_it_is_can_be_told():
    with count_syncs(ours=[__file__]) as log:
        X.sum().item()
    assert [len(log.ours), len(log.theirs)] == [1, 0]
    assert "1 synchronisations of tokentrim's" in str(log) and "test_syncs.py" in log.ours[0].stack[-1]


def test_code_that_is_reached_through_a_link_is_the_same_code(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "adapter.py").write_text("def read(x):\n    return x.sum().item()\n")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    read = runpy.run_path(str(tmp_path / "link" / "adapter.py"))["read"]
    for ours in ("real", "link"):
        with count_syncs(ours=[tmp_path / ours]) as log:
            read(X)
        assert len(log.ours) == 1, str(log)
