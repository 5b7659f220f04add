"""docs/pictures/policy-*.png: what each policy does, taken from runs of the reference model and never drawn by hand.

``python tools/policy_pictures.py`` writes all of them (two minutes on one core), with names only those. What a picture
is said to show is checked before it is written: a run in which it does not happen is an AssertionError.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import tokentrim_hooks as tokentrim
from tokentrim_hooks.experiments.compare.trials import ReferenceMaker
from tokentrim_hooks.policy.statistics import Moments, temporal_variance
from tokentrim_hooks.report.page.charts import border

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
MOST = 60_000
"""Bytes of a picture."""
READ, HIDDEN, OWN, CUT, INK, FIRST = "#9db8de", "#e3e3e6", "#2f5d9e", "#d62839", "#20242c", "#e0a030"
CUE = 0.05


def watched(
    policy: tokentrim.Policy, hook: str, seen: list[Any], note: Callable[..., Any] = lambda *both: both
) -> tokentrim.Policy:
    """The same policy; of what a hook is shown and what it answers, ``note`` is kept."""
    kind = type(policy)

    def noted(self: Any, *shown: Any) -> Any:
        answer = getattr(kind, hook)(self, *shown)
        seen.append(note(*shown, answer))
        return answer

    return type(kind.__name__, (kind,), {hook: noted})(**policy.settings())


def rolled_out(
    policies: Sequence[tokentrim.Policy], seed: int, chunks: int, kind: str = "fading", fault: Any = None
) -> tuple[torch.Tensor, tokentrim.Report | None]:
    """The video ``[F, 3, H, W]`` of one scene, in about [-1, 1], and what was recorded."""
    trial = ReferenceMaker.load(chunks, fault, None, trained=True, device="cpu", kind=kind)([seed])
    torch.manual_seed(seed)
    with torch.no_grad():
        if not policies:
            return trial.run()[0], None
        with tokentrim.patched(trial.model, list(policies)) as handle:
            return trial.run()[0], handle.report


def saved(figure: Figure, name: str) -> Path:
    """Write a figure as a small PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None}, facecolor="white")
    path = FOLDER / f"policy-{name}.png"
    Image.open(buffer).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MOST, f"{path.name} has {path.stat().st_size} bytes"
    return path


def panels(*titles: str, width: float = 7.6, height: float = 2.3, widths: Sequence[float] = ()) -> tuple[Figure, Any]:
    """A figure with a line of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(titles), width_ratios=widths or None, squeeze=False)[0]
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, fontsize=9)
        one.tick_params(labelsize=8)
    return figure, axes


def show(axes: Any, picture: Any, tokens: Sequence[int] = (), columns: int = 8, patch: int = 4) -> None:
    """A frame ``[3, H, W]`` in [-1, 1], or a map ``[h, w]``, with a set of tokens outlined."""
    array = torch.as_tensor(picture).float()
    if array.ndim == 3:
        axes.imshow(((array + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axes.imshow(array.numpy(), cmap="magma", vmin=0, interpolation="nearest")
        patch = 1
    for colour, width in (("black", 3.2), ("#39d0ff", 1.6)):
        for (x0, y0), (x1, y1) in border(list(tokens), columns):
            ends = [[(v + 0.5) * patch - 0.5 for v in pair] for pair in ((x0, x1), (y0, y1))]
            axes.plot(*ends, color=colour, lw=width, solid_capstyle="projecting")
    axes.set_axis_off()


# ------------------------------------------------------------------------------------------------ judge


def drift() -> Path:
    """A fault in the context shows in the next chunk, whose severity leaves the band; what drifts is pruned."""
    seen: list[tuple[Any, ...]] = []
    video, report = rolled_out([watched(tokentrim.DriftPolicy(), "judge", seen)], 2, 12, fault="context")
    assert report is not None
    records = [r for r in report if r.severity is not None]
    hit = next(r for r in records if r.pruned)
    assert hit.chunk == 8 and hit.accepted_severity < hit.threshold < hit.severity
    first = next(chunk for chunk, _, verdict in seen if chunk.index == 8 and verdict.prune.any())
    titles = ("chunk 7", "chunk 8, judged", "its drift", "chunk 8, accepted", "severity")
    figure, axes = panels(*titles, widths=(1, 1, 1, 1, 1.9), height=2.0)
    show(axes[0], video[3 * 8 - 1])
    show(axes[1], first.prediction[0, 1], hit.tokens)
    show(axes[2], first.drift[0].reshape(8, 8), hit.tokens)
    show(axes[3], video[3 * 8 + 1])
    x = [r.chunk for r in records if r.threshold is not None]
    ends = [[getattr(r, name) for r in records if r.threshold is not None] for name in ("mean", "threshold")]
    axes[4].fill_between(x, *ends, color=READ, alpha=0.6, lw=0)
    axes[4].plot([r.chunk for r in records], [r.severity for r in records], color=INK, marker="o", ms=2.5, lw=1)
    axes[4].plot([8, 8], [hit.severity, hit.accepted_severity], color=CUT, ls=":", lw=1)
    axes[4].plot([8], [hit.severity], "o", color=CUT, ms=5)
    axes[4].plot([8], [hit.accepted_severity], "o", mfc="none", mec=CUT, ms=5)
    axes[4].set_xlabel("chunk", fontsize=8)
    axes[4].set_xticks(range(2, 13, 2))
    return saved(figure, "drift")


def adaptive() -> Path:
    """A settled fault: next to nothing differs from the chunk before; what is new to the scene is the fault."""
    policy = tokentrim.AdaptivePolicy()
    for seed in range(64):
        seen: list[tuple[Any, ...]] = []
        video, report = rolled_out([watched(policy, "judge", seen)], seed, 10, fault="settled")
        watch = rolled_out([tokentrim.DriftPolicy()], seed, 10, fault="settled")[1]
        assert report is not None and watch is not None
        hit = next((r for r in report if r.chunk == 10 and r.pruned), None)
        if hit is not None and not any(r.pruned for r in watch if r.chunk == 10):
            break
    chunk = next(chunk for chunk, _, verdict in seen if chunk.index == 10 and verdict.prune.any())
    titles = ("first chunk", "chunk 9, with the fault", "chunk 10, judged", "drift from chunk 9", "new to the scene")
    figure, axes = panels(*titles, height=1.9)
    show(axes[0], video[1])
    show(axes[1], video[3 * 9 + 1])
    show(axes[2], chunk.prediction[0, 1], hit.tokens)
    for place, values in ((3, chunk.drift), (4, policy.novelty(chunk))):
        show(axes[place], values[0].reshape(8, 8), hit.tokens if place == 4 else ())
    return saved(figure, "adaptive")


# ------------------------------------------------------------------------------------------------ hide


def reading_map(axes: Any, rows: Sequence[tuple[str, Sequence[bool], Sequence[bool]]], own: int) -> None:
    """Which frames each call reads: a row per call, a column per frame of the context, then the chunk's own.

    ``rows`` are a name, what is hidden, what is a sink. The first call still has frames that the cache then evicts.
    """
    width = max(len(hidden) for _, hidden, _ in rows)
    for y, (_, hidden, anchors) in enumerate(rows):
        for x, (gone, anchor) in enumerate(zip(hidden, anchors, strict=True)):
            colour = HIDDEN if gone else FIRST if anchor else READ
            axes.add_patch(_cell(x if anchor else x + width - len(hidden), y, colour, gone))
        for x in range(width, width + own):
            axes.add_patch(_cell(x, y, OWN, False))
    axes.set_xlim(-CUE, width + own)
    axes.set_ylim(len(rows), -CUE)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [name for name, _, _ in rows], fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cell(x: int, y: int, colour: str, hatched: bool) -> Any:
    from matplotlib.patches import Rectangle

    look = {"hatch": "////", "edgecolor": "#b5b5bb", "lw": 0} if hatched else {"lw": 0}
    return Rectangle((x + CUE, y + CUE), 1 - 2 * CUE, 1 - 2 * CUE, facecolor=colour, **look)


def _key(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=label) for label, colour in entries]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), fontsize=8, frameon=False)


def commit_window() -> Path:
    """Which frames the calls of a late chunk read: all but the commit read the whole context."""
    seen: list[tuple[Any, ...]] = []
    rolled_out([watched(tokentrim.CommitWindow(frames=6), "hide", seen)], 1, 9, kind="sink")
    late = [(place, view, answer) for place, view, answer in seen if place.index == 9]
    rows = []
    for number, (place, view, answer) in enumerate(late, 1):
        name = "commit" if place.phase == "commit" else f"denoising call {number}"
        rows.append((name, [False] * view.frames if answer is None else answer.tolist(), view.anchors))
    assert [name for name, hidden, _ in rows if any(hidden)] == ["commit"]
    assert rows[-1][1].count(False) == 3, "six frames, three of them the chunk's own"
    figure, axes = panels("frames, oldest first", width=7.6, height=2.0)
    reading_map(axes[0], rows, late[0][0].frames)
    _key(figure, [("sink", FIRST), ("read", READ), ("the chunk's own", OWN), ("hidden from this call", HIDDEN)])
    return saved(figure, "commit-window")


def frame_eviction() -> Path:
    """How much each frame of the context resembles the newest one, chunk by chunk, and which are hidden."""
    policy = tokentrim.FrameEviction()
    seen: list[tuple[Any, ...]] = []
    rolled_out([watched(policy, "hide", seen)], 3, 12)
    _, view, answer = next(entry for entry in seen if entry[0].index == 12 and entry[0].phase == "first")
    cosine = torch.nn.functional.cosine_similarity(view.summaries, view.summaries[:, -1:], dim=-1)[0]
    hidden = answer[0, :, 0].tolist()
    assert hidden == [c < policy.similarity and i < view.frames - 3 for i, c in enumerate(cosine.tolist())]
    assert 0 < sum(hidden) < view.frames
    figure, axes = panels("frames of the context, oldest first: cosine to the newest", height=2.1)
    colours = [CUT if gone else READ for gone in hidden]
    axes[0].bar(range(view.frames), cosine.tolist(), color=colours)
    axes[0].axhline(policy.similarity, color=INK, lw=1, ls="--")
    axes[0].set_ylim(min(0.0, float(cosine.min())), 1)
    axes[0].set_xticks([])
    _key(figure, [("read", READ), (f"hidden: below {policy.similarity}", CUT)])
    return saved(figure, "frame-eviction")


def soft_prune() -> Path:
    """How much of each frame's share of attention a late chunk's calls read."""
    policy = tokentrim.SoftPrune()
    seen: list[tuple[Any, ...]] = []
    rolled_out([watched(policy, "hide", seen)], 1, 9, kind="sink")
    late = [(place, view, answer) for place, view, answer in seen if place.index == 9]
    place, weights = late[-1][0], late[-1][2].tolist()
    others = [weight for weight, anchor in zip(weights, late[-1][1].anchors, strict=True) if not anchor]
    assert others[-policy.keep :] == [1.0] * policy.keep and set(others[: -policy.keep]) == {policy.weight}
    figure, axes = panels("weight of a key, by frame, oldest first", height=2.1)
    colours = [FIRST if anchor else READ for anchor in late[-1][1].anchors] + [OWN] * place.frames
    axes[0].bar(range(len(colours)), [*weights, *[1.0] * place.frames], color=colours)
    axes[0].set_ylim(0, 1.1)
    axes[0].set_xticks([])
    _key(figure, [("sink", FIRST), ("context", READ), ("the chunk's own", OWN)])
    return saved(figure, "soft-prune")


# ------------------------------------------------------------------------------------------------ guide


def flowmo() -> Path:
    """How unevenly the first chunk is predicted to move, from the latents as drawn and as FlowMo moved them."""

    def unevenness(chunk: Any, answer: Any) -> list[float]:
        level = chunk.level()
        both = (chunk.latents, answer) if answer is not None else ()
        with torch.no_grad():
            return [float(temporal_variance((x - chunk.predict(x)) / level)) for x in both]

    pairs = []
    for seed in range(16):
        seen: list[Any] = []
        torch.manual_seed(seed)
        model = ReferenceMaker.load(2, None, None, trained=True, device="cpu", kind="fading")([seed]).model
        with torch.no_grad(), tokentrim.patched(model, watched(tokentrim.FlowMo(), "guide", seen, unevenness)):
            model.inference(torch.randn(1, 3, 3, 32, 32), ["a scene"])
        pairs += [pair for pair in seen if pair]
    falls = sum(after < before for before, after in pairs)
    assert len(pairs) == 16 and falls >= 12, pairs
    changes = [100 * (after / before - 1) for before, after in pairs]
    figure, axes = panels("unevenness of the first chunk's motion as predicted: change by FlowMo, in %", height=2.2)
    axes[0].bar(range(len(changes)), changes, color=[OWN if change < 0 else CUT for change in changes])
    axes[0].axhline(0, color=INK, lw=0.8)
    axes[0].set_xlabel("seed", fontsize=8)
    print(f"flowmo: lower in {falls} of {len(pairs)}, mean {sum(changes) / len(changes):.2f} %")
    return saved(figure, "flowmo")


# ------------------------------------------------------------------------------------------------ correct and settle


def latent_moments() -> Path:
    """Deviation of each channel against the first chunk's, on the burning model, with the policy and without."""
    chunks, arms = 14, {"unpatched": [], "LatentMoments(0.35)": [tokentrim.LatentMoments()]}
    found = {}
    for name, policies in arms.items():
        video = rolled_out(policies, 2, chunks, kind="burning")[0]
        parts = video.reshape(chunks + 1, 3, *video.shape[1:])
        found[name] = parts.std(dim=(1, 3, 4), correction=0) / parts[0].std(dim=(0, 2, 3), correction=0)
    away = {name: float((ratio[-4:] - 1).abs().mean()) for name, ratio in found.items()}
    assert away["LatentMoments(0.35)"] < away["unpatched"], away
    figure, axes = panels(*found, height=2.2)
    for one, ratio in zip(axes, found.values(), strict=True):
        for channel, colour in enumerate(("#c0392b", "#2e8b57", "#2f5d9e")):
            one.plot(ratio[:, channel], color=colour, lw=1.3, label=f"channel {channel}")
        one.axhline(1, color=INK, lw=0.8, ls="--")
        one.set_ylim(0, 1.05 * max(float(r.max()) for r in found.values()))
        one.set_xlabel("chunk", fontsize=8)
    axes[0].set_ylabel("deviation, first chunk = 1", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return saved(figure, "latent-moments")


def late_mean() -> Path:
    """The last three predictions of a chunk, and their mean, which the sampler goes on with."""
    seen: list[tuple[Any, ...]] = []
    rolled_out([watched(tokentrim.LateMean(last=3), "correct", seen)], 2, 6)
    shown, answer = next((shown, answer) for shown, answer in reversed(seen) if answer is not None)
    late = [*shown.earlier, shown.prediction]
    assert len(late) == 3 and torch.allclose(answer, torch.stack(late).mean(0), atol=1e-6)
    figure, axes = panels("third last", "second last", "last", "their mean", "last, less the mean", height=1.9)
    for one, picture in zip(axes, [*late, answer], strict=False):
        show(one, picture[0, 1])
    change = (late[-1] - answer)[0, 1].abs().mean(0)
    image = axes[4].imshow(change.numpy(), cmap="magma", interpolation="nearest")
    axes[4].set_axis_off()
    figure.colorbar(image, ax=axes[4], shrink=0.7).ax.tick_params(labelsize=7)
    return saved(figure, "late-mean")


def row_moments() -> Path:
    """How far the deviation of V is from the first chunk's, as committed and as settled."""
    def distances(place: Any, rows: Any, answer: Any) -> Any:
        """Measured at once: the rows are the cache's own, and the answer is written over them."""
        parts = [] if answer is None else [rows.values, answer.values]
        first = rows.first_values
        return place.index, [float((Moments.of(v, (1,)).std / first.std - 1).abs().mean()) for v in parts]

    seen: list[Any] = []
    rolled_out([watched(tokentrim.RowMoments(), "settle", seen, distances)], 2, 14, kind="burning")
    x = sorted({chunk for chunk, found in seen if found})
    layers = [[found for chunk, found in seen if found and chunk == number] for number in x]
    means = np.array(layers).mean(axis=1).T.tolist()
    assert all(b == 0 or abs(a / b - 0.65) < 0.02 for b, a in zip(*means, strict=True)), "0.35 of the way"
    figure, axes = panels("deviation of V per head and channel: distance to the first chunk's", height=2.2)
    axes[0].plot(x, means[0], color=CUT, marker="o", ms=3, lw=1, label="as the commit wrote it")
    axes[0].plot(x, means[1], color=OWN, marker="o", ms=3, lw=1, label="as RowMoments(0.35) left it")
    axes[0].vlines(x, means[1], means[0], color=HIDDEN, zorder=0)
    axes[0].set_ylim(0)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes[0].set_xlabel("chunk", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    return saved(figure, "row-moments")


PICTURES: dict[str, Callable[[], Path]] = {
    "drift": drift,
    "adaptive": adaptive,
    "commit-window": commit_window,
    "frame-eviction": frame_eviction,
    "soft-prune": soft_prune,
    "flowmo": flowmo,
    "latent-moments": latent_moments,
    "late-mean": late_mean,
    "row-moments": row_moments,
}
"""By the name of the policy as plugins have it."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="all by default")
    torch.set_num_threads(1)
    for name in parser.parse_args().names or PICTURES:
        path = PICTURES[name]()
        print(f"{path.name}: {path.stat().st_size} bytes")
