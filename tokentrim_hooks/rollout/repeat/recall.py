"""Counts of a model's, of hooks and of replaced forwards: put back before a call is made again.

What counts its calls would take a repeated one for the next. Where it counts is learned from the first calls of a
denoiser. From then on it is kept, before each call, what is in these places, until the chunk is done: a few numbers.
The first prune shows whether there is anything in them that a repeated call moves on; where there is not, nothing is
kept any more. Where there is, a repeated call begins with what the first one began with, and so moves it on once.

Only counts are put back: what a call leaves there must be the same whatever the data, else it is a memory. And other
memory is not put back, as large tensors, and may be read by some calls only, as the counts say. So every prune of such
a model is proved: the call is made again with nothing pruned, and must give the same and leave the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from tokentrim_hooks.inspection import weakly
from tokentrim_hooks.rollout.repeat.counters import Changes, Counters
from tokentrim_hooks.rollout.repeat.spots import Spot, Taken

LEARNS = 2
"""Calls of a denoiser from which is learned where it counts."""


@dataclass
class Course:
    """A call of the sampler's: what was in the places where it counts before, and behind it."""

    before: Taken
    counters: Counters | None = None
    after: Taken | None = None


@dataclass
class _Known:
    """Of one denoiser: how many calls were learned from, of which video, where they count, and what is put back.

    ``fresh`` is what was learned from the latest video: it and the one before it may be made in turns.
    """

    denoiser: Callable[[], object]
    learned: int = 0
    video: int = 0
    spots: dict[Hashable, Spot] = field(default_factory=dict)
    fresh: dict[Hashable, Spot] = field(default_factory=dict)
    moving: set[Hashable] = field(default_factory=set)
    counts: bool = False


class Recall:
    """What is known of the denoisers of a patched model."""

    def __init__(self) -> None:
        self._known: list[_Known] = []

    def begin(self, module: object, video: int) -> Course | None:
        """The sampler calls, for a video of this number. None where nothing counts."""
        known = self._of(module)
        if known.counts and video > known.video:
            # Somebody's hooks may be others for each video.
            known.learned, known.video, known.spots, known.fresh = 0, video, known.fresh, {}
        learns = known.learned < LEARNS
        if not learns and not known.spots:
            return None
        return Course(Taken(known.spots.values()), Counters(module) if learns else None)

    def end(self, module: object, course: Course | None) -> None:
        """The call has come back."""
        if course is None:
            return
        counters, course.counters = course.counters, None
        if counters is not None:
            known = self._of(module)
            known.learned += 1
            known.fresh |= {spot.key: spot for spot in counters.moved_on()}
            known.spots |= known.fresh
            known.moving &= known.spots.keys()
        course.after = Taken(course.before.spots)

    # ------------------------------------------------------------------------------------------ calls made again

    def counts(self, module: object) -> bool:
        """Whether it is known to count its calls, so that each prune of it is to be proved."""
        return self._of(module).counts

    def proved(self, module: object, counts: bool) -> None:
        """Whether it counts, on any of the ranks that share it; if not, nothing of it is kept any more."""
        known = self._of(module)
        known.counts = counts
        known.spots = {key: spot for key, spot in known.spots.items() if counts and key in known.moving}
        known.fresh = dict(known.spots)

    def adopts(self, module: object, changed: Changes, courses: list[Course | None]) -> bool:
        """Whether what a repeated call has moved on can be put back, for that was kept of all ``courses``."""
        keys = {spot.key for spot in changed.spots}
        if not keys or not all(course is not None and all(map(course.before.holds, keys)) for course in courses):
            return False
        known = self._of(module)
        known.moving |= keys
        known.counts = True
        return True

    def moving(self, module: object) -> set[Hashable]:
        """Keys of what is put back before a call that is made again."""
        known = self._of(module)
        return known.moving if known.counts else set()

    def taken(self, module: object) -> Taken:
        """What is in these places now."""
        known, moving = self._of(module), self.moving(module)
        return Taken(spot for key, spot in known.spots.items() if key in moving)

    def rewind(self, module: object, course: Course | None) -> None:
        """Before a call is made again: as it was before the first time."""
        moving = self.moving(module)
        if course is not None and moving:
            course.before.put_back(moving)

    def left_otherwise(self, module: object, course: Course | None) -> list[str]:
        """Names of what a call that was made again has left otherwise than the first time: it depends on the data.

        All is put back then.
        """
        moving = self.moving(module)
        if course is None or course.after is None or not moving:
            return []
        lost = course.after.changed() & moving
        if lost:
            course.after.put_back(moving)
        return sorted({spot.label for spot in course.before.spots if spot.key in lost})

    def _of(self, module: object) -> _Known:
        for known in self._known:
            if known.denoiser() is module:
                return known
        self._known = [known for known in self._known if known.denoiser() is not None]
        self._known.append(_Known(weakly(module)))
        return self._known[-1]
