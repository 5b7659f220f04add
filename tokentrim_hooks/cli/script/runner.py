"""``tokentrim run``: run somebody's unmodified script with every known model patched as it is constructed.

Adapters name classes (``constructors``, as ``module:Class``). Nothing is imported early: a post-import hook wraps the
class's ``__init__`` when the script itself imports the module. A constructed object is patched only if an adapter
recognises its structure; the names merely say where to look.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wrapt

from tokentrim_hooks.api import Detection, detect, patch
from tokentrim_hooks.cli.script.target import Target
from tokentrim_hooks.cli.status import INTERRUPTED
from tokentrim_hooks.console import printable, say
from tokentrim_hooks.errors import AlreadyPatchedError, TokenTrimError, TokenTrimWarning, UnsupportedModelError
from tokentrim_hooks.handle.handle import PatchHandle
from tokentrim_hooks.plugins import make_observer, usable_adapters
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.token_trim import DriftPolicy
from tokentrim_hooks.report.files import below
from tokentrim_hooks.report.observers import JsonLines, Observer, ProgressLine
from tokentrim_hooks.report.thumbnails import Thumbnails, clear
from tokentrim_hooks.rollout.shared import Probe

ADVICE = "Call tokentrim_hooks.patch on the right object in the script, or write an adapter for it."


class Building(threading.local):
    """What a thread is constructing: how deep constructors are nested, and the objects that are complete."""

    def __init__(self) -> None:
        self.depth = 0
        self.made: list[Any] = []

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """One constructor more for its duration; where the outermost one fails, nothing was made."""
        self.depth += 1
        try:
            yield
        except BaseException:
            self.made = self.made if self.depth > 1 else []
            raise
        finally:
            self.depth -= 1

    def ended(self, instance: Any) -> list[Any]:
        """A constructor of ``instance`` has returned; if it was the outermost: all that was made, that one first."""
        self.made = [instance, *(one for one in self.made if one is not instance)]
        if self.depth:
            return []
        made, self.made = self.made, []
        return made


@dataclass
class Run:
    """One run of a script: its settings, and the handles of all models that were patched in it."""

    folder: Path
    policies: Sequence[Policy] = field(default_factory=lambda: [DriftPolicy()])
    probe: Probe = "first-step"
    quiet: bool = False
    observers: Sequence[str] = ()
    thumbnails: bool = False
    handles: list[PatchHandle] = field(default_factory=list)
    logs: list[JsonLines] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)
    _building: Building = field(default_factory=Building)
    _active: bool = True

    def watch(self, constructors: Sequence[str]) -> None:
        """Wrap the named classes (``module:Class``) when, and only if, their modules are imported."""
        for place in constructors:
            module, _, name = place.partition(":")
            wrapt.register_post_import_hook(functools.partial(self._wrap_class, name), module)

    def over(self, target: Target) -> int:
        """Run a script with every model patched as it is constructed; returns its status. The log is complete then."""
        self.watch(constructors())
        try:
            return target.run()
        finally:
            self.stop()

    def stop(self) -> None:
        """Patch nothing more, take all patches off; the logs are complete."""
        self._active = False
        for handle in self.handles:
            handle.unpatch()

    def _wrap_class(self, name: str, module: Any) -> None:
        cls = getattr(module, name, None)
        if self._active and isinstance(cls, type):
            wrapt.wrap_function_wrapper(cls, "__init__", self._init)
            self._wrap_heirs(cls)

    def _wrap_heirs(self, cls: Any) -> None:
        """Classes that the script derives: their constructors are the outermost ones."""
        own = vars(cls).get("__init_subclass__")

        def told(heir: Any, /, **options: Any) -> None:
            (own.__get__(None, heir) if own else super(cls, heir).__init_subclass__)(**options)
            if self._active and "__init__" in vars(heir):
                wrapt.wrap_function_wrapper(heir, "__init__", self._init)

        cls.__init_subclass__ = classmethod(told)

    def _init(self, wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> None:
        """Patch when the outermost constructor returns: before that a subclass's object is half built, and a pipeline
        may hold another only to take it apart.
        """
        with self._building.deeper():
            wrapped(*args, **kwargs)
        made = self._building.ended(instance)
        if self._active:
            self._patch_all(made)

    def _patch_all(self, made: Sequence[Any]) -> None:
        """The outermost object comes first, and has what it shares with the others."""
        refused = {id(one): words for one in made if (words := self._patch(one))}
        for one in made if len(refused) == len(made) else ():
            self._refused(one, refused[id(one)])

    def _patch(self, instance: Any) -> str:
        """Patch it, if it is not patched already; why no adapter takes it, else nothing."""
        number = len(self.handles) + 1
        try:
            folder = self.folder if number == 1 else below(self.folder, f"model-{number}")
            log = JsonLines(folder, per_rank=False)
            watching = [log, *self._observers(folder)]
            handle = patch(instance, self.policies, probe=self.probe, on_error="warn", observers=watching)
        except AlreadyPatchedError:
            self._leave(number)
        except UnsupportedModelError as refusal:
            self._leave(number)
            return str(refusal)
        except TokenTrimError as failure:
            self.refusals.append(str(failure))
            warnings.warn(f"not patched: {failure}", TokenTrimWarning, stacklevel=3)
        else:
            self.handles.append(handle)
            self.logs.append(log)
            say(f"tokentrim run: {type(instance).__qualname__} is patched, by the adapter {handle.adapter.name}")
            self._clear_pictures(folder)
        return ""

    def _leave(self, number: int) -> None:
        """The folder that a further model would have had is not left empty."""
        if number > 1:
            with suppress(OSError):
                (self.folder / f"model-{number}").rmdir()

    def _refused(self, instance: Any, words: str) -> None:
        """Say at once that a known class is not what an adapter knows: the script may go on for an hour."""
        name = type(instance).__qualname__
        # Every adapter's reason would fill a screen: those count that asked to look at this class.
        reasons = [f"{found.adapter}: {found.reason}" for found in _asked(instance)]
        refusal = f"{name} is left unpatched. {'; '.join(reasons) or words.splitlines()[0]}"
        self.refusals.append(refusal)
        print(printable(f"tokentrim run: {refusal}\n{ADVICE}"), file=sys.stderr, flush=True)

    def why_none(self, status: int) -> str:
        """Why no model was patched, as what follows a colon, and what to do; ``status`` is the script's."""
        if self.refusals:
            told = list(dict.fromkeys(self.refusals))
            reason = told[0] if len(told) == 1 else f"{len(told)} objects were refused, see above."
            return reason if "\n" in reason else f"{reason}\n{ADVICE}"
        if status == INTERRUPTED:
            return "the script was stopped before it made one.\nRun it again, and let it come that far."
        if status:
            words = f"the script failed with status {status} before it made one"
            return f"{words}.\nSee what it says above; its own arguments stand behind its name."
        return (
            "the script constructed no class that an adapter names.\n"
            "See `tokentrim adapters`, try `tokentrim detect` on your model, or call tokentrim_hooks.patch in it."
        )

    def _clear_pictures(self, folder: Path) -> None:
        try:
            clear(folder)
        except TokenTrimError as failure:
            warnings.warn(str(failure), TokenTrimWarning, stacklevel=4)

    def _observers(self, folder: Path) -> list[Observer]:
        """The progress line, the pictures, those asked for by name; one that cannot be made is left out."""
        watching: list[Observer] = [] if self.quiet else [ProgressLine()]
        if self.thumbnails and "thumbnails" not in self.observers:
            watching.append(Thumbnails(folder))
        for name in self.observers:
            try:
                watching.append(make_observer(name, folder))
            except TokenTrimError as failure:
                warnings.warn(f"observer {name!r} is left out: {failure}", TokenTrimWarning, stacklevel=4)
        return watching


def _asked(instance: Any) -> list[Detection]:
    """What the adapters say that have named the class of an object."""
    classes = {kind.__qualname__ for kind in type(instance).__mro__}
    names = {i.name for i in usable_adapters() if any(c.partition(":")[2] in classes for c in i.loaded.constructors)}
    return [found for found in detect(instance) if found.adapter in names and not found.matches]


def constructors() -> list[str]:
    """All class names (``module:Class``) that enabled adapters ask to look at."""
    return sorted({place for info in usable_adapters() for place in info.loaded.constructors})
