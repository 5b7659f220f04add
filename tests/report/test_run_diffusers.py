"""``tokentrim run`` on a script as users of diffusers write it: all through ``from_pretrained``, from a folder."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tests.adapters import skyreels_tiny as tiny
from tokentrim_hooks.metrics.video import read_video
from tokentrim_hooks.report.record import read_report

SCRIPT = """
import argparse

import numpy
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

from tokentrim_hooks.metrics.writing import write_video

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--out")
arguments = parser.parse_args()

if __name__ == "__main__":
    torch.manual_seed(0)  # addnoise_condition draws without the generator
    vae = AutoencoderKLWan.from_pretrained(arguments.model, subfolder="vae", torch_dtype=torch.float32)
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(arguments.model, vae=vae, torch_dtype=torch.bfloat16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=8.0)
    pipe = pipe.to("cpu")
    video = pipe(
        prompt="a lighthouse in a storm",
        height=64,
        width=64,
        num_frames=37,
        base_num_frames=13,
        overlap_history=5,
        addnoise_condition=20,
        num_inference_steps=3,
        guidance_scale=6.0,
        generator=torch.Generator("cpu").manual_seed(0),
    ).frames[0]
    write_video(arguments.out + ".mp4", video, fps=24)
    numpy.save(arguments.out + ".npy", video)
"""
CHUNKS, CHUNK_FRAMES = 4, (4, 2, 2, 2)
"""Windows of 4 latent frames, 2 of which overlap: 10 latent frames, 37 pictures."""


@pytest.fixture
def project(tmp_path):
    pipe = tiny.pipeline()
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=4, d_model=tiny.TEXT, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "lighthouse": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    pipe.register_modules(tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text), vae=tiny.autoencoder())
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "generate.py").write_text(SCRIPT)
    return tmp_path


def python(project, *launcher):
    """Run the script behind ``launcher``; its frames and what it printed to standard error."""
    command = [sys.executable, *launcher, "generate.py", "--model", "model", "--out", "video"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return np.load(project / "video.npy"), done.stderr


def run(project, *options, folder="log"):
    video, said = python(project, "-m", "tokentrim_hooks", "run", "--out", folder, *options)
    return video, said, read_report(project / folder)


def test_skyreels(project):
    plain, _ = python(project)
    observed, _, log = run(project, "--observe", "--quiet", "--no-thumbnails")
    assert plain.shape == (37, 64, 64, 3) and np.array_equal(observed, plain)
    assert len(log) == CHUNKS and log.triggers == 0
    assert not (project / "log" / "thumbs").exists()

    pruned, said, log = run(project, "--sensitivity", "0", "--warmup", "1", "--fraction", "0.25", folder="pruned")
    assert [record.frames for record in log.records] == list(CHUNK_FRAMES)
    assert log.settings["adapter"] == "skyreels-v2" and log.triggers > 0
    assert "pruned 4/16 tokens" in said and "report.html" in said
    first = min(record.start for record in log.records if record.pruned)
    before = 4 * first - 3
    assert np.array_equal(pruned[:before], plain[:before]) and not np.array_equal(pruned, plain)
    assert read_video(project / "video.mp4")[0].shape == (37, 64, 64, 3)
    page = (project / "pruned" / "report.html").read_text()
    assert page.count("data:image/png") >= log.triggers
    assert len(list((project / "pruned" / "thumbs").glob("*.png"))) == CHUNKS
