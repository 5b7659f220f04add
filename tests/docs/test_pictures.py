"""Pictures of the documentation: small, described for those who do not see them, and made by a script."""

import re
from pathlib import Path

import policy_pictures
import pytest
import torch
from PIL import Image

import tokentrim_hooks as tokentrim

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(r"!\[([^\]]*)\]\((pictures/[^)]+)\)", (ROOT / "docs" / "policies.md").read_text())


def test_every_policy_that_does_something_has_a_picture():
    shown = {path.removeprefix("pictures/policy-").removesuffix(".png") for _, path in SHOWN}
    assert shown == policy_pictures.PICTURES.keys()
    built_in = {info.name for info in tokentrim.policies() if info.distribution == "tokentrim-hooks"}
    assert built_in - shown <= {"observe"}, "it changes nothing"


@pytest.mark.parametrize(("alt", "path"), SHOWN, ids=lambda value: value[-30:])
def test_a_picture_is_small_and_described(alt, path):
    file = ROOT / "docs" / path
    assert 1000 < file.stat().st_size < policy_pictures.MOST
    width, height = Image.open(file).size
    assert 600 <= width <= 900 and height <= 300
    assert len(alt.split()) >= 12, "what it shows, in words"


def test_the_script_draws_what_is_committed(tmp_path, monkeypatch):
    """The quickest one; each picture checks by itself that what it shows has happened."""
    monkeypatch.setattr(policy_pictures, "FOLDER", tmp_path)
    torch.manual_seed(0)
    drawn = Image.open(policy_pictures.late_mean()).convert("RGB")
    kept = Image.open(ROOT / "docs" / "pictures" / "policy-late-mean.png").convert("RGB")
    assert drawn.size == kept.size
    away = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).int()
    away -= torch.frombuffer(bytearray(kept.tobytes()), dtype=torch.uint8).int()
    assert away.abs().float().mean() < 8, "but for fonts and rounding"
