"""Options of a patch that all ranks of a group must share: by them they call the model again, or step aside."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import shorten

from tokentrim_hooks.errors import RankError
from tokentrim_hooks.ranks.agreement import Alone

UNSAID = re.compile(r" at 0x[0-9a-fA-F]+|(?<=cuda):\d+|(?<=xpu):\d+|(?<=npu):\d+|, index=\d+")
"""What differs between processes in the text of an object, and says nothing: addresses, each one's own card."""
LONG = 60
"""Letters of an option that are shown."""


@dataclass(frozen=True)
class Options:
    """What this rank was patched with, in words by name, and the first rank of its group."""

    own: dict[str, str]
    first: dict[str, str] = field(default_factory=dict)
    holds = True

    def marks(self) -> list[int]:
        """None: they are compared by name."""
        return []

    def told(self) -> dict[str, str]:
        """Of the first rank all others hear."""
        return self.own

    def adopt(self, told: dict[str, str], holds: bool) -> Options:
        """The same, with the first rank's."""
        return dataclasses.replace(self, first=told)

    def compared(self) -> Options:
        """Itself.

        Raises:
            RankError: the first rank has others.
        """
        unlike = [name for name in {**self.first, **self.own} if self.first.get(name) != self.own.get(name)]
        if unlike:
            name = unlike[0]
            words = [side.get(name, "not set") for side in (self.own, self.first)]
            own, first = (shorten(word, LONG, placeholder="...") for word in words)
            raise RankError(
                f"patched with {name} = {own} here and {first} on the group's first rank, and by it ranks call the "
                "model.\nGive patch() the same options on all ranks of a group."
            )
        return self


def in_words(value: object) -> str:
    """An option's text, the same on all ranks that were given the same: strings of a set lie in another order there."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(in_words, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{in_words(key)}: {in_words(part)}' for key, part in value.items()))}}}"
    if type(value) in (list, tuple):
        return f"[{', '.join(map(in_words, value))}]"  # type: ignore[call-overload]
    return UNSAID.sub("", repr(value))


def require_alike(ranks: Alone, options: Mapping[str, object]) -> None:
    """Compare the options of all ranks, which ask at the same time: two small collectives, once for each patch.

    Raises:
        RankError: those of one rank are others; on all of them.
    """
    if not ranks.alone:

        def own() -> Options:
            return Options({name: in_words(value) for name, value in options.items()})

        ranks.settle("patch()", ranks.settle("options of patch()", own).compared)
