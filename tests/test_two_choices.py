"""An entry with two choices, for eager calls and for CUDA graphs: which holds where, and what says so. CPU only."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import tritonconv
from tritonconv import Problem, dispatch, guards, operators
from tritonconv.autotune import choose, sources, store
from tritonconv.autotune.ceilings import nominal
from tritonconv.autotune.key import Key, device_name
from tritonconv.autotune.store import Eager, Entry, Table
from tritonconv.autotune.tuning.candidates import candidates, joined, stored
from tritonconv.autotune.tuning.session import WHOLE
from tritonconv.errors import StoreWarning
from tritonconv.explain import explain_problem
from tritonconv.kernels.registry import RENAMED, variant
from tritonconv.problem import PASSES
from tritonconv.switches import graphs

CPU = torch.device("cpu")
X, WEIGHT = torch.randn(1, 64, 8, 8, 8), torch.randn(64, 32, 2, 2, 2)
PROBLEM = Problem(1, 64, 32, (8, 8, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (16, 16, 16))
GRAPH, EAGER = "forward_torch_phases", "forward_torch_onednn"


def eager(name: str = EAGER, **changes) -> Eager:
    return replace(Eager(name, {}, 0.012, 0.02, sources.revision(variant(name))), **changes)


def entry(name: str = GRAPH, **changes) -> Entry:
    made = Entry(name, {}, 0.01, 0.03, sources.revision(variant(name)), str(PROBLEM), "forward", "2026-01-01T00:00:00",
                 host_ms=0.045, eager=eager())  # fmt: skip
    return replace(made, **changes)


def tuned(made: Entry, pass_name: str = "forward") -> None:
    store.merge(Table(device_name(CPU), {str(Key.of(PROBLEM, pass_name)): made}))
    dispatch.forget()


@pytest.fixture(autouse=True)
def _own(own_store):
    yield
    tritonconv.pin_choices(None)


def ran() -> str:
    return dispatch.plan_for(X, WEIGHT, None, (2, 0, 0, 1, 1)).choice("forward").variant.name


# ------------------------------------------------------------------ the table


def test_both_choices_come_back_and_one_alone_takes_no_room():
    tuned(entry())
    (found,) = store.own(device_name(CPU)).entries.values()
    assert found == entry() and Entry.from_json(found.to_json()) == found
    alone = entry(host_ms=None, eager=None)
    assert not {"host_ms", "eager"} & set(alone.to_json())
    assert alone.choices(graphs=True) == alone.choices(graphs=False) == (alone,)


def test_a_second_choice_that_was_timed_by_itself_says_so():
    tuned(entry(timed="forward_backward", eager=eager(torch_ms=0.04, timed="forward")))
    (found,) = store.own(device_name(CPU)).entries.values()
    own, quick = found.choices(graphs=True)
    assert (own.timed, own.torch_ms, quick.timed, quick.torch_ms) == ("forward_backward", 0.03, "forward", 0.04)
    assert "forward of" in choose.choose(PROBLEM, CPU, "forward").reason
    assert not {"torch_ms", "timed"} & set(entry().to_json()["eager"])


@pytest.mark.parametrize(
    "change",
    [
        {"ms": 0},
        {"host_ms": None},
        {"host_ms": float("inf")},
        {"config": {"A": 1.5}},
        {"variant": 3},
        {"more": 1},
        {"torch_ms": 0},
        {"timed": 3},
    ],
)
def test_a_damaged_second_choice_is_a_damaged_entry(change):
    data = entry().to_json()
    data["eager"] = vars(eager()) | change
    with pytest.raises(ValueError, match=r"entry|argument"):
        Entry.from_json(data)
    with pytest.raises(ValueError, match="entry"):
        Entry.from_json({**entry().to_json(), "host_ms": "long"})


def test_a_renamed_variant_is_renamed_in_both(monkeypatch):
    monkeypatch.setitem(RENAMED, EAGER, ("forward_torch_shuffle", {"COPY": 1}))
    tuned(entry())
    (found,) = store.own(device_name(CPU)).entries.values()
    assert (found.variant, found.eager.variant, found.eager.config) == (GRAPH, "forward_torch_shuffle", {"COPY": 1})


# ------------------------------------------------------------------ the choice


def test_each_call_has_the_choice_of_its_kind(launches):
    tuned(entry())
    for _ in range(2):
        assert ran() == EAGER
        with tritonconv.for_graphs():
            assert ran() == GRAPH
            with tritonconv.use("forward_torch_shuffle"):
                assert ran() == "forward_torch_shuffle"
            with tritonconv.for_graphs():
                pass
            assert ran() == GRAPH
    with pytest.raises(KeyError), tritonconv.for_graphs():
        raise KeyError
    assert ran() == EAGER and graphs.get() is False
    y = tritonconv.conv_transpose3d(X, WEIGHT, stride=2)
    with tritonconv.for_graphs():
        torch.testing.assert_close(tritonconv.conv_transpose3d(X, WEIGHT, stride=2), y)
    assert launches == [EAGER, GRAPH]


def test_a_backward_keeps_the_choices_of_its_forward(launches):
    """It runs after the block, or in a thread of autograd."""
    name = "backward_weight"
    tuned(entry(f"{name}_torch_phases", eager=eager(f"{name}_torch_conv")), name)
    weight = WEIGHT.clone().requires_grad_()
    with tritonconv.for_graphs():
        y = tritonconv.conv_transpose3d(X, weight, stride=2)
    y.sum().backward()
    tritonconv.conv_transpose3d(X, weight, stride=2).sum().backward()
    assert [each for each in launches if each.startswith(name)] == [f"{name}_torch_phases", f"{name}_torch_conv"]


@pytest.mark.parametrize(("gone", "left"), [(EAGER, GRAPH), (GRAPH, EAGER)])
def test_the_other_choice_serves_where_one_cannot(gone, left):
    made = entry(variant="forward_gone") if gone == GRAPH else entry(eager=eager(variant="forward_gone"))
    tuned(made)
    assert ran() == left
    with tritonconv.for_graphs():
        assert ran() == left
    bad = {"config": {"BLOCK_M": 3}}  # a key that no launch of it takes
    tuned(entry(**bad) if gone == GRAPH else entry(eager=eager(**bad)))
    choose._warn_once.cache_clear()
    with pytest.warns(StoreWarning, match="BLOCK_M"):
        assert ran() == choose.choose(PROBLEM, CPU, "forward", graphs=True).variant.name == left


def test_a_kernel_that_has_changed_is_marked_by_its_own_revision():
    tuned(entry(eager=eager(source="0" * 16)))
    assert choose.choose(PROBLEM, CPU, "forward").outdated
    assert not choose.choose(PROBLEM, CPU, "forward", graphs=True).outdated
    tuned(entry(source="0" * 16))
    assert not choose.choose(PROBLEM, CPU, "forward").outdated
    assert choose.choose(PROBLEM, CPU, "forward", graphs=True).outdated


def test_a_neighbouring_size_has_both_too():
    tuned(entry())
    near = replace(PROBLEM, n=2)
    found = {in_graph: choose.choose(near, CPU, "forward", in_graph) for in_graph in (False, True)}
    assert {each: found[each].variant.name for each in found} == {False: EAGER, True: GRAPH}
    assert all("the neighbouring size" in each.reason for each in found.values())


def test_what_is_not_tuned_and_what_is_pinned_is_the_same_in_both(tmp_path):
    assert choose.choose(PROBLEM, CPU, "forward", True) == choose.choose(PROBLEM, CPU, "forward", False)
    tuned(entry(eager=None))
    first = ran()
    tritonconv.save_choices(tmp_path / "choices.json")
    tuned(entry("forward_torch_shuffle"))
    tritonconv.pin_choices(tmp_path / "choices.json")
    assert ran() == first == GRAPH
    with tritonconv.for_graphs():
        assert ran() == first, "a file without choices for graphs pins them to those of eager calls"


def test_the_choices_for_graphs_are_pinned_by_themselves(tmp_path):
    path = tmp_path / "choices.json"
    tuned(entry())
    tritonconv.explain(PROBLEM)  # looks at both, and plans no call in a graph
    tritonconv.save_choices(path)
    assert len(json.loads(path.read_text())["choices"]) == 1
    with tritonconv.for_graphs():
        ran()
    assert tritonconv.save_choices(path) == 2
    tuned(entry("forward_torch_shuffle", eager=None))
    tritonconv.pin_choices(path)
    assert ran() == EAGER
    with tritonconv.for_graphs():
        assert ran() == GRAPH


# ------------------------------------------------------------------ the tuner


def test_a_tuning_run_times_first_what_is_stored():
    """Else a run that is short could store what is slower than an entry that it replaces."""
    rates, key = nominal(CPU), str(Key.of(PROBLEM, "forward"))
    field = candidates(PROBLEM, CPU, "forward", rates, WHOLE)
    (mine,) = zip(*stored(PROBLEM, CPU, ("forward",), [Table("a CPU", {key: entry()})], rates), strict=True)
    assert [each.label for each in mine] == [GRAPH, EAGER]
    labels = [each.label for each in joined(mine, field)]
    assert labels[:2] == [GRAPH, EAGER] and sorted(labels) == sorted(each.label for each in field)
    assert stored(PROBLEM, CPU, ("forward",), [Table("a CPU")], rates) == []
    gone = Table("a CPU", {key: entry(variant="forward_gone")})
    assert [each.label for (each,) in stored(PROBLEM, CPU, ("forward",), [gone], rates)] == [EAGER]
    twice = replace(PROBLEM, n=2 * PROBLEM.n)  # which the entry serves too
    assert [each.label for (each,) in stored(twice, CPU, ("forward",), [Table("none"), gone], rates)] == [EAGER]


# ------------------------------------------------------------------ explain


def test_explain_shows_both_and_says_which_holds(capsys):
    tuned(entry())
    lines = explain_problem(PROBLEM, CPU).text.splitlines()
    at = lines.index(f"forward: {EAGER} ({variant(EAGER).idea})")
    assert "0.012 ms, torch's own 0.03 ms; for eager calls, where the host takes 0.02 ms to enqueue it" in lines[at + 1]
    assert lines[at + 2] == f"  in CUDA graphs: {GRAPH}"
    assert "0.01 ms, torch's own 0.03 ms; for CUDA graphs, where the host's 0.045 ms do not count" in lines[at + 3]
    with tritonconv.for_graphs():
        lines = explain_problem(PROBLEM, CPU).text.splitlines()
    assert lines[lines.index(f"forward: {GRAPH} ({variant(GRAPH).idea})") + 2] == f"  in eager calls: {EAGER}"
    for same in (lambda: tuned(entry(eager=None)), lambda: dispatch.forget()):
        same()
        assert "in CUDA graphs" not in explain_problem(PROBLEM, CPU).text
    with tritonconv.use(GRAPH):
        assert "in CUDA graphs" not in explain_problem(PROBLEM, CPU).text


# ------------------------------------------------------------------ compiled graphs


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile by inductor, whose graphs run as they were traced; they count."""
    import torch._inductor.compile_fx as inductor

    traced = []

    def compile_fx(module, inputs, **more):
        traced.append([str(node.target) for node in module.graph.nodes if "conv" in str(node.target)])
        return module.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)

    def made(**how):
        torch._dynamo.reset()
        traced.clear()
        return torch.compile(lambda x: tritonconv.conv_transpose3d(x, WEIGHT, stride=2), fullgraph=True, **how), traced

    return made


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}, {}], ids=str)
def test_a_compiled_graph_that_will_be_recorded_asks_for_the_choice_of_graphs(compiled, how):
    """It holds torch's operation where that is the choice; else the operator, which looks the plan up when it runs."""
    torchs = "forward_torch_native"
    for made, operator in ((entry(torchs), not how), (entry(eager=eager(torchs)), bool(how))):
        tuned(made)
        call, traced = compiled(**how)
        torch.testing.assert_close(call(X), torch.conv_transpose3d(X, WEIGHT, stride=2))
        assert len(traced) == 1 and ("tritonconv" in str(traced)) is operator


def test_inductors_own_switch_counts_and_the_block_too(compiled):
    tuned(entry(eager=eager("forward_torch_native")))
    call, traced = compiled()
    call(X)
    with tritonconv.for_graphs():
        call(X)
    call(X)
    assert ["tritonconv" in str(each) for each in traced] == [False, True]
    call, traced = compiled()
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        call(X)
    assert "tritonconv" in str(traced)


def test_a_compiler_that_does_not_say_records_no_graphs():
    assert guards._records_graphs() is False  # nothing is traced
    tuned(entry(eager=eager("forward_torch_native")))
    torch._dynamo.reset()
    call = torch.compile(lambda x: tritonconv.conv_transpose3d(x, WEIGHT, stride=2), backend="aot_eager")
    torch.testing.assert_close(call(X), torch.conv_transpose3d(X, WEIGHT, stride=2))


def test_the_first_run_of_an_operator_prepares_what_a_capture_will_run(monkeypatch, launches, standing_by):
    """A CUDA graph is recorded at the second run, where nothing can be compiled any more."""
    tuned(entry())
    waits = []
    monkeypatch.setattr(dispatch, "wait_until_compiled", lambda: waits.append(list(launches)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    operators._planned.cache_clear()
    geometry = (8, 8, 8), (16, 16, 16), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), 1
    want = torch.conv_transpose3d(X, WEIGHT, stride=2)
    torch.testing.assert_close(operators.forward(X, WEIGHT, None, *geometry), want)
    assert launches == [EAGER, GRAPH, GRAPH, EAGER] and waits == [[EAGER, GRAPH]]
    launches.clear()
    operators.forward(X, WEIGHT, None, *geometry)
    assert launches == [EAGER]
    with tritonconv.for_graphs():
        operators.forward(X, WEIGHT, None, *geometry)
    assert launches[1] == GRAPH
    operators._planned.cache_clear()
    assert {plan.problem for plan in dispatch._by_problem.values()} == {PROBLEM}
    assert PASSES[0] in next(iter(dispatch._by_problem.values())).chosen
