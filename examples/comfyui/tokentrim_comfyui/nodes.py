"""The two nodes, in the form that ComfyUI and its frontend read."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from .picture import chart
from .sampling import applied, sampling_of
from .settings import choices, policy_of

CATEGORY = "model/tokentrim"
MODEL, POLICY, STRENGTH, PROBE, OPTIONS = (
    "An autoregressive video model (Self-Forcing, Causal Forcing), for the sampler 'Sampler AR Video'.",
    "What acts against drift. 'drift' is TokenTrim: chunks that drift more than those before are regenerated without "
    "the most drifting tokens. 'observe' only measures. Nodes in a row act in order; one of them may judge.",
    "1: the policy's own defaults. Scales the share of tokens (drift, adaptive), the pull (latent-moments, "
    "row-moments) or the weight taken from old frames (soft-prune). 0: measure, change nothing.",
    "What is judged. first-step: the chunk's first denoising call; a trigger costs one call more. candidate: the "
    "finished chunk, as in the paper's Algorithm 1; a trigger costs the whole chunk again.",
    'Fields of the policy as JSON, for example {"sensitivity": 1.5, "warmup": 3}. They win over strength.',
)


class ApplyTokenTrim:
    """MODEL in, MODEL out: a clone that is patched whenever it samples."""

    DESCRIPTION = (
        "Acts against drift while an autoregressive video model samples. The model that comes in is unchanged."
    )
    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model, patched for as long as a sampler runs it.",)
    SEARCH_ALIASES: ClassVar[list[str]] = ["drift", "self forcing", "autoregressive"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Widgets and sockets."""
        number = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05, "tooltip": STRENGTH}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": MODEL}),
                "policy": (choices(), {"default": "drift", "tooltip": POLICY}),
                "strength": ("FLOAT", number),
                "probe": (["first-step", "candidate"], {"default": "first-step", "tooltip": PROBE}),
            },
            "optional": {"options": ("STRING", {"default": "", "multiline": True, "tooltip": OPTIONS})},
        }

    def apply(
        self, model: Any, policy: str, strength: float, probe: Literal["first-step", "candidate"], options: str = ""
    ) -> tuple[Any]:
        """The patched clone."""
        return (applied(model, policy_of(policy, strength, options), probe),)


class TokenTrimReport:
    """What happened to the latents of a sampling: its control chart, and the same in words."""

    DESCRIPTION = "Draws drift and threshold of every chunk, regenerated ones in red."
    CATEGORY = CATEGORY
    FUNCTION = "report"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("chart", "summary")
    OUTPUT_TOOLTIPS = ("The control chart, one image per video of the batch.", "Chunks, prunes and extra calls.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Sockets."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The MODEL that Apply TokenTrim gave to the sampler."}),
                "latent": ("LATENT", {"tooltip": "What the sampler made of it, so that the report is of that video."}),
            }
        }

    def report(self, model: Any, latent: dict[str, Any]) -> tuple[Tensor, str]:
        """Chart ``[B, H, W, 3]`` and summary.

        Raises:
            ValueError: the MODEL does not come from Apply TokenTrim, or no sampler has used it.
        """
        sampling = sampling_of(model)
        if sampling is None:
            raise ValueError("this MODEL is not patched.\nGive it the one that comes out of Apply TokenTrim.")
        found = sampling.report_of(latent["samples"])
        return chart(found), found.summary()


NODE_CLASS_MAPPINGS = {"ApplyTokenTrim": ApplyTokenTrim, "TokenTrimReport": TokenTrimReport}
NODE_DISPLAY_NAME_MAPPINGS = {"ApplyTokenTrim": "Apply TokenTrim", "TokenTrimReport": "TokenTrim Report"}
