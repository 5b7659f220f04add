"""A small, trained causal video diffusion model and the scenes it was trained on."""

from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.scenes import Scene, scenes

__all__ = ["ReferencePipeline", "Scene", "scenes"]
