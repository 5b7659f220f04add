"""A policy that keeps contrast from growing: it scales a chunk back where its deviation exceeds the first chunk's."""

from dataclasses import dataclass

from torch import Tensor

from tokentrim_hooks import Denoised, Moments, Policy, hookimpl

EVERYTHING = (1, 2, 3, 4)


@dataclass(frozen=True)
class ContrastLimit(Policy):
    """Scale a finished chunk back to ``limit`` times the deviation of the scene's first one, where it exceeds that."""

    limit: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit >= 1:
            raise ValueError(f"limit must be at least 1, got {self.limit!r}")

    def correct(self, chunk: Denoised) -> Tensor | None:
        """The chunk around its own mean, with no more deviation than allowed; on the device, and without reading it."""
        if chunk.opening is None:
            return None
        own, first = Moments.of(chunk.prediction, EVERYTHING), Moments.of(chunk.opening, EVERYTHING)
        scale = (self.limit * first.std / own.std.clamp(min=1e-6)).clamp(max=1)
        return (own.mean + (chunk.prediction - own.mean) * scale).to(chunk.prediction.dtype)


@hookimpl
def tokentrim_policies() -> dict[str, type[Policy]]:
    """The policy of this package, by the name that users give."""
    return {"contrast-limit": ContrastLimit}
