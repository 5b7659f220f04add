"""What is imported only when asked for: optional dependencies, and what a user names as ``package.module:name``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tokentrim_hooks.errors import MissingExtraError, TokenTrimError


def require(module: str, extra: str = "") -> Any:
    """Import ``module`` or say which extra of this package brings it; without ``extra`` it is installed by its name.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        package = module.partition(".")[0]
        wanted = f"'tokentrim-hooks[{extra}]'" if extra else package
        raise MissingExtraError(f"this needs {package}, which is not installed: pip install {wanted}") from failure


def imported(target: str) -> Any:
    """Import ``package.module:name`` (or ``:name.part``), the current folder included.

    Raises:
        TokenTrimError: the target is not of that form, or not to be imported.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise TokenTrimError(f"{target!r} must read package.module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as failure:
        raise TokenTrimError(f"cannot import {target}: {failure}") from failure
    return found
