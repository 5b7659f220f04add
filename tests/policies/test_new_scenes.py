"""A prompt switch and a cut: what each method remembers of the scene before is forgotten, and the rest goes on."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from by_hand import FRAMES, TOKENS, ByHand, make, moments_moved, run
from tokentrim_hooks_adapters.self_forcing import SelfForcing

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Phase

CHUNKS, SWITCH = 7, 4
"""The scene changes before this chunk."""


class Switching(ByHand):
    """Says that the prompt changes, or writes the latest chunk once more (a re-cache), before one chunk."""

    how = ""
    recaching = False

    def _denoise(self, noisy, conditional, start):
        if self.how == "recache" and start == SWITCH * FRAMES:
            zero = torch.zeros(noisy.shape[:2], dtype=torch.long)
            self.recaching = True
            self.generator(self.latest, None, zero, self.kv_cache1, None, (start - FRAMES) * TOKENS)
            self.recaching = False
        self.latest = super()._denoise(noisy, conditional, start)
        return self.latest


class Told(SelfForcing):
    """Knows of both."""

    name = "told"

    def phase(self, call, seen):
        return Phase.RECACHE if self.pipeline.recaching else super().phase(call, seen)

    def changes_prompt(self, call):
        return self.pipeline.how == "prompt" and call.start == SWITCH * FRAMES


def made(how):
    pipeline = make(Switching)
    pipeline.how = how
    return pipeline


def patched(how, policies):
    """Video and report."""
    pipeline = made(how)
    with tokentrim.patched(pipeline, policies, adapter=Told) as handle:
        video = run(pipeline, chunks=CHUNKS)
    return video, handle.report


HOW = pytest.mark.parametrize("how", ["prompt", "recache"])


@HOW
def test_drift_policy_begins_its_statistics_anew(how):
    _, report = patched(how, tokentrim.DriftPolicy())
    first = [record for record in report if record.sample == 0]
    means = [record.mean for record in first]
    assert [mean is None for mean in means] == [chunk in (0, 1, SWITCH) for chunk in range(CHUNKS)]
    assert means[SWITCH + 1] == pytest.approx(first[SWITCH].accepted_severity)
    assert first[SWITCH].severity is not None  # still compared with the chunk before


@dataclass(frozen=True)
class Keeps(tokentrim.AdaptivePolicy):
    """Keeps what it is shown."""

    shown: list = field(default_factory=list)

    def judge(self, chunk, history):
        recent = None if history.recent is None else history.recent.shape[1]
        self.shown.append((chunk.index, chunk.summary, chunk.previous, chunk.first, history.count, recent))
        return super().judge(chunk, history)


@HOW
def test_adaptive_policy_looks_for_what_is_new_to_the_new_scene(how):
    policy = Keeps(max_regenerations=0)
    patched(how, policy)
    shown = {index: rest for index, *rest in policy.shown}
    assert [shown[chunk][3] for chunk in range(1, CHUNKS)] == [0, 1, 2, 0, 1, 2]
    assert [shown[chunk][4] for chunk in range(1, CHUNKS)] == [None, 1, 2, None, 1, 2]
    for chunk in range(2, CHUNKS):
        # What a chunk's summary is, the next chunk is shown as the previous one.
        opening = shown[1][1] if chunk <= SWITCH - 1 else shown[SWITCH + 1][1]
        expected = shown[SWITCH][1] if chunk == SWITCH else opening
        assert torch.equal(shown[chunk][2], expected), chunk


@HOW
def test_latent_moments_take_the_new_scenes_first_chunk_for_measure(how):
    by_hand, opening = made(how), {}

    def answers(x0, step, chunk):
        if step < 3:
            return x0
        if chunk in (0, SWITCH):
            opening["x0"] = x0.clone()
            return x0
        return moments_moved(x0, (1, 3, 4), opening["x0"], 0.35)

    by_hand.answers = answers
    got, report = patched(how, tokentrim.LatentMoments(0.35))
    assert torch.allclose(got, run(by_hand, chunks=CHUNKS), atol=3e-5)
    acted = [record.chunk for record in report if record.acts and record.sample == 0]
    assert acted == [chunk for chunk in range(CHUNKS) if chunk not in (0, SWITCH)]


@HOW
def test_row_moments_take_the_new_scenes_first_rows_for_measure(how):
    by_hand, first = made(how), {}

    def wrote(caches, chunk):
        for layer, cache in enumerate(caches):
            stop = int(cache["local_end_index"])
            rows = cache["v"][:, stop - FRAMES * TOKENS : stop]
            if chunk in (0, SWITCH):
                first[layer] = rows.clone()
            else:
                rows.copy_(moments_moved(rows, (1,), first[layer], 0.35))

    by_hand.wrote = wrote
    got, report = patched(how, tokentrim.RowMoments(0.35))
    assert torch.allclose(got, run(by_hand, chunks=CHUNKS), atol=3e-5)
    acted = [record.chunk for record in report if record.acts and record.sample == 0]
    assert acted == [chunk for chunk in range(CHUNKS) if chunk not in (0, SWITCH)]


@HOW
def test_frame_eviction_reads_frames_of_the_scene_before_for_it_knows_nothing_of_them(how):
    known = {}

    @dataclass(frozen=True)
    class Notes(tokentrim.FrameEviction):
        """Notes which frames it knows at a chunk's first call."""

        def hide(self, chunk, context):
            if chunk.phase == "first":
                shown = context.summaries
                numbers = range(chunk.start - context.frames, chunk.start)
                finite = [] if shown is None else shown[0].isfinite().all(-1).tolist()
                known[chunk.index] = {n for n, ok in zip(numbers, finite, strict=False) if ok}
            answer = super().hide(chunk, context)
            if answer is not None:
                assert not answer[context.summaries.isnan().any(-1)].any()
            return answer

    patched(how, Notes(similarity=1.0, keep=0))
    assert known[SWITCH - 1] == set(range((SWITCH - 1) * FRAMES)) and known[SWITCH] == set()
    assert known[SWITCH + 1] == {SWITCH * FRAMES, SWITCH * FRAMES + 1}


FORGETFUL = [tokentrim.CommitWindow(3), tokentrim.LateMean(3), tokentrim.SoftPrune(keep=1)]


@pytest.mark.parametrize("policy", FORGETFUL, ids=str)
def test_methods_that_remember_nothing_of_a_scene_go_on_as_if_there_were_none(policy):
    assert torch.equal(patched("prompt", policy)[0], patched("", policy)[0])


@HOW
def test_the_late_mean_goes_on_with_the_chunks_own_predictions(how):
    by_hand, late = made(how), []

    def answers(x0, step, chunk):
        late.append(x0)
        if step < 3:
            return x0
        answer = torch.stack(late[-3:]).mean(0)
        late.clear()
        return x0 if chunk == 0 else answer

    by_hand.answers = answers
    got, report = patched(how, tokentrim.LateMean(3))
    assert torch.allclose(got, run(by_hand, chunks=CHUNKS), atol=1e-5)
    assert [r.chunk for r in report if r.acts and r.sample == 0] == list(range(1, CHUNKS))


@HOW
def test_a_commit_window_is_of_commits_and_not_of_what_rebuilds_the_context(how):
    by_hand = made(how)

    def reads(kind, keys):
        hidden = torch.zeros(1, keys, dtype=torch.bool)
        if kind == "commit" and not by_hand.recaching:
            hidden[:, : max(keys - 3 * TOKENS, 0)] = True
        return hidden

    by_hand.reads = reads
    got, _ = patched(how, tokentrim.CommitWindow(3))
    assert torch.allclose(got, run(by_hand, chunks=CHUNKS), atol=1e-5)


@HOW
def test_flowmo_guides_the_videos_first_chunk_and_no_scenes(how):
    pipeline = make(Switching, num_frame_per_block=3)
    pipeline.how = how
    with tokentrim.patched(pipeline, tokentrim.FlowMo(), adapter=Told) as handle:
        pipeline.inference(torch.randn(1, 15, 3, 8, 8), ["a"])
    assert [record.chunk for record in handle.report if record.acts] == [0]


def test_a_new_video_forgets_everything():
    """Each method's second video is its first one again."""
    policies = [tokentrim.DriftPolicy(), *FORGETFUL, tokentrim.LatentMoments(), tokentrim.RowMoments()]
    pipeline = make()
    with tokentrim.patched(pipeline, [*policies, tokentrim.FrameEviction(similarity=1.0)]) as handle:
        assert torch.equal(run(pipeline), run(pipeline))
    half = len(handle.report) // 2
    one, other = list(handle.report)[:half], list(handle.report)[half:]
    told = [[dataclasses.replace(record, video=0, seconds=0.0) for record in half] for half in (one, other)]
    assert [record.acts for record in told[0]] == [record.acts for record in told[1]]
    assert [record.severity for record in told[0]] == [record.severity for record in told[1]]
