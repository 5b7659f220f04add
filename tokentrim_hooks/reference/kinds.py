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
    """A trained model: how it drifts and how it is run, sizes in frames."""

    drift: str
    local_attn_size: int = 21
    sink_size: int = 0
    num_frame_per_block: int = 3


KINDS = {
    "fading": Kind("shapes melt, sprites vanish one by one, contrast falls"),
    "burning": Kind("colours over-saturate, edges over-sharpen: guidance on history, distilled into the weights"),
    "sink": Kind("as fading, held back by the first chunk, which is never evicted", sink_size=3),
    "frame-wise": Kind("as fading, in chunks of one frame", num_frame_per_block=1),
}


def weights_file(kind: str, folder: Path = FOLDER) -> Path:
    """Where the weights of ``kind`` lie; its figures lie beside it, as JSON."""
    if kind not in KINDS:
        raise ValueError(f"no reference model of kind {kind!r}; there are {', '.join(KINDS)}")
    return folder / f"{kind}.safetensors"


def load_model(
    kind: str = BASE,
    local_attn_size: int | None = None,
    sink_size: int | None = None,
    folder: Path = FOLDER,
) -> CausalVideoModel:
    """The trained model of ``kind``, float32 on the CPU; window and sink as it was trained unless given."""
    file, made = weights_file(kind, folder), KINDS[kind]
    model = CausalVideoModel(
        local_attn_size=made.local_attn_size if local_attn_size is None else local_attn_size,
        sink_size=made.sink_size if sink_size is None else sink_size,
        num_frame_per_block=made.num_frame_per_block,
    )
    load_base(model, weights_file(BASE, folder))
    if kind != BASE:
        merge(model, require("safetensors.torch", "demo").load_file(file))
    return model


def load_base(model: CausalVideoModel, file: Path | str) -> None:
    """Fill ``model`` from a file of whole weights."""
    weights = require("safetensors.torch", "demo").load_file(file)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
