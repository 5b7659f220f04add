"""A custom node that stands in for a text encoder, whose weights no test can have: random, but always the same."""

from typing import Any

import torch


class TinyText:
    """CONDITIONING of a few numbers."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Its only widget."""
        return {"required": {"width": ("INT", {"default": 32})}}

    def encode(self, width: int) -> tuple[Any]:
        """Embeddings ``[1, 8, width]``."""
        return ([[torch.randn(1, 8, width, generator=torch.Generator().manual_seed(77)), {}]],)


NODE_CLASS_MAPPINGS = {"TinyText": TinyText}
