"""Unpacks the Python part of a wheel: ``python tools/python_part.py WHEEL FOLDER``.

vLLM's wheel is for a GPU; its Python part imports on a CPU, its libraries do not.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

KEPT = (".py", ".json", ".txt", "METADATA")


def unpack(wheel: Path, folder: Path) -> int:
    """Unpack it into a folder; return the number of files."""
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if name.endswith(KEPT)]
        packed.extractall(folder, names)
    return len(names)


if __name__ == "__main__":
    found = unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{found} files of {Path(sys.argv[1]).name}")
