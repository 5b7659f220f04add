"""AdaptivePolicy against loops over tokens, and what it must notice and must not."""

import math

import pytest
import torch
from by_hand import make, run
from hypothesis import given, settings
from hypothesis import strategies as st

import tokentrim_hooks as tokentrim
from tokentrim_hooks.policy.adaptive import LEAST
from tokentrim_hooks.policy.drift import RunningStatistics, latent_summary
from tokentrim_hooks.policy.novelty import BLOCK, colours, displaced, nearest

GRID, CHANNELS = (4, 5), 3


def drawn(seed, batch=2, count=6, patch=(1, 1)):
    rng = torch.Generator().manual_seed(seed)
    size = GRID[0] * GRID[1], CHANNELS * patch[0] * patch[1]
    now, before, first = (torch.randn(batch, *size, generator=rng) for _ in range(3))
    severities = torch.rand(batch, count, generator=rng, dtype=torch.float64) + 0.5
    return now, before, first, severities


def chunk(now, before, first, index=7, patch=(1, 1)):
    place = {"phase": "first", "index": index, "start": 3 * index, "frames": 3, "grid": GRID}
    x0 = torch.zeros(now.shape[0], 3, CHANNELS, GRID[0] * patch[0], GRID[1] * patch[1])
    return tokentrim.Chunk(**place, prediction=x0, summary=now, previous=before, first=first,
                           drift=(now - before).norm(dim=-1))  # fmt: skip


def history(severities):
    statistics = RunningStatistics.empty(severities.shape[0], keep=64)
    for column in severities.T:
        statistics = statistics.updated(column)
    return tokentrim.History(statistics.count, statistics.mean, statistics.std, statistics.recent)


def pixel(tokens, y, x, patch):
    """The channels of one pixel of the mean picture; beyond the edge those of the outermost."""
    (h, w), (p, q) = GRID, patch
    y, x = min(max(y, 0), h * p - 1), min(max(x, 0), w * q - 1)
    within = (y % p * q + x % q) * CHANNELS
    return tokens[(y // p) * w + x // q, within : within + CHANNELS]


def steps(reach, side):
    """Half a token, a whole one, and so on, both ways."""
    half = max(side // 2, 1)
    return [way * half for way in range(-reach * side, reach * side + 1) if abs(way * half) <= reach * side]


def by_loops(now, before, first, policy, patch):
    (h, w), (p, q) = GRID, patch
    inside = [(y, x) for y in range(p) for x in range(q)]
    score = torch.zeros(now.shape[:2])
    for b in range(now.shape[0]):
        mean = [[sum(pixel(tokens[b], y * p + v, x * q + u, patch) for v, u in inside) / len(inside)
                 for y in range(h) for x in range(w)] for tokens in (now, first)]  # fmt: skip
        for i in range(h * w):
            top, left = i // w * p, i % w * q
            colour = min(float((mean[0][i] - other).norm()) for other in mean[1]) * math.sqrt(p * q)
            off = [
                sum(float((pixel(now[b], top + v, left + u, patch)
                           - pixel(before[b], top + v + dy, left + u + dx, patch)).square().sum()) for v, u in inside)
                for dy in steps(policy.reach, p) for dx in steps(policy.reach, q)
            ]  # fmt: skip
            score[b, i] = max(colour, policy.fresh * math.sqrt(min(off)))
    return score


PATCHES = st.sampled_from([(1, 1), (2, 2), (2, 3), (4, 1)])


@given(seed=st.integers(0, 10_000), reach=st.integers(0, 2), fraction=st.sampled_from([0.05, 0.2, 1.0]), patch=PATCHES)
@settings(deadline=None, max_examples=12)
def test_it_equals_loops_over_pixels(seed, reach, fraction, patch):
    policy = tokentrim.AdaptivePolicy(reach=reach, fraction=fraction)
    now, before, first, severities = drawn(seed, batch=1, patch=patch)
    verdict = policy.judge(chunk(now, before, first, patch=patch), history(severities))
    score = by_loops(now, before, first, policy, patch)
    count = math.ceil(fraction * 20 - 1e-9)
    ranked = score.sort(dim=1, descending=True)
    assert torch.allclose(verdict.severity, ranked.values[:, :count].mean(1), atol=1e-4)
    assert torch.allclose(score.gather(1, verdict.tokens), ranked.values[:, :count], atol=1e-4)


def test_the_threshold_is_a_median_and_robust_deviations_of_which_the_floor_is_the_least():
    policy = tokentrim.AdaptivePolicy(sensitivity=1.5, floor=0.2)
    for seed in range(30):
        now, before, first, severities = drawn(seed)
        first = first * (1 if seed % 3 else 100)
        verdict = policy.judge(chunk(now, before, first), history(severities))
        for b, row in enumerate(severities.tolist()):
            middle = sorted(row)[(len(row) - 1) // 2]
            spread = sorted(abs(value - middle) for value in row)[(len(row) - 1) // 2]
            size = sum(float(token.norm()) for token in first[b]) / len(first[b])
            threshold = middle + 1.5 * max(1.4826 * spread, 0.2 * middle, LEAST * size)
            assert float(verdict.threshold[b]) == pytest.approx(threshold, rel=1e-5)
            assert bool(verdict.prune[b]) == (float(verdict.severity[b]) > threshold)


def test_blocks_of_tokens_give_what_all_at_once_give():
    rng = torch.Generator().manual_seed(0)
    tokens, others = torch.randn(1, BLOCK + 7, 4, generator=rng), torch.randn(1, 9, 4, generator=rng)
    expected = (tokens[:, :, None] - others[:, None]).norm(dim=-1).amin(-1)
    assert torch.allclose(nearest(tokens, others), expected, atol=1e-4)


def scene(seed=0):
    """Smooth background, and a bright thing of 1x2 tokens at the left."""
    rng = torch.Generator().manual_seed(seed)
    field = 0.1 * torch.randn(1, *GRID, 3, generator=rng)
    return field


def with_thing(field, column):
    """The thing stands in two columns of the second row."""
    shown = field.clone()
    shown[:, 1, column : column + 2] = torch.tensor([2.0, -2.0, 1.0])
    return shown.flatten(1, 2)


STEADY = torch.full((1, 6), 0.3, dtype=torch.float64)


def test_a_thing_that_moves_is_no_corruption():
    field = scene()
    seen = chunk(with_thing(field, 2), with_thing(field, 1), with_thing(field, 0))
    assert not bool(tokentrim.AdaptivePolicy().judge(seen, history(STEADY)).prune)
    steady = history(torch.tensor([[0.3, 0.31, 0.3, 0.29, 0.3, 0.31]], dtype=torch.float64))
    assert bool(tokentrim.DriftPolicy(fraction=0.06).judge(seen, steady).prune), "the paper's takes it for drift"


def test_corruption_that_has_settled_is_seen_where_neighbours_agree():
    field = scene()
    bad = with_thing(field, 0).unflatten(1, GRID)
    bad[:, 3, 3:] = torch.tensor([-3.0, 3.0, 3.0])
    bad = bad.flatten(1, 2)
    seen = chunk(bad, bad, with_thing(field, 0))
    verdict = tokentrim.AdaptivePolicy(fraction=0.1).judge(seen, history(STEADY))
    assert bool(verdict.prune) and sorted(verdict.tokens[0].tolist()) == [18, 19]
    paper = tokentrim.DriftPolicy(fraction=0.1).judge(seen, history(STEADY))
    assert not bool(paper.prune), "nothing differs from its predecessor"


def test_a_still_video_has_a_floor_under_its_threshold():
    field = with_thing(scene(), 0)
    still = history(torch.full((1, 20), 0.2, dtype=torch.float64))
    seen = chunk(field + 0.02 * torch.randn(field.shape, generator=torch.Generator().manual_seed(1)), field, field)
    assert not bool(tokentrim.AdaptivePolicy().judge(seen, still).prune)


def test_rounding_in_a_still_video_is_below_a_hundredth_of_a_token():
    field = with_thing(scene(), 0)
    still = history(torch.zeros(1, 20, dtype=torch.float64))
    noise = torch.randn(field.shape, generator=torch.Generator().manual_seed(1))
    assert not bool(tokentrim.AdaptivePolicy().judge(chunk(field + 1e-4 * noise, field, field), still).prune)
    assert bool(tokentrim.AdaptivePolicy().judge(chunk(field + 0.5 * noise, field, field), still).prune)


@pytest.mark.parametrize("move", [(1, 0), (0, 2), (-1, 1), (2, -2)])
def test_a_picture_that_moves_by_half_tokens_is_found_again_but_at_its_edge(move):
    patch, (h, w) = (2, 2), GRID
    picture = torch.randn(1, 1, CHANNELS, 2 * h, 2 * w, generator=torch.Generator().manual_seed(0))
    moved = picture.roll(move, dims=(-2, -1))
    off = displaced(latent_summary(moved), latent_summary(picture), GRID, patch, 1).view(GRID)
    inner = off[1:-1, 1:-1]
    assert float(inner.abs().max()) == 0 and float(off.max()) > 1
    whole = displaced(latent_summary(moved), latent_summary(picture), GRID, patch, 0)
    assert float(whole.min()) > 0


def test_the_colour_of_a_token_of_one_colour_is_as_far_as_the_token():
    flat = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    tokens = flat.repeat(1, 6)[None]
    assert torch.allclose(colours(tokens, 3), flat[None] * math.sqrt(6))
    assert float((tokens[0, 0] - tokens[0, 1]).norm()) == pytest.approx(
        float((colours(tokens, 3)[0, 0] - colours(tokens, 3)[0, 1]).norm())
    )


def test_one_outlier_does_not_set_the_threshold():
    now, before, first, _ = drawn(3, batch=1)
    calm = torch.full((1, 9), 0.3, dtype=torch.float64)
    odd = calm.clone()
    odd[0, 4] = 50.0
    seen = chunk(now, before, first)
    policy = tokentrim.AdaptivePolicy()
    assert torch.equal(policy.judge(seen, history(calm)).threshold, policy.judge(seen, history(odd)).threshold)


def test_it_waits_for_the_warm_up_and_the_history_is_bounded():
    now, before, first, severities = drawn(0, count=90)
    assert history(severities).recent.shape == (2, 64)
    assert torch.equal(history(severities).recent, severities[:, -64:])
    early = tokentrim.AdaptivePolicy(warmup=3).judge(chunk(now, before, first), history(severities[:, :2]))
    assert not bool(early.prune.any()) and bool(early.threshold.isinf().all())


def test_other_policies_get_no_list_of_severities():
    seen = []

    class Looks(tokentrim.ObservePolicy):
        """Keeps the histories."""

        def judge(self, chunk, history):
            seen.append(history.recent)
            return super().judge(chunk, history)

    pipeline = make()
    with tokentrim.patched(pipeline, Looks()):
        run(pipeline, chunks=4)
    assert seen == [None] * 3


def test_it_runs_on_a_model_and_comes_off():
    pipeline, plain = make(), run(make())
    with tokentrim.patched(pipeline, tokentrim.AdaptivePolicy(sensitivity=0.0, floor=0.0)) as handle:
        run(pipeline)
    assert handle.report.triggers
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("options", [
    {"fraction": 0}, {"fraction": 1.1}, {"sensitivity": -1}, {"floor": math.inf}, {"reach": -1}, {"warmup": 1.5},
])  # fmt: skip
def test_bad_options_name_the_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tokentrim.AdaptivePolicy(**options)
