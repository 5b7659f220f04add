"""Plants mistakes in the core, one at a time in a copy, and tells which of them the tests let through.

``make mutants``, or ``python tools/mutants.py [--list] [--only N ...]``. The checkout is never written to.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401 - imported before the fork, as torch is, so that no mutant waits for it
import pytest
import torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"tokentrim_hooks": "tokentrim_hooks", "adapters": "tokentrim_hooks_adapters"}
"""Folder in the checkout: name that it is imported by."""
LIMIT = 600
"""Seconds for the tests of one mutant; one that hangs is caught, too."""


@dataclass(frozen=True)
class Copy:
    """A copy of the package in a folder of its own, which comes before the checkout on the path."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Copy:
        """Copy the package and its adapters."""
        for source, name in PACKAGES.items():
            shutil.copytree(ROOT / source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        return cls(folder)

    def file(self, mutant: Mutant) -> Path:
        """The file that a mutant changes."""
        top, rest = mutant.file.split("/", 1)
        return self.folder / PACKAGES[top] / rest

    def test(self, nodes: tuple[str, ...]) -> int:
        """Run tests of the checkout on the copy, in a process of their own; pytest's exit code."""
        child = multiprocessing.get_context("fork").Process(target=self._test, args=(nodes,), daemon=True)
        child.start()
        child.join(LIMIT)
        if child.is_alive():
            child.kill()
            return int(pytest.ExitCode.TESTS_FAILED)
        return int(child.exitcode or 0)

    def _test(self, nodes: tuple[str, ...]) -> None:
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        sys.dont_write_bytecode = True
        for name in PACKAGES.values():
            found = importlib.util.find_spec(name)
            if found is None or not Path(str(found.origin)).is_relative_to(self.folder):
                print(f"{name} is not imported from the copy: no mutant was planted", file=sys.stderr)
                os._exit(int(pytest.ExitCode.INTERNAL_ERROR))
        with (self.folder / "output").open("w") as output:
            os.dup2(output.fileno(), 1)
            options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=line", "-c", str(ROOT / "pyproject.toml")]
            code = pytest.main([*options, *(str(ROOT / node) for node in nodes)])
        os._exit(int(code))


def require_sound(copy: Copy, numbers: Sequence[int]) -> None:
    """Make sure that the tests pass while nothing is planted: one that fails anyway kills nothing. Exits otherwise."""
    nodes = tuple(dict.fromkeys(node for number in numbers for node in MUTANTS[number].tests))
    if copy.test(nodes):
        sys.exit(f"tests fail without a mutant:\n{(copy.folder / 'output').read_text()[-2000:]}")


def killed(copy: Copy, mutant: Mutant) -> bool:
    """Plant a mutant, run its tests, and take it out again."""
    file = copy.file(mutant)
    sound = file.read_text()
    if sound.count(mutant.old) != 1:
        sys.exit(f"{mutant.file}: {mutant.old!r} occurs {sound.count(mutant.old)} times; correct tools/planted")
    try:
        file.write_text(sound.replace(mutant.old, mutant.new))
        code = copy.test(mutant.tests)
    finally:
        file.write_text(sound)
    if code not in (0, 1):
        # Neither passed nor failed: the tests were not found, or could not be collected.
        sys.exit(f"the tests of {mutant.means!r} did not run:\n{(copy.folder / 'output').read_text()[-2000:]}")
    return code == 1


def main() -> int:
    """Plant all mutants, or some; 1 if any survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the mutants and plant none")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="plant these only, by number in the list")
    options = parser.parse_args()
    chosen = options.only or range(len(MUTANTS))
    if options.list:
        for number in chosen:
            print(f"{number:3} {MUTANTS[number].file}: {MUTANTS[number].means}")
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy.make(Path(folder).resolve())
        require_sound(copy, chosen)
        for number in chosen:
            dies = killed(copy, MUTANTS[number])
            survivors += not dies
            print(f"{number:3} {'killed  ' if dies else 'SURVIVED'} {MUTANTS[number].means}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
