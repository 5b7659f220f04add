"""How the plugin patches: ``TOKENTRIM_SGLANG_POLICY`` is a JSON object of fields of ``tokentrim_hooks.DriftPolicy``."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import tokentrim_hooks as tokentrim

from .adapter import SGLang

VARIABLE = "TOKENTRIM_SGLANG_POLICY"


def patch_first(transformer: Any) -> None:
    """Patch a transformer. A refusal, now or later, warns and costs a video its pruning, never the video.

    Raises:
        ValueError, TypeError: the variable holds no fields of the policy.
    """
    if tokentrim.is_patched(transformer):
        return
    wanted = policy()
    try:
        tokentrim.patch(transformer, wanted, adapter=SGLang, on_error="warn")
    except tokentrim.TokenTrimError as refusal:
        words = f"SGLang's transformer stays unpatched: {refusal}"  # which says what to do
        warnings.warn(words, tokentrim.TokenTrimWarning, stacklevel=2)


def policy() -> tokentrim.Policy:
    """The paper's policy, with the fields that the environment gives.

    Raises:
        ValueError: the variable holds no JSON object.
        TypeError: it names a field that the policy has not.
    """
    text = os.environ.get(VARIABLE, "{}")
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"{VARIABLE} is {text!r}, no JSON object.\nGive fields of DriftPolicy, such as {{}}.")
    return tokentrim.DriftPolicy(**fields)
