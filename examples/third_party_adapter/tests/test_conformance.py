"""Ribbon's adapter on trial. Install the package first: `pip install -e .`"""

import torch
from ribbon import RibbonVideo
from ribbon_tokentrim import Ribbon

from tokentrim_hooks.testing import AdapterConformance


class TestRibbon(AdapterConformance):
    """All tests come from the kit; this class only says how to build and run the model."""

    adapter = Ribbon
    chunks = 8

    def make_model(self) -> RibbonVideo:
        """A fresh pipeline, the same weights every time."""
        return RibbonVideo()

    def run(self, model: RibbonVideo, seed: int) -> torch.Tensor:
        """Eight chunks of two frames."""
        torch.manual_seed(seed)
        return model.generate(torch.randn(1, 16, 4, 8, 8))
