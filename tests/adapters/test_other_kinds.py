"""The example adapters for kinds of models that no built-in adapter covers are on trial like any other."""

import kinds


class TestPerSite(kinds.PerSite):
    pass


class TestVelocity(kinds.Velocity):
    pass
