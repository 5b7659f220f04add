"""Models that were looked at and cannot be pruned, told by the parameters of their forward: each has its reason.

What was found of each is in docs/models.md.
"""

from __future__ import annotations

from torch import nn

from tokentrim_hooks import parameters_of

STRANGERS = {
    ("x_memory", "memory_latent_idx", "plucker_emb"): (
        "this is Matrix-Game 3: its action modules attend, site by site, to the frames that lie in the sequence, so a "
        "token that is left out there is read here"
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
    for holder in ("", "transformer", "model", "generator"):
        network = getattr(model, holder, None) if holder else model
        taken = parameters_of(network) if isinstance(network, nn.Module) else ()
        for marks, words in STRANGERS.items():
            if set(marks) <= set(taken):
                return words
    return ""
