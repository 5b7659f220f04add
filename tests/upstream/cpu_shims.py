"""What stands in for a GPU and for downloads while an upstream script runs unedited, in a process of its own.

A ``sitecustomize.py`` calls :func:`install` before the script. The script, its pipeline, its causal model with the real
grid (60 x 104 latent pixels, 1560 tokens per frame) and its samplers are the real ones. Stand-ins:

- tensors asked for on CUDA lie on the CPU (a torch function mode); ``torch.cuda`` answers as a GPU with 80 GiB would;
- ``CausalWanModel.from_pretrained`` builds the real class with 2 layers, 1 head of 32, and random weights. Caches whose
  shape ends in 12 heads of 128, a literal upstream, get 1 head of 32 instead; pipelines have 2 blocks instead of 30;
- cross attention's CUDA-only kernel, the text encoder and the VAE (a frame's first three channels, four times);
- packages that the scripts import and hardly use; ``write_video`` and ``export_to_video`` save frames as they are.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any
from unittest import mock

import diffusers.models.modeling_utils  # noqa: F401 - before torchvision is stubbed: it is asked for there
import torch
import transformers.models.t5.modeling_t5  # noqa: F401 - as above
import wrapt
from harness import StubFinder, StubModule, TinyTextEncoder, plain_attention, randomise
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STUBS = ("torchvision", "imageio", "lmdb", "decord", "cv2", "wandb", "datasets")
TEXT = (8, 16)
LAYERS, WIDTH = 2, 32
MODELS = (
    *("wan.modules.causal_model", "wan.modules.causal_model_infinity"),
    *("causvid.models.wan.causal_model", "causvid.models.wan.wan_base.modules.model"),
)


class OnCpu(TorchFunctionMode):
    """Sends to the CPU what is meant for CUDA; makes caches of upstream's heads as narrow as the tiny model."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.cuda:
            return args[0]
        args, kwargs = [_on_cpu(a) for a in args], {name: _on_cpu(a) for name, a in (kwargs or {}).items()}
        if function is torch.zeros and isinstance(args[0], list) and args[0][2:] == [12, 128]:
            args[0] = [*args[0][:2], 1, WIDTH]
        return function(*args, **kwargs)


def _on_cpu(argument: Any) -> Any:
    on_cuda = isinstance(argument, torch.device | str) and str(argument).startswith("cuda")
    return torch.device("cpu") if on_cuda else argument


def tiny_model(cls: Any, _folder: str, **options: Any) -> Any:
    """``from_pretrained``: the real class, tiny and random. What places weights on devices is left out."""
    for name in ("low_cpu_mem_usage", "device_map"):
        options.pop(name, None)
    model = cls(
        dim=WIDTH, ffn_dim=64, freq_dim=32, num_heads=1, num_layers=LAYERS, text_len=TEXT[0], text_dim=TEXT[1],
        **options,
    )  # fmt: skip
    return randomise(model)


class Text(TinyTextEncoder):
    """Prompt embeddings of the dtype that the script has cast its pipeline to."""

    def __init__(self, **_: Any) -> None:
        super().__init__(*TEXT)
        self.cast = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        """Return ``{"prompt_embeds": [B, length, width]}``."""
        return {"prompt_embeds": super().forward(text_prompts)["prompt_embeds"].to(self.cast.dtype)}


class Vae(nn.Module):
    """Frames are the latents' first three channels; the cache that scripts clear is empty."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(16), torch.ones(16)

    @property
    def model(self) -> Vae:
        """What scripts call for the cache and for encoding."""
        return self

    def clear_cache(self) -> None:
        """Nothing is kept."""

    def decode_to_pixel(self, latent: Tensor, use_cache: bool = False) -> Tensor:
        """``[B, F, 16, H, W]`` to ``[B, 4 F - 3, 3, H, W]``."""
        return latent[:, :, :3].repeat_interleave(4, dim=1)[:, 3:].float().clamp(-1, 1)

    decode_to_pixel_chunk = decode_to_pixel

    def encode(self, pixel: Tensor, scale: Any) -> Tensor:
        """``[B, 3, F, H, W]`` to ``[B, 16, F, H, W]``."""
        return pixel.repeat(1, 6, 1, 1, 1)[:, :16]


def save_frames(path_or_frames: Any, frames_or_path: Any, **_: Any) -> None:
    """``write_video(path, frames)`` or ``export_to_video(frames, path)``: the frames, unchanged."""
    path, frames = path_or_frames, frames_or_path
    if not isinstance(path, str):
        path, frames = frames, path
    torch.save(torch.as_tensor(frames), path)


# ------------------------------------------------------------------------------------------ putting it in place

def install() -> None:
    """Put all stand-ins in place; each waits until its module is imported."""
    # LoRA is real where peft is installed.
    absent = () if importlib.util.find_spec("peft") else ("peft",)
    sys.meta_path.insert(0, StubFinder((*STUBS, *absent)))
    sys.modules["causvid.models.sdxl.sdxl_wrapper"] = StubModule("causvid.models.sdxl.sdxl_wrapper")
    _pretend_cuda()
    at = functools.partial(_when_imported)
    at("torchvision.io", write_video=save_frames)
    at("diffusers.utils", export_to_video=save_frames)
    for base, wrapper in (
        ("wan.modules", "utils.wan_wrapper"),
        ("causvid.models.wan.wan_base.modules", "causvid.models.wan.wan_wrapper"),
    ):
        at(f"{base}.model", flash_attention=plain_attention)
        at(wrapper, WanTextEncoder=Text, WanVAEWrapper=Vae)
    for name in MODELS:
        wrapt.register_post_import_hook(_tiny, name)
    # Pipelines write 30 as a literal; TokenTrim's self-check counts attention calls against their caches.
    nn.Module.num_transformer_blocks = property(lambda _: LAYERS, lambda _, __: None)  # type: ignore[attr-defined]
    torch.manual_seed(0)  # some scripts draw their noise without a seed
    OnCpu().__enter__()


def _when_imported(module: str, **names: Any) -> None:
    wrapt.register_post_import_hook(lambda imported: vars(imported).update(names), module)


def _tiny(module: Any) -> None:
    for name in ("CausalWanModel", "WanModel"):
        if hasattr(module, name):
            getattr(module, name).from_pretrained = classmethod(tiny_model)


def _pretend_cuda() -> None:
    stats = {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}
    nothing = mock.MagicMock(**{"return_value.elapsed_time.return_value": 1.0})
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "memory_stats": lambda *_: stats,
        "mem_get_info": lambda *_: (80 * 2**30, 80 * 2**30),
        "Event": nothing,
        "synchronize": nothing,
        "set_device": nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **kwargs: start("gloo", **kwargs)  # type: ignore[assignment]
