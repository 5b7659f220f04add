"""Starts ComfyUI's own ``main.py``: ``python comfyui_start.py FOLDER arguments...``.

torchvision and torchaudio are empty stand-ins where they are not installed. transformers comes first: it asks for them.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import transformers.models.t5.modeling_t5  # noqa: F401
from harness import StubFinder
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: F401

if __name__ == "__main__":
    missing = tuple(name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name) is None)
    sys.meta_path.insert(0, StubFinder(missing))
    main = str(Path(sys.argv[1], "main.py"))
    sys.path[0] = sys.argv[1]
    sys.argv = [main, *sys.argv[2:]]
    runpy.run_path(main, run_name="__main__")
