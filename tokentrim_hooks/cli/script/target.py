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
from pathlib import Path
from types import TracebackType

from tokentrim_hooks.errors import TokenTrimError


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
        if not is_module and not Path(name).is_file():
            raise TokenTrimError(f"no such script: {name}\nGive its path; a module's name goes behind -m.")
        if is_module and not _is_found(name):
            raise TokenTrimError(f"no such module: {name}\nRun it from the folder that holds it, or install it.")
        return cls(name, tuple(arguments), is_module)

    def run(self) -> int:
        """Run it; 1 if it raised, which is shown as Python shows it, else 0. SystemExit and Ctrl-C go on up."""
        try:
            with self._as_main():
                if self.is_module:
                    runpy.run_module(self.name, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(self.name, run_name="__main__")
        except Exception as failure:
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


def _is_found(module: str) -> bool:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False
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
