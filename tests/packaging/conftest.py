"""Installing an example package as a stranger would, without an index."""

import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Install a package into a folder of its own, from a copy so that no build folder stays in the checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

    def into_a_folder(package):
        copy, folder = tmp_path_factory.mktemp("source") / package.name, tmp_path_factory.mktemp("site")
        subprocess.run(["cp", "-r", str(package), str(copy)], check=True)
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder)]
        subprocess.run([*pip, "install", *options, str(copy)], check=True, timeout=300)
        return folder

    return into_a_folder
