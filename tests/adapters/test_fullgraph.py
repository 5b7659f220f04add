"""``fullgraph=True`` after the patch: observed within one graph, pruned eagerly with a word on it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from interruptions import Events, raising
from targets import TARGETS

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.call_scope import BUSY
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
WITH_ONE_GRAPH = {target.name: target for target in TARGETS if target.name in ("skyreels-v2", "framepack", "helios")}
graphs: list[torch.fx.GraphModule] = []


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    graphs.clear()
    yield
    torch._dynamo.reset()


def backend(graph, _inputs):
    graphs.append(graph)
    return graph.forward


def in_place(target, pipeline):
    target.denoiser(pipeline).compile(fullgraph=True, backend=backend)


def an_object(target, pipeline):
    setattr(pipeline, target.part, torch.compile(target.denoiser(pipeline), fullgraph=True, backend=backend))


def blocks(target, pipeline):
    target.denoiser(pipeline).compile_repeated_blocks(fullgraph=True, backend=backend)


def objects_inside(target, pipeline):
    inside = target.denoiser(pipeline).blocks
    for number, block in enumerate(inside):
        inside[number] = torch.compile(block, fullgraph=True, backend=backend)


CASES = [
    ("skyreels-v2", in_place),
    ("skyreels-v2", an_object),
    ("skyreels-v2", blocks),
    ("skyreels-v2", objects_inside),
    ("framepack", in_place),
    ("helios", blocks),
]


def way(name, compiled, *more):
    words = "-".join([*more, name, compiled.__name__])
    return pytest.param(name, compiled, *more, id=words, marks=pytest.mark.checks(name, "compiled"))


each_way = pytest.mark.parametrize(("name", "compiled"), [way(name, compiled) for name, compiled in CASES])


def patched_run(target, policy, compiled=None, **options):
    pipeline = target.make()
    with tokentrim.patched(pipeline, policy, **options) as handle:
        if compiled is not None:
            compiled(target, pipeline)
        return target.run(pipeline), handle.report


@each_way
def test_observing_is_within_the_graphs(name, compiled):
    target = WITH_ONE_GRAPH[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", tokentrim.TokenTrimWarning)
        video, report = patched_run(target, tokentrim.ObservePolicy(), compiled)
    assert graphs, "it was compiled"
    torch.testing.assert_close(video, target.run(target.make()), rtol=0, atol=1e-5)
    _, eager = patched_run(target, tokentrim.ObservePolicy())
    assert len(report) == len(eager) and report.records[-1].severity == pytest.approx(eager.records[-1].severity)


@pytest.mark.parametrize(
    ("name", "compiled", "on_error"),
    [
        *(way(name, compiled, "raise") for name, compiled in CASES),
        *(way(name, compiled, "warn") for name, compiled in CASES if name != "framepack"),  # its graphs take longest
    ],
)
def test_pruning_is_exact_and_says_what_to_do(name, compiled, on_error):
    target = WITH_ONE_GRAPH[name]
    expected, _ = patched_run(target, POLICY)
    with pytest.warns(tokentrim.TokenTrimWarning) as said:
        video, report = patched_run(target, POLICY, compiled, on_error=on_error)
    words = [str(w.message) for w in said if issubclass(w.category, tokentrim.TokenTrimWarning)]
    assert len(words) == 1 and re.search(r"fullgraph=True.*\n.*compile it without fullgraph=True", words[0]), words
    assert report.triggers == 1 and graphs
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "compiled"), [way(*case) for case in CASES if case[0] != "framepack"])  # as above
def test_compiled_code_is_as_it_was_after_unpatch(name, compiled):
    target = WITH_ONE_GRAPH[name]
    pipeline = target.make()
    denoiser = target.denoiser(pipeline)
    handle = tokentrim.patch(pipeline, POLICY)
    compiled(target, pipeline)
    with pytest.warns(tokentrim.TokenTrimWarning):
        target.run(pipeline)
    handle.unpatch()
    for module in denoiser.modules():
        ours = [key for key, value in vars(module).items() if "tokentrim" in type(value).__module__]
        assert not ours and "compile" not in vars(module) and "__call__" not in vars(module)
    before = len(graphs)
    torch._dynamo.reset()
    torch.testing.assert_close(target.run(pipeline), target.run(target.make()), rtol=0, atol=1e-5)
    assert len(graphs) > before, "still compiled"


@pytest.mark.parametrize("compiled", [in_place, an_object])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_whatever_ends_a_compiled_call(compiled, kind, monkeypatch):
    """It comes from within the graph; the next run is as the first would have been."""
    target = WITH_ONE_GRAPH["skyreels-v2"]
    expected, report = patched_run(target, tokentrim.ObservePolicy())
    calls = []

    def ending(graph, _inputs):
        def run(*args):
            calls.append(kind)
            if len(calls) == 2:
                raise kind
            return graph.forward(*args)

        return run

    monkeypatch.setitem(globals(), "backend", ending)
    pipeline = target.make()
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()) as handle:
        compiled(target, pipeline)
        with pytest.raises(kind):
            target.run(pipeline)
        handle.reset()
        before = len(handle.report)
        torch.testing.assert_close(target.run(pipeline), expected, rtol=0, atol=1e-5)
        assert len(handle.report) - before == len(report)


def interrupted_amid_a_prune(target, pipeline):
    """Ctrl-C in the last call of a video, at which something is dead."""
    target.run(pipeline)  # with the call that shows that a call can be made twice, which later videos do without
    with Events(target.denoiser(pipeline)) as run:
        target.run(pipeline)
    place = Events(target.denoiser(pipeline), run.seen[-1].number, raising(KeyboardInterrupt))
    with place, pytest.raises(KeyboardInterrupt):
        target.run(pipeline)
    assert BUSY.maybe, "nobody has looked yet"


def test_ctrl_c_in_compiled_code_amid_a_prune_is_seen_at_once():
    """Nobody looks: what is compiled of others is not compiled again."""
    target = WITH_ONE_GRAPH["skyreels-v2"]
    pipeline, other = target.make(), target.make()
    blocks(target, other)
    with tokentrim.patched(pipeline, POLICY):
        plain = target.run(other)
        target.run(pipeline)
        with Events(target.denoiser(pipeline)) as run:
            target.run(pipeline)
        last = max(event.number for event in run.seen if event.where == "in an attention kernel")
        with Events(target.denoiser(pipeline), last, raising(KeyboardInterrupt)), pytest.raises(KeyboardInterrupt):
            target.run(pipeline)
        assert not BUSY.maybe
        before = len(graphs)
        assert torch.equal(target.run(other), plain) and len(graphs) == before


def test_whoever_asks_after_ctrl_c_hears_that_nothing_is_busy():
    target = WITH_ONE_GRAPH["skyreels-v2"]
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY):
        interrupted_amid_a_prune(target, pipeline)
        assert not BUSY.now and not BUSY.maybe


def test_ctrl_c_amid_a_prune_leaves_others_in_one_graph():
    """Another pipeline of the same code, never patched, is called next."""
    target = WITH_ONE_GRAPH["skyreels-v2"]
    pipeline, other = target.make(), target.make()
    blocks(target, other)
    with tokentrim.patched(pipeline, POLICY):
        plain = target.run(other)
        interrupted_amid_a_prune(target, pipeline)
        assert torch.equal(target.run(other), plain)
        assert not BUSY.maybe


@pytest.mark.parametrize("look", [lambda handle: handle.report, lambda handle: handle.reset()])
def test_whoever_reads_the_handle_sees_that_a_call_has_ended(look):
    target = WITH_ONE_GRAPH["skyreels-v2"]
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        interrupted_amid_a_prune(target, pipeline)
        look(handle)
        assert not BUSY.maybe


def test_without_compiling_again_hooks_do_our_part():
    """As before the denoiser was compiled: the entry goes with what it was put around."""
    target = WITH_ONE_GRAPH["framepack"]
    expected, _ = patched_run(target, POLICY)
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        in_place(target, pipeline)
        target.denoiser(pipeline)._compiled_call_impl = None
        assert torch.equal(target.run(pipeline), expected) and handle.report.triggers == 1 and not graphs


class Redirected:
    """Stands in for a denoiser; calls go through a function that encloses it."""

    def __init__(self, denoiser, function):
        self._denoiser, self._function = denoiser, function

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def __call__(self, **kwargs):
        return self._function(**kwargs)


def test_what_encloses_the_denoiser_is_told_what_to_do():
    target = WITH_ONE_GRAPH["framepack"]
    pipeline = target.make()
    with tokentrim.patched(pipeline, POLICY):
        denoiser = target.denoiser(pipeline)
        whole = torch.compile(lambda **kwargs: denoiser(**kwargs), fullgraph=True, backend=backend)
        pipeline.transformer = Redirected(denoiser, whole)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the denoiser itself, or its blocks"):
            target.run(pipeline)
        pipeline.transformer = denoiser
        target.run(pipeline)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_compiled_by_themselves(copied):
    target = WITH_ONE_GRAPH["skyreels-v2"]
    pipeline, other = target.make(), target.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        twin = copied(target.denoiser(pipeline))
        setattr(other, target.part, twin)
        in_place(target, other)
        assert "_compiled_call_impl" not in vars(target.denoiser(pipeline))
        torch.testing.assert_close(target.run(other), target.run(target.make()), rtol=0, atol=1e-5)
        assert graphs and not len(handle.report)
        other.transformer = torch.compile(twin, backend=backend)
        assert other.transformer._orig_mod is twin
