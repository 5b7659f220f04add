"""Optional dependencies: imported when used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

from tokentrim_hooks.errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """Import ``module`` or say which extra of this package brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        raise MissingExtraError(
            f"this needs {module.partition('.')[0]}, which is not installed: pip install 'tokentrim-hooks[{extra}]'"
        ) from failure
