"""docs/measures.md: what each measure makes of known drift in five strengths, computed and never written by hand.

``python tools/measures_page.py`` prints the tables; with ``--write`` it puts them into the page. A test holds the page
to what is computed, and the measures to what is said here of them.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from places import filled
from torch import Tensor

from tokentrim_hooks.console import markdown_table
from tokentrim_hooks.metrics import metrics
from tokentrim_hooks.metrics.frames import as_frames
from tokentrim_hooks.metrics.trends import start_end
from tokentrim_hooks.reference.injection import INJECTIONS, STRENGTHS
from tokentrim_hooks.reference.quality import METRICS, MORE, window
from tokentrim_hooks.reference.scenes import Scene, scenes

PAGE = Path(__file__).parents[1] / "docs" / "measures.md"
SEED, COUNT, FRAMES = 1, 8, 12
LITTLE = 0.25
"""Drift that a measure is not meant for moves it by less than this share of what the drift it is meant for does."""

PICTURE = ("fading", "burning", "brightening", "turning hues", "blur", "noise", "flicker")
SPRITES = ("freezing", "melting", "displacing", "removing")

MEANT: Mapping[str, Sequence[str]] = {
    "colour histogram error": PICTURE,
    "saturation error": ("fading", "burning"),
    "sprites alive (identity)": ("removing",),
    "error to ground truth": (*PICTURE, *SPRITES),
    "motion error": ("freezing", "flicker"),
    "motion / true motion": ("freezing", "flicker"),
    "hue error (degrees)": ("turning hues",),
    "hue histogram error": ("turning hues",),
    "contrast error": ("fading", "burning"),
    "contrast / true contrast": ("fading", "burning"),
    "detail error": ("blur", "noise"),
    "background error": PICTURE,
    "error in the still part": PICTURE,
    "flicker in the still part": ("flicker",),
    "error in the moving part": ("melting", "removing"),
    "sprite area error": ("melting", "removing"),
    "sprite shape error": ("melting", "removing"),
    "sprite place error (pixels)": ("displacing", "removing"),
    "sprite speed error": ("freezing", "removing"),
}
"""The drift that each measure is meant for: it moves with every step of it."""
ALSO: Mapping[str, Sequence[str]] = {
    "sprites alive (identity)": ("melting",),
    "saturation error": ("noise",),
    "motion error": ("removing",),
    "hue error (degrees)": ("blur", "noise", "freezing"),
    "hue histogram error": ("blur", "noise"),
    "contrast error": ("blur", "noise"),
    "contrast / true contrast": ("blur", "noise"),
    "detail error": ("removing",),
    "background error": ("freezing",),
    "error in the still part": SPRITES,
    "error in the moving part": (*PICTURE, *SPRITES),
    "sprite place error (pixels)": ("freezing",),
}
"""What else may move a measure by more than LITTLE, on soft or hard scenes; the page says why."""

MEANT_REAL: Mapping[str, Sequence[str]] = {
    "luma_drift": ("brightening",),
    "saturation_drift": ("fading", "burning"),
    "contrast_drift": ("fading", "burning"),
    "colourfulness_drift": ("fading", "burning"),
    "sharpness_drift": ("blur", "noise"),
    "colour_shift": ("brightening", "turning hues"),
    "flicker": ("flicker",),
    "motion": ("freezing",),
}
"""The same for ``tokentrim metrics``, which knows no truth: the drift is in the second half of the video."""


@dataclass(frozen=True)
class Response:
    """What one measure makes of one injection: means over the scenes at strength 0, then at ``STRENGTHS``."""

    means: Sequence[float]

    @property
    def size(self) -> float:
        """How far the strongest injection moves it."""
        return abs(self.means[-1] - self.means[0])

    @property
    def monotone(self) -> bool:
        """Whether each step moves it further in one direction."""
        steps = [b - a for a, b in zip(self.means, self.means[1:], strict=False)]
        return all(step > 0 for step in steps) or all(step < 0 for step in steps)


Responses = Mapping[tuple[str, str], Response]
"""By the names of measure and injection."""
Inject = Callable[[Scene, float], Tensor]


@functools.cache
def responses() -> Responses:
    """What the measures of :mod:`tokentrim_hooks.reference.quality` make of every injection."""
    scene = scenes(SEED, COUNT, FRAMES)

    def measured(video: Tensor) -> dict[str, float]:
        return {m.name: m.measure(video, scene).mean().item() for m in (*METRICS, *MORE)}

    return _responses(measured, scene.video, lambda inject, strength: inject(scene, strength))


@functools.cache
def real_responses() -> Responses:
    """What ``tokentrim metrics`` makes of videos of which the second half is spoilt."""
    scene = scenes(SEED, COUNT // 2, 2 * FRAMES)
    late = window(scene, slice(FRAMES, None))

    def injected(inject: Inject, strength: float) -> Tensor:
        return torch.cat([scene.video[:, :FRAMES], inject(late, strength)], dim=1)

    return _responses(_real, scene.video, injected)


def _responses(
    measured: Callable[[Tensor], Mapping[str, float]], truth: Tensor, injected: Callable[[Inject, float], Tensor]
) -> Responses:
    start = measured(truth)
    means = {(name, injection.name): [value] for name, value in start.items() for injection in INJECTIONS}
    for injection in INJECTIONS:
        for strength in STRENGTHS:
            for name, value in measured(injected(injection.inject, strength)).items():
                means[name, injection.name].append(value)
    return {key: Response(values) for key, values in means.items()}


def _real(video: Tensor) -> dict[str, float]:
    """Means over the videos ``[B, F, 3, H, W]`` of the figures that ``MEANT_REAL`` names."""
    found = [_figures(frames * 0.5 + 0.5) for frames in video]
    return {name: sum(figures[name] for figures in found) / len(found) for name in MEANT_REAL}


def _figures(frames: Tensor) -> dict[str, float]:
    """The figures of ``tokentrim metrics``, without those that take long and are not needed here."""
    array = as_frames(frames)
    drift = {f"{name}_drift": start_end(series(array)).signed for name, series in metrics.SERIES.items()}
    motion = float(metrics.motion(array).mean())
    return {**drift, "colour_shift": metrics.colour_shift(array), "flicker": metrics.flicker(array), "motion": motion}


# ---------------------------------------------------------------------------------------------- the page

def share(found: Responses, meant: Mapping[str, Sequence[str]], measure_name: str, injection: str) -> float:
    """Size of a response over the largest one to drift that the measure is meant for."""
    own = max(found[measure_name, name].size for name in meant[measure_name])
    return found[measure_name, injection].size / own


def matrix(found: Responses, meant: Mapping[str, Sequence[str]]) -> str:
    """Shares in percent, measures down, injections across; bold where meant for it and moved on by each step of it."""
    lines = []
    for name, own in meant.items():
        bold = [i.name in own and found[name, i.name].monotone for i in INJECTIONS]
        cells = [f"{100 * share(found, meant, name, i.name):.0f}" for i in INJECTIONS]
        lines.append([name, *(f"**{text}**" if is_bold else text for text, is_bold in zip(cells, bold, strict=True))])
    return markdown_table(["", *(i.name for i in INJECTIONS)], lines)


def steps(found: Responses, meant: Mapping[str, Sequence[str]]) -> str:
    """Values at all strengths of what each measure is meant for."""
    lines = [
        [name, injection, *(f"{value:.3f}" for value in found[name, injection].means)]
        for name, own in meant.items()
        for injection in own
    ]
    return markdown_table(["measure", "drift", "none", *(f"{strength:g}" for strength in STRENGTHS)], lines)


def blocks() -> dict[str, str]:
    """All that is generated, by the name of its place in the page."""
    planted = markdown_table(["drift", "at full strength"], [[i.name, i.what] for i in INJECTIONS])
    about = [[m.name, m.better or "-", _first_line(m.measure)] for m in (*METRICS, *MORE)]
    return {
        "drift": planted,
        "measures": markdown_table(["measure", "better", "what it is"], about),
        "matrix": matrix(responses(), MEANT),
        "steps": steps(responses(), MEANT),
        "real-matrix": matrix(real_responses(), MEANT_REAL),
        "real-steps": steps(real_responses(), MEANT_REAL),
    }


def page() -> str:
    """The page as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    for block, content in blocks().items():
        text = filled(text, block, f"\n{content}\n")
    return text


def _first_line(function: Callable[..., object]) -> str:
    return re.sub(r":func:(`\w+`)", r"\1", (inspect.getdoc(function) or "").split("\n")[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or with ``--write`` put them into docs/measures.md."""
    parser = argparse.ArgumentParser(prog="python tools/measures_page.py", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/measures.md of this checkout")
    options = parser.parse_args(arguments)
    # Videos this small are measured faster by one thread, by far on a busy machine.
    torch.set_num_threads(1)
    if options.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print("\n\n".join(blocks().values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
