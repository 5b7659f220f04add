"""Marks for pluggy: the name under which plugins are found, and the decorators that they use."""

import pluggy

GROUP = "tokentrim_hooks"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
