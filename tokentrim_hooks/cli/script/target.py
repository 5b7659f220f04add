"""Somebody's script or module, run in this process as ``python`` would run it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import TracebackType

from tokentrim_hooks.errors import TokenTrimError

EMPTY = "'', an empty name"


@dataclass(frozen=True)
class Target:
    """A script's path, or a module's name, and its arguments."""

    name: str
    arguments: Sequence[str]
    is_module: bool = False

    @classmethod
    def of(cls, name: str, arguments: Sequence[str], is_module: bool = False) -> Target:
        """See that it is there.

        Raises:
            TokenTrimError: it is not.
        """
        if is_module:
            _require_module(name)
        elif not Path(name).is_file():
            raise TokenTrimError(f"no such script: {name or EMPTY}\nGive its path; a module's name goes behind -m.")
        return cls(name, tuple(arguments), is_module)

    def run(self) -> int:
        """Run it; 1 if it raised, whatever it is, which is shown as Python shows it, else 0.

        SystemExit and Ctrl-C go on up.
        """
        try:
            with self._as_main():
                if self.is_module:
                    runpy.run_module(self.name, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(self.name, run_name="__main__")
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as failure:  # a CancelledError, too
            own = _its_own(failure.__traceback__)
            sys.excepthook(type(failure), failure.with_traceback(own), own)
            return 1
        return 0

    @contextlib.contextmanager
    def _as_main(self) -> Iterator[None]:
        argv, path = sys.argv, list(sys.path)
        sys.argv = [self.name, *self.arguments]
        sys.path.insert(0, os.getcwd() if self.is_module else str(Path(self.name).resolve().parent))
        try:
            yield
        finally:
            sys.argv, sys.path[:] = argv, path


def _its_own(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without what ran the script."""
    own = trace
    while own is not None and own.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        own = own.tb_next
    return own  # None where it never began: of a script that cannot be compiled Python shows no frame either


def _require_module(name: str) -> None:
    """See that ``python -m`` could run it.

    Raises:
        TokenTrimError: it could not.
    """
    if name.endswith(".py"):  # a search for it would import the module in front of the dot
        raise TokenTrimError(f"no such module: {name}\nLeave -m out for a file, or .py for a module.")
    spec = _spec(name)
    if spec is None:
        raise TokenTrimError(f"no such module: {name or EMPTY}\nRun it from the folder that holds it, or install it.")
    folders = spec.submodule_search_locations
    # Looked for in its folders: by its name the search would import the package, before seeds and patch are there.
    if folders is not None and PathFinder.find_spec(f"{name}.__main__", list(folders)) is None:
        raise TokenTrimError(f"the package {name} has no __main__ to run.\nName a module in it, as {name}.NAME.")


def _spec(module: str) -> ModuleSpec | None:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    finally:
        sys.path.remove(os.getcwd())


def seed_all(seed: int) -> None:
    """Seed the generators that a script may draw from without seeding: Python's, NumPy's, torch's on every device."""
    import torch

    random.seed(seed)
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
