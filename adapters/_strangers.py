"""Models that were looked at and cannot be pruned, told by the parameters of their forward: each has its reason.

What was found of each is in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tokentrim_hooks import parameters_of

MATRIX_GAME_3 = (
    "this is Matrix-Game 3: its action modules attend, site by site, to the frames that lie in the sequence, so a "
    "token that is left out there is read here"
)
STRANGERS = {
    ("x_memory", "memory_latent_idx", "plucker_emb"): MATRIX_GAME_3,
    ("x_memory", "memory_latent_idx", "c2ws_plucker_emb"): MATRIX_GAME_3,  # in FastVideo
    ("y_camera", "cache_update_policy", "kv_cache"): (
        "this is DreamX-World (FastVideo): attention reads copies of its cache, which is written when a call is over, "
        "and beside it camera attention one of its own (prope_k, prope_v)"
    ),
    ("viewmats", "Ks", "is_cache"): (
        "this is HY-WorldPlay (Wan): for every chunk it makes its cache anew of frames chosen by camera, with two V in "
        "a row, of RoPE and of PRoPE"
    ),
    ("bi_inference", "ar_txt_inference", "ar_vision_inference"): (
        "this is HY-WorldPlay (Hunyuan): for every chunk it makes its cache anew of frames chosen by camera, RoPE and "
        "PRoPE one behind the other in the batch"
    ),
}
"""Parameters that only this model's forward has, all of them: what it is, and why it cannot be pruned."""


def stranger(model: object) -> str:
    """Why ``model``, or the network that it holds, is one that cannot be pruned; empty if it is none of these."""
    stages = getattr(model, "stages", None)
    owners = [model, *(stages if isinstance(stages, Sequence) else ())]
    held = [getattr(owner, name, None) for owner in owners for name in ("transformer", "model", "generator")]
    for network in (model, *held):
        taken = parameters_of(network) if isinstance(network, nn.Module) else ()
        for marks, words in STRANGERS.items():
            if set(marks) <= set(taken):
                return words
    return ""
