"""The example policy installs offline, is found by its entry point, passes the kit, and is used by the command line."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_policy"

SCRIPT = """
import tokentrim_hooks as tokentrim

(info,) = [info for info in tokentrim.policies() if info.name == "contrast-limit"]
assert info.distribution == "contrast-tokentrim 0.1.0" and info.hooks == ("correct",), info
print(tokentrim.make_policy("contrast-limit", limit=1.5))
"""


@pytest.fixture(scope="module")
def target(install):
    return install(EXAMPLE)


def test_found_and_made_by_its_name(python, target):
    assert python(target, "-c", SCRIPT).strip() == "ContrastLimit(limit=1.5)"


def test_listed_by_the_command(python, target):
    row = next(line for line in python(target, "-m", "tokentrim_hooks", "policies").splitlines() if "contrast" in line)
    assert row.split()[:3] == ["contrast-limit", "correct", "contrast-tokentrim"]


def test_its_own_test_passes(python, target):
    test = str(EXAMPLE / "tests" / "test_policy.py")
    out = python(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-rs", test)
    assert "passed" in out and "failed" not in out
    assert "SKIPPED [2]" in out and out.count("NOT CHECKED") == 1, (
        f"only neutral options, of which it has none, go unchecked: {out}"
    )


def test_the_policy_is_short():
    assert len((EXAMPLE / "contrast_tokentrim.py").read_text().splitlines()) < 40
