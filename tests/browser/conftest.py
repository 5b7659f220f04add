"""One browser for each file of tests, or none where there is no Chromium."""

import pytest
from chromium import chromium, missing


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found
