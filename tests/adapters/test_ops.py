"""What watching a chunk costs, in numbers that do not depend on the machine: operations on tensors, and host syncs.

They may fall, and then the bound here falls; they may not grow unseen. A bound is the whole number above what was
counted, so that one operation more in each chunk is too many. The real models' are in ``tests/upstream/test_costs.py``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import pytest
import test_transformers_cache as latent_video
import torch
from counting import added_ops, syncs_of_rollout
from targets import TARGETS, Target

from tokentrim_hooks.rollout import reading
from tokentrim_hooks.rollout.records import Recorder

OPS = {"self-forcing": 33, "skyreels-v2": 57, "framepack": 45, "helios": 42, "ltx-long": 70, "transformers-cache": 28,
       "anyflow-far": 47, "sana-wm": 64}  # fmt: skip
"""Operations per chunk at most, observing."""
SYNCS = {"transformers-cache": 1.2}
"""Host syncs where the sampler is a function, not a pipeline's method: each further call of a video's first chunk is
asked whether it is still that video's. 2 in the 5 chunks counted here."""
ALL = [*TARGETS, Target("transformers-cache", latent_video.LatentVideo, latent_video.generate)]
COUNTED = [target for target in ALL if target.name in OPS]
ADAPTERS = {"transformers-cache": {"adapter": latent_video.LatentVideoAdapter}}
"""Options of ``patch`` for a model whose adapter is not installed."""


@pytest.mark.parametrize("target", COUNTED, ids=lambda target: target.name)
def test_operations_per_chunk_do_not_grow(target):
    ops = added_ops(target.make, target.run, **ADAPTERS.get(target.name, {}))
    assert OPS[target.name] - 1 < ops <= OPS[target.name]


@pytest.mark.parametrize("target", COUNTED, ids=lambda target: target.name)
def test_one_synchronisation_per_chunk(target):
    syncs, log = syncs_of_rollout(target.make, target.run, **ADAPTERS.get(target.name, {}))
    assert syncs <= SYNCS.get(target.name, 1), str(log)


def test_one_operation_more_in_a_chunk_and_one_more_wait_are_too_many():
    target, options, publish = ALL[-1], ADAPTERS[ALL[-1].name], Recorder.publish

    def reads_once_more(recorder, video, chunk):
        if chunk is not None and not chunk.published:
            reading._to_host([torch.zeros(1)], torch.zeros(1))
        publish(recorder, video, chunk)

    few = added_ops(target.make, target.run, **options)
    with mock.patch.object(Recorder, "publish", reads_once_more):
        ops = added_ops(target.make, target.run, **options)
        syncs, log = syncs_of_rollout(target.make, target.run, **options)
    assert ops >= few + 1 > OPS[target.name], (few, ops)
    assert syncs > SYNCS[target.name], str(log)


UPSTREAM, FOREIGN = "upstream/test_costs.py", "models/fastvideo_suite/"
ELSEWHERE = {
    "causvid": (UPSTREAM, "TestCausVid"), "krea": (UPSTREAM, "TestKrea"), "longlive": (UPSTREAM, "TestLongLive"),
    "reward_forcing": (UPSTREAM, "TestRewardForcing"), "infinity_rope": (UPSTREAM, "TestInfinityRope"),
    "memflow": (UPSTREAM, "TestMemFlow"), "memrope": (UPSTREAM, "TestMemRope"),
    "rolling_forcing": (UPSTREAM, "TestRollingForcing"), "rolling_sink": (UPSTREAM, "TestRollingSink"),
    "matrix_game2": (UPSTREAM, "TestMatrixGame"), "magi1": (UPSTREAM, "TestOneAfterTheOther"),
    "framepack_original": ("upstream/framepack_kit.py", "OPS ="),
    "fastvideo": (FOREIGN + "suite_fastvideo.py", "OPS ="),
    "lingbot_world": (FOREIGN + "suite_lingbot.py", "OPS ="),
    "streamdiffusion_v2": ("models/streamdiffusionv2_suite/suite_streamdiffusionv2.py", "OPS ="),
}  # fmt: skip
"""Adapters whose model is no dependency of ours: the file that counts theirs, and what it says there."""


def test_every_adapter_has_its_bound():
    values = (point.value for point in entry_points(group="tokentrim_hooks"))
    modules = {value.partition(".")[2] for value in values if value.startswith("tokentrim_hooks_adapters.")}
    here = {name.replace("-", "_") for name in OPS} & modules
    assert modules == here | ELSEWHERE.keys() and not here & ELSEWHERE.keys()
    for file, text in ELSEWHERE.values():
        source = (Path(__file__).parents[1] / file).read_text()
        assert text in source and "- 1 < ops <= OPS" in source and "syncs <= 1" in source, (file, text)
