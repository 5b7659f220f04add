"""How often FramePack's adapters wait for the device: once more per section than others, where it is made forwards."""

from __future__ import annotations

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import AdapterConformance, count_syncs


class FramePackWaits(AdapterConformance):
    """A kit of which one test allows a second wait."""

    def test_one_synchronisation_a_chunk(self) -> None:
        """Forwards a second one: whether a section opens a video is read from its history.

        The kit counts each tensor as one of a device; the samplers keep their frame indices on the host, wherever the
        model is, and reading these waits for nothing.
        """
        model = self.make_model()
        with self.patch(model, tokentrim.ObservePolicy()), count_syncs() as log:
            self.run(model, 0)
        waits = [event for event in log.ours if not (event.kind == "__int__" and "framepack.py" in event.place)]
        assert 0 < len(waits) <= self.chunks * (1 if self.backwards else 2), log
