"""ContrastLimit on trial. Install the package first: `pip install -e .`"""

import torch
from contrast_tokentrim import ContrastLimit

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference import ReferencePipeline
from tokentrim_hooks.testing import PolicyConformance, Views


class TestContrastLimit(PolicyConformance):
    """All tests come from the kit; this class says which options are wrong, and brings a model to run on."""

    policy = ContrastLimit()
    wrong = {"limit": [0.5, float("nan")]}  # noqa: RUF012

    def make_model(self) -> ReferencePipeline:
        """The reference model with small random weights."""
        return ReferencePipeline.random(layers=2, dim=16, grid=(2, 2), local_attn_size=6, num_frame_per_block=2)

    def run(self, model: ReferencePipeline, seed: int) -> torch.Tensor:
        """Six chunks of two frames."""
        torch.manual_seed(seed)
        return model.inference(torch.randn(1, 12, 3, 8, 8), ["a"], return_latents=True)[1]


def test_contrast_is_brought_down_to_the_limit_and_less_is_left() -> None:
    """Twice the contrast is too much for a limit of 1.5, for one of 3 it is not."""
    chunk = Views.random().denoised
    loud = tokentrim.Denoised(**{**vars(chunk), "prediction": 2 * chunk.opening})
    assert torch.allclose(ContrastLimit(1.5).correct(loud).std() / chunk.opening.std(), torch.tensor(1.5), atol=0.05)
    assert torch.allclose(ContrastLimit(3.0).correct(loud), loud.prediction, atol=1e-5)
