"""What is imported only when asked for: optional dependencies, and what a user names as ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import MissingExtraError, TokenTrimError

CHECKOUT = Path(__file__).parents[1]
"""The folder of the source, where this package was installed from one (``pip install -e``)."""

OF_ITSELF = {"cv2": "opencv-python-headless"}
"""In no extra of ours, for a second OpenCV breaks the first: who has none installs this one."""


def require(module: str, extra: str = "") -> Any:
    """Import ``module`` or say which extra of this package brings it; without ``extra`` it is installed by its name.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        package = module.partition(".")[0]
        wanted = OF_ITSELF.get(package) or (with_extra(extra) if extra else package)
        raise missing("this", [package], [wanted]) from failure


def require_all(wanted: Mapping[str, Sequence[str]]) -> None:
    """Import all modules of ``wanted``, which lists them by extra, or say in one command how to get all that lack.

    Raises:
        MissingExtraError: some are not installed.
    """
    absent = {extra: [name for name in modules if not _is_there(name)] for extra, modules in wanted.items()}
    every = [name for modules in absent.values() for name in modules]
    if not every:
        return
    extras = [extra for extra, modules in absent.items() if any(name not in OF_ITSELF for name in modules)]
    words = [*([with_extra(",".join(extras))] if extras else []), *(OF_ITSELF[n] for n in every if n in OF_ITSELF)]
    raise missing("this", every, words)


def missing(who: str, names: Sequence[str], packages: Sequence[str]) -> MissingExtraError:
    """What to raise where ``who`` needs what is not installed; ``packages`` is what pip takes."""
    named = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    are, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return MissingExtraError(
        f"{who} needs {named}, which {are} not installed.\nInstall {them}: pip install {' '.join(packages)}"
    )


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        return (sys.modules[module] if module in sys.modules else importlib.util.find_spec(module)) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def lacking(needs: Any) -> tuple[str, ...]:
    """What is not installed of ``needs``, which maps modules to the names that pip knows; by these names."""
    named = needs if isinstance(needs, Mapping) else {}
    return tuple(str(package) for module, package in named.items() if not is_installed(str(module)))


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def with_extra(extra: str) -> str:
    """This package with an extra, as pip takes it: from where it was installed, a registry's name where nothing says.

    Where that was is read from the checkout that this file lies in, or from ``direct_url.json`` (PEP 610).
    """
    if (CHECKOUT / "pyproject.toml").is_file():
        return f"-e '{CHECKOUT}[{extra}]'"
    origin = json.loads(distribution("tokentrim-hooks").read_text("direct_url.json") or "{}")
    kind = origin.get("vcs_info", {}).get("vcs")
    url = origin.get("url", "")
    if kind:  # before 24.1 pip takes no git+file:/// behind a name
        url = f"{kind}+{url.replace('file:///', 'file://localhost/')}"
    source = f" @ {url}" if url else ""
    return f"'tokentrim-hooks[{extra}]{source}'"


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
    except (Exception, SystemExit) as failure:
        raise TokenTrimError(
            f"cannot import {target}: {in_short(failure)}.\nRun it where that can be imported, or correct the "
            "name."
        ) from failure
    return found


def in_short(failure: BaseException) -> str:
    """What somebody's code raised, and in which line of it, in one line."""
    words = " ".join(traceback.format_exception_only(failure)[-1].split())
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if "importlib" not in f.filename]
    last = frames[-1] if frames else None
    ours = last is None or CHECKOUT / "tokentrim_hooks" in Path(last.filename).parents  # the call itself was wrong
    where = "" if ours else f" ({last.filename}:{last.lineno})"  # type: ignore[union-attr]
    return f"{words}{where}"
