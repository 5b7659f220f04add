"""The trained models that come with the package, by the kind of drift that they show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokentrim_hooks.extras import require
from tokentrim_hooks.reference.low_rank import merge
from tokentrim_hooks.reference.model import CausalVideoModel

FOLDER = Path(__file__).with_name("weights")
BASE = "fading"
"""The kind whose file holds whole weights; the others' files hold low-rank differences to it."""


@dataclass(frozen=True)
class Kind:
    """A trained model: how it drifts and how it is run, sizes in frames.

    ``guidance`` is the weight of history in every denoising call (1: none beyond the model's own); ``weights`` says
    whose file it takes, where it has none of its own.
    """

    drift: str
    local_attn_size: int = 21
    sink_size: int = 0
    num_frame_per_block: int = 3
    guidance: float = 1.0
    weights: str = ""


KINDS = {
    "fading": Kind("shapes melt, sprites vanish one by one, contrast falls"),
    "burning": Kind("colours over-saturate, edges over-sharpen, blocks appear", guidance=2.2, weights=BASE),
    "sink": Kind("as fading, held back by the first chunk, which is never evicted", sink_size=3),
    "framewise": Kind("as fading, in chunks of one frame", num_frame_per_block=1),
}


def weights_file(kind: str, folder: Path = FOLDER) -> Path:
    """Where the weights of ``kind`` lie, its own or those that it shares."""
    return folder / f"{_kind(kind).weights or kind}.safetensors"


def figures_file(kind: str, folder: Path = FOLDER) -> Path:
    """Where the figures of ``kind`` lie: how it was made and how it does on held-out scenes, JSON."""
    return folder / f"{kind}.json"


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"no reference model of kind {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind]


def load_model(
    kind: str = BASE,
    local_attn_size: int | None = None,
    sink_size: int | None = None,
    folder: Path = FOLDER,
) -> CausalVideoModel:
    """The trained model of ``kind``, float32 on the CPU; window and sink as it was trained unless given."""
    made = _kind(kind)
    model = CausalVideoModel(
        local_attn_size=made.local_attn_size if local_attn_size is None else local_attn_size,
        sink_size=made.sink_size if sink_size is None else sink_size,
        num_frame_per_block=made.num_frame_per_block,
        guidance=made.guidance,
    )
    load_base(model, weights_file(BASE, folder))
    if (file := weights_file(kind, folder)) != weights_file(BASE, folder):
        merge(model, require("safetensors.torch", "demo").load_file(file))
    return model


def load_base(model: CausalVideoModel, file: Path | str) -> None:
    """Fill ``model`` from a file of whole weights."""
    weights = require("safetensors.torch", "demo").load_file(file)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
