"""The drift equations on numbers that one can follow by hand."""

import pytest
import torch

from tokentrim_hooks import LatentsError
from tokentrim_hooks.policy.drift import (
    RunningStatistics,
    latent_summary,
    severity_of,
    token_drift,
    unstable_tokens,
)


def test_tokens_are_row_major_over_the_patch_grid():
    latents = torch.arange(16.0).view(1, 1, 1, 4, 4)
    assert latent_summary(latents).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    wide = latent_summary(torch.arange(8.0).view(1, 1, 1, 2, 4), patch_size=(1, 4))
    assert wide.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


def test_frames_are_averaged_before_distances_are_taken():
    """Eq. 3-5: opposite motion within a chunk cancels; the distance is Euclidean over a token's features."""
    chunk = torch.zeros(1, 2, 1, 2, 4)
    chunk[0, 0, 0, :, :2], chunk[0, 1, 0, :, :2] = 5.0, -5.0
    chunk[0, :, 0, 0, 2], chunk[0, :, 0, 1, 3] = 3.0, 4.0
    assert token_drift(latent_summary(chunk), latent_summary(torch.zeros_like(chunk))).tolist() == [[0.0, 5.0]]


def test_severity_is_the_mean_over_the_unstable_set():
    drift = torch.tensor([[1.0, 9.0, 3.0, 7.0], [2.0, 2.0, 2.0, 6.0]])
    tokens = unstable_tokens(drift, 0.5)
    assert tokens.tolist() == [[1, 3], [3, 0]]
    assert severity_of(drift, tokens).tolist() == [8.0, 4.0]


def test_statistics_are_the_population_ones():
    statistics = RunningStatistics.empty(1)
    for value in (2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0):
        statistics = statistics.updated(torch.tensor([value]))
    assert (statistics.count, statistics.mean.item(), statistics.std.item()) == (8, 5.0, 2.0)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 1, 1, 1, 4, 4)])
def test_latents_must_have_five_dimensions(shape):
    with pytest.raises(LatentsError, match=r"\[B, F, C, H, W\]"):
        latent_summary(torch.zeros(shape))


def test_chunks_of_different_size_cannot_be_compared():
    with pytest.raises(LatentsError, match="changed in the middle"):
        token_drift(torch.zeros(2, 4, 3), torch.zeros(1, 4, 3))


def test_half_precision_is_not_used_for_sums():
    """4096 + 1 is 4096 in float16: the mean over frames must not be taken there."""
    latents = torch.tensor([4096.0] + [1.0] * 15).half().view(1, 16, 1, 1, 1)
    assert latent_summary(latents, (1, 1)).item() == pytest.approx((4096 + 15) / 16)
