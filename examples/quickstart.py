"""TokenTrim on the small reference model, in seconds on a CPU; needs the ``demo`` extra."""

import torch

import tokentrim_hooks as tokentrim  # not PyPI's `tokentrim`, which is another project
from tokentrim_hooks.reference import ReferencePipeline, scenes

torch.manual_seed(5)
pipeline = ReferencePipeline.pretrained()
first_chunk = scenes(seed=5, count=2, frames=3).video
noise = torch.randn(2, 24, 3, 32, 32)  # 2 videos, 8 chunks of 3 frames

handle = tokentrim.patch(pipeline)  # finds the adapter; the model's source stays untouched
video = pipeline.inference(noise, initial_latent=first_chunk)  # your own code: [2, 27, 3, 32, 32] in [0, 1]
print(handle.report.summary())
handle.unpatch()  # the model is as it was, to the attribute
