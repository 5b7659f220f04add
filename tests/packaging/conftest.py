"""Installing an example package as a stranger would, without an index, and running Python with it."""

import os
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


@pytest.fixture(scope="session")
def python():
    """Run Python with a folder of packages before the others; what it prints, or a failure."""

    def run(target, *arguments):
        path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=target, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
