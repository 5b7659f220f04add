"""What watching a chunk costs, in numbers that do not depend on the machine: operations on tensors, and host syncs.

They may fall, and then the bound here falls; they may not grow unseen. The real models' are in
``tests/upstream/test_costs.py``.
"""

from __future__ import annotations

import pytest
import test_transformers_cache as latent_video
from counting import added_ops, syncs_of_rollout
from targets import TARGETS, Target

OPS = {"self-forcing": 33, "skyreels-v2": 57, "framepack": 45, "helios": 42, "ltx-long": 70, "transformers-cache": 26,
       "anyflow-far": 47}  # fmt: skip
"""Operations per chunk at most, observing."""
ALL = [*TARGETS, Target("transformers-cache", latent_video.LatentVideo, latent_video.generate)]
COUNTED = [target for target in ALL if target.name in OPS]
ADAPTERS = {"transformers-cache": {"adapter": latent_video.LatentVideoAdapter}}
"""Options of ``patch`` for a model whose adapter is not installed."""


@pytest.mark.parametrize("target", COUNTED, ids=lambda target: target.name)
def test_operations_per_chunk_do_not_grow(target):
    assert 0 < added_ops(target.make, target.run, **ADAPTERS.get(target.name, {})) <= OPS[target.name]


@pytest.mark.parametrize("target", COUNTED, ids=lambda target: target.name)
def test_one_synchronisation_per_chunk(target):
    syncs, log = syncs_of_rollout(target.make, target.run, **ADAPTERS.get(target.name, {}))
    assert syncs <= 1, str(log)
