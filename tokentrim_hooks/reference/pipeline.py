"""Generator and sampling loop around the reference model, call for call as Self-Forcing's causal inference pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.inspection import nearest_sigma
from tokentrim_hooks.reference.kinds import BASE, load_model, weights_file
from tokentrim_hooks.reference.model import CausalVideoModel, KVCache

WEIGHTS = weights_file(BASE)
STEPS = (1000, 750, 500, 250)

OnChunk = Callable[[int, int, Tensor], None]
"""Progress callback: index of the generated chunk, number of chunks to generate, the chunk [B, F, C, H, W]."""


class FlowScheduler:
    """Straight-line flow matching: ``x_t = (1 - sigma) x0 + sigma noise`` with ``timestep = 1000 sigma``.

    Attributes:
        sigmas: noise levels [1000] from 1 down to 0.001.
        timesteps: the same on the 0..1000 scale.
    """

    def __init__(self) -> None:
        self.sigmas = torch.linspace(1.0, 0.0, 1001)[:-1]
        self.timesteps = self.sigmas * 1000

    def sigma(self, timestep: Tensor, like: Tensor) -> Tensor:
        """Noise level nearest to each ``timestep`` [N], shaped [N, 1, 1, 1] as float32 on the device of ``like``."""
        self.sigmas, self.timesteps = self.sigmas.to(like.device), self.timesteps.to(like.device)
        return nearest_sigma(self, timestep.to(like.device)).reshape(-1, 1, 1, 1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noise clean frames [B*F, C, H, W] to ``timestep`` [B*F] (or [B, F])."""
        sigma = self.sigma(timestep.flatten(), noise)
        return ((1 - sigma) * original_samples + sigma * noise).type_as(noise)


class ReferenceGenerator(nn.Module):
    """The denoiser as samplers call it: predicts flow and clean video of one chunk or of a whole video."""

    def __init__(self, model: CausalVideoModel) -> None:
        super().__init__()
        self.model = model
        self.scheduler = FlowScheduler()

    def get_scheduler(self) -> FlowScheduler:
        """The noise schedule, shared with the pipeline."""
        return self.scheduler

    def forward(
        self,
        noisy_image_or_video: Tensor,
        conditional_dict: dict[str, Any] | None,
        timestep: Tensor,
        kv_cache: KVCache | None = None,
        crossattn_cache: list[Any] | None = None,
        current_start: int | None = None,
        classify_mode: bool = False,
        concat_time_embeddings: bool = False,
        clean_x: Tensor | None = None,
        aug_t: Tensor | None = None,
        cache_start: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Flow and x0 of ``noisy_image_or_video``, each [B, F, C, H, W], at ``timestep`` [B, F] (or [B, 1]).

        ``current_start`` counts tokens. The model knows no text: ``conditional_dict`` and ``crossattn_cache`` are
        accepted and ignored, as are the switches of a classifier head that it does not have.
        """
        timestep = timestep.expand(noisy_image_or_video.shape[:2])
        flow = self.model(
            noisy_image_or_video.transpose(1, 2),
            t=timestep,
            kv_cache=kv_cache,
            crossattn_cache=crossattn_cache,
            current_start=current_start or 0,
            cache_start=cache_start,
            clean_x=None if clean_x is None else clean_x.transpose(1, 2),
            aug_t=aug_t,
        ).transpose(1, 2)
        sigma = self.scheduler.sigma(timestep.flatten(), flow).unflatten(0, timestep.shape)
        return flow, (noisy_image_or_video - sigma * flow).type_as(flow)


class NullTextEncoder(nn.Module):
    """Stands where a text encoder is expected; the reference model is unconditional."""

    def forward(self, text_prompts: Sequence[str] | None) -> dict[str, Any]:
        """A conditioning dict without content; ``text_prompts`` is ignored."""
        return {"prompt_embeds": None}


class PixelVAE(nn.Module):
    """Stands where a VAE is expected; the reference model's latents are pixels."""

    def decode_to_pixel(self, latent: Tensor, use_cache: bool = False) -> Tensor:
        """Return ``latent`` [B, F, C, H, W] itself, pixels in about [-1, 1]."""
        return latent


class ReferencePipeline(nn.Module):
    """Chunk-by-chunk video generation with the attributes and call order of Self-Forcing's pipeline.

    Attributes:
        kv_cache1: per-layer rolling caches; None until the first :meth:`inference`, then kept between calls.
        frame_seq_length: tokens of a frame.
        denoising_step_list: timesteps of the denoising calls, LongTensor.
    """

    def __init__(self, generator: ReferenceGenerator, denoising_step_list: Sequence[int] = STEPS) -> None:
        super().__init__()
        self.generator = generator
        self.text_encoder = NullTextEncoder()
        self.vae = PixelVAE()
        self.scheduler = generator.get_scheduler()
        self.denoising_step_list = torch.tensor(denoising_step_list, dtype=torch.long)
        self.num_transformer_blocks = generator.model.num_layers
        self.frame_seq_length = generator.model.frame_seqlen
        self.num_frame_per_block = generator.model.num_frame_per_block
        self.local_attn_size = generator.model.local_attn_size
        self.independent_first_frame = False
        self.args = SimpleNamespace(context_noise=0)
        self.kv_cache1: KVCache | None = None
        self.crossattn_cache: list[dict[str, Any]] | None = None

    @classmethod
    def pretrained(
        cls,
        kind: str = BASE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        local_attn_size: int | None = None,
        sink_size: int | None = None,
    ) -> ReferencePipeline:
        """A trained model for 32x32 pixels; one call of the generator per denoising step.

        Args:
            kind: how it drifts, a key of ``kinds.KINDS``: ``"fading"`` (plain), ``"burning"`` (the same weights with
                guidance on history: within each call the model also sees the chunk alone, without a cache), ``"sink"``
                (trained with its first chunk kept).
            device, dtype: where and how it runs.
            local_attn_size, sink_size: window and sink in frames; None: as it was trained.
        """
        return cls.frozen(load_model(kind, local_attn_size, sink_size).to(device=device, dtype=dtype))

    @classmethod
    def random(
        cls,
        seed: int = 0,
        layers: int = 2,
        dim: int = 32,
        heads: int = 2,
        grid: tuple[int, int] = (4, 4),
        local_attn_size: int = 21,
        sink_size: int = 0,
        num_frame_per_block: int = 3,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ReferencePipeline:
        """A tiny untrained model for exactness tests; every weight is non-zero, so every token matters.

        Frames have ``4 * grid`` pixels. Leaves the global random state alone.
        """
        with torch.random.fork_rng(devices=[]):
            model = CausalVideoModel(
                dim=dim, layers=layers, heads=heads, mlp_ratio=2, grid=grid, local_attn_size=local_attn_size,
                sink_size=sink_size, num_frame_per_block=num_frame_per_block,
            )  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / fan_in**0.5)
        return cls.frozen(model.to(device=device, dtype=dtype))

    @classmethod
    def frozen(cls, model: CausalVideoModel) -> ReferencePipeline:
        """A pipeline around ``model``, for sampling only."""
        pipeline = cls(ReferenceGenerator(model))
        pipeline.eval().requires_grad_(False)
        return pipeline

    @torch.no_grad()
    def inference(
        self,
        noise: Tensor,
        text_prompts: Sequence[str] | None = None,
        initial_latent: Tensor | None = None,
        return_latents: bool = False,
        on_chunk: OnChunk | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate a video.

        Args:
            noise: [B, F, C, H, W]; F whole chunks (with ``independent_first_frame`` and no prefix, one frame more).
            text_prompts: ignored, the model is unconditional.
            initial_latent: given first frames [B, F0, C, H, W] in [-1, 1]; whole chunks as above.
            return_latents: also return the unclamped latents.
            on_chunk: called after every generated chunk.

        Returns:
            video [B, F0 + F, C, H, W] in [0, 1]; with ``return_latents`` a pair of it and the latents.
        """
        given = 0 if initial_latent is None else initial_latent.shape[1]
        output = noise.new_zeros([noise.shape[0], given + noise.shape[1], *noise.shape[2:]])
        conditional = self.text_encoder(text_prompts=text_prompts)
        self._reset_caches(noise, output.shape[1])
        start = 0
        for frames in self._chunk_sizes(given) if initial_latent is not None else []:
            assert initial_latent is not None
            reference = initial_latent[:, start : start + frames]
            output[:, start : start + frames] = reference
            zero = torch.zeros([noise.shape[0], 1], device=noise.device, dtype=torch.long)
            self._call(reference, zero, conditional, start)
            start += frames
        sizes = self._chunk_sizes(noise.shape[1], follows=given > 0)
        for index, frames in enumerate(sizes):
            chunk = self._denoise(noise[:, start - given : start - given + frames], conditional, start)
            output[:, start : start + frames] = chunk
            context_noise = torch.full(chunk.shape[:2], self.args.context_noise, device=noise.device, dtype=torch.long)
            # The very tensor that the last denoising call returned, as Self-Forcing does.
            self._call(chunk, context_noise, conditional, start)
            start += frames
            if on_chunk is not None:
                on_chunk(index, len(sizes), chunk)
        video = (self.vae.decode_to_pixel(output, use_cache=False) * 0.5 + 0.5).clamp(0, 1)
        return (video, output) if return_latents else video

    def _denoise(self, noisy_input: Tensor, conditional: dict[str, Any], start: int) -> Tensor:
        last = len(self.denoising_step_list) - 1
        for index, current in enumerate(self.denoising_step_list):
            timestep = torch.full(noisy_input.shape[:2], int(current), device=noisy_input.device, dtype=torch.long)
            denoised_pred = self._call(noisy_input, timestep, conditional, start)
            if index < last:
                clean = denoised_pred.flatten(0, 1)
                following = torch.full([len(clean)], int(self.denoising_step_list[index + 1]), device=clean.device)
                noisy = self.scheduler.add_noise(clean, torch.randn_like(clean), following)
                noisy_input = noisy.unflatten(0, denoised_pred.shape[:2])
        return denoised_pred

    def _call(self, latents: Tensor, timestep: Tensor, conditional: dict[str, Any], start: int) -> Tensor:
        prediction: Tensor = self.generator(
            noisy_image_or_video=latents,
            conditional_dict=conditional,
            timestep=timestep,
            kv_cache=self.kv_cache1,
            crossattn_cache=self.crossattn_cache,
            current_start=start * self.frame_seq_length,
        )[1]
        return prediction

    def _chunk_sizes(self, frames: int, follows: bool = False) -> list[int]:
        """Frames of each chunk; the video's first one is a single frame with ``independent_first_frame``."""
        first = [1] if self.independent_first_frame and not follows else []
        blocks, rest = divmod(frames - len(first), self.num_frame_per_block)
        if rest or blocks < 0:
            raise ValueError(f"{frames} frames are not whole chunks of {self.num_frame_per_block}; give a multiple")
        return first + [self.num_frame_per_block] * blocks

    def _reset_caches(self, noise: Tensor, frames: int) -> None:
        """Make caches, or keep those of an earlier call and start them over: old rows stay, new indices hide them."""
        capacity = (max(frames, 21) if self.local_attn_size == -1 else self.local_attn_size) * self.frame_seq_length
        if self.kv_cache1 is None or not _fits(self.kv_cache1[0]["k"], noise, capacity):
            self._initialize_kv_cache(noise.shape[0], noise.dtype, noise.device, capacity)
            blocks = range(self.num_transformer_blocks)
            self.crossattn_cache = [{"k": None, "v": None, "is_init": False} for _ in blocks]
            return
        for cache in self.kv_cache1:
            cache["global_end_index"] = torch.tensor([0], dtype=torch.long, device=noise.device)
            cache["local_end_index"] = torch.tensor([0], dtype=torch.long, device=noise.device)

    def _initialize_kv_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        shape = [batch_size, capacity, self.generator.model.num_heads, self.generator.model.head_dim]
        self.kv_cache1 = [
            {
                "k": torch.zeros(shape, dtype=dtype, device=device),
                "v": torch.zeros(shape, dtype=dtype, device=device),
                "global_end_index": torch.tensor([0], dtype=torch.long, device=device),
                "local_end_index": torch.tensor([0], dtype=torch.long, device=device),
            }
            for _ in range(self.num_transformer_blocks)
        ]


def _fits(rows: Tensor, noise: Tensor, capacity: int) -> bool:
    same_kind = rows.dtype == noise.dtype and rows.device == noise.device
    return same_kind and rows.shape[0] == noise.shape[0] and rows.shape[1] >= capacity
