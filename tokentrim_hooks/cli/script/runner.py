"""``tokentrim run``: run somebody's unmodified script with every known model patched as it is constructed.

Adapters name classes (``constructors``, as ``module:Class``). Nothing is imported early: a post-import hook wraps the
class's ``__init__`` when the script itself imports the module. A constructed object is patched only if an adapter
recognises its structure; the names merely say where to look.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wrapt

from tokentrim_hooks.api import Detection, detect, patch
from tokentrim_hooks.cli.script.target import Target
from tokentrim_hooks.console import printable
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
    _constructing: list[int] = field(default_factory=list)
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
        if self._active and isinstance(getattr(module, name, None), type):
            wrapt.wrap_function_wrapper(getattr(module, name), "__init__", self._init)

    def _init(self, wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> None:
        """Patch an object when its outermost ``__init__`` returns: a subclass calls its base's half built."""
        self._constructing.append(id(instance))
        try:
            wrapped(*args, **kwargs)
        finally:
            self._constructing.pop()
        if self._active and id(instance) not in self._constructing:
            self._patch(instance)

    def _patch(self, instance: Any) -> None:
        number = len(self.handles) + 1
        try:
            folder = self.folder if number == 1 else below(self.folder, f"model-{number}")
            log = JsonLines(folder, per_rank=False)
            watching = [log, *self._observers(folder)]
            handle = patch(instance, self.policies, probe=self.probe, on_error="warn", observers=watching)
        except AlreadyPatchedError:
            return
        except UnsupportedModelError as refusal:
            self._refused(instance, str(refusal))
        except TokenTrimError as failure:
            self.refusals.append(str(failure))
            warnings.warn(f"not patched: {failure}", TokenTrimWarning, stacklevel=3)
        else:
            self.handles.append(handle)
            self.logs.append(log)
            self._clear_pictures(folder)

    def _refused(self, instance: Any, words: str) -> None:
        """Say at once that a known class is not what an adapter knows: the script may go on for an hour."""
        name = type(instance).__qualname__
        # Every adapter's reason would fill a screen: those count that asked to look at this class.
        reasons = [f"{found.adapter}: {found.reason}" for found in _asked(instance)]
        refusal = f"{name} is left unpatched. {'; '.join(reasons) or words}"
        self.refusals.append(refusal)
        print(printable(f"tokentrim run: {refusal}\n{ADVICE}"), file=sys.stderr, flush=True)

    def why_none(self) -> str:
        """Why no model was patched, and what to do."""
        if self.refusals:
            return "\n".join([*dict.fromkeys(self.refusals), ADVICE])
        return (
            "The script constructed no class that an adapter names (`tokentrim adapters`).\n"
            "See what one makes of your model with `tokentrim detect`, or call tokentrim_hooks.patch in the script."
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
