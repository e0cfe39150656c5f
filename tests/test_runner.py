"""The run: the correctness gate, what a red gate, an error, a budget and an interrupt leave in the file."""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tritonconv import dispatch
from tritonconv.autotune import choose, serving
from tritonconv.autotune.ceilings import nominal
from tritonconv.autotune.choose import Source
from tritonconv.autotune.serving import Part
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Table
from tritonconv.kernels import registry
from tritonconv.lab.bench import cell, gpu, operations, runner
from tritonconv.lab.bench.calls import ALL_PASSES
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.bench.options import Options
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.results import latest, read
from tritonconv.lab.bench.rows import versions_of
from tritonconv.lab.bench.summary import summary
from tritonconv.problem import Problem

CPU = torch.device("cpu")


def layer(
    name="tiny", c_in=4, c_out=6, size=(3, 4, 8), kernel=3, stride=2, padding=1, groups=1, bias=True, suite="unet"
):
    three = lambda value: (value,) * 3  # noqa: E731
    return Workload(
        name=name, suite=suite, n=2, c_in=c_in, c_out=c_out, size=size, kernel=three(kernel), stride=three(stride),
        padding=three(padding), output_padding=(0, 0, 0), dilation=(1, 1, 1), groups=groups, bias=bias,
        used_in="fp32", gflop=0.0, mbytes_bf16=0.0, source="tests/test_runner.py",
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick")


def run(tmp_path, *layers, progress=None, **options):
    outcome = runner.bench(Options(tuple(layers), **options), tmp_path, progress or Progress())
    return outcome, read(outcome.path)


@pytest.fixture
def sabotage(monkeypatch):
    """Changes what a variant returns: ``sabotage(name, change)``."""

    def spoil(name: str, change) -> None:
        record = registry.variant(name)
        broken = dataclasses.replace(record, launches=None, launch=lambda *args: change(record.compute(*args)))
        monkeypatch.setitem(registry._records(), name, broken)

    return spoil


def test_kernels_are_compiled_ahead_each_once_in_the_order_of_the_cells(monkeypatch):
    """The choices of dispatch on a GPU that was measured, and the variants that were asked for."""
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    measured = dataclasses.replace(nominal(cuda), measured=True).to_json()
    monkeypatch.setattr(choose, "sources_of", lambda device: (Source(Table("gpu", {}, measured)),))
    monkeypatch.setattr(serving, "part", lambda device: Part("gpu", (9, 0), 132))
    monkeypatch.setattr(choose, "_firsts", {})
    monkeypatch.setattr(cell, "versions_of", lambda device: {})
    at_size = dataclasses.replace(layer("tiny at 8", 16, 16, (8, 8, 8)), family="tiny")
    layers, alone = (at_size, layer("tiny", 16, 16), layer("other", 32, 16)), registry.variant("forward_gather")
    asked = Options(layers, ("forward", "forward_backward"), (torch.float16,), ("ndhwc",), (alone,), device=cuda)
    found = []

    def finish(started, seconds):
        found.extend(started)
        assert seconds == runner.MOST_COMPILING_SECONDS

    dispatch.forget()
    try:
        compiler = SimpleNamespace(target="sm_90", start=list, finish=finish)
        runner._Bench(asked, None, Progress(), [{}]).compile_ahead(compiler)
        want = []
        for each in (layers[1], layers[2], at_size):  # sizes of no model come last
            problem = each.problem(torch.float16, "ndhwc", "cpu")
            made = dispatch.plan(problem, cuda)
            chosen = [made.choice("forward"), (alone, alone.default(problem, cuda), ""), made.choice("backward_data"),
                      made.choice("backward_weight")]  # fmt: skip
            want += [(record.name, problem, config) for record, config, *_ in chosen if record.backend == "triton"]
    finally:
        dispatch.forget()
    assert found == want and len(want) >= 9


def test_a_complete_run(tmp_path):
    outcome, found = run(tmp_path, layer(), layer("same"), layer("other", groups=2), passes=ALL_PASSES)
    assert (outcome.reason, outcome.errors) == ("complete", 0)
    assert found.environment["distinct_layers"] == 2
    assert len(found.results) == 2 * 2 * 4 * 2  # layers, layouts, passes, torch and tritonconv
    assert {row["when"] for row in found.roofs} == {"start", "end"}
    assert found.end["cells"] == found.end["of_cells"] == 16
    for row in found.results:
        assert row["n_runs"] >= 3
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["max_error"] <= row["tolerance"]
        assert row["percent_of_roof"] > 0
        assert row["duplicates"] == (["same"] if row["layer"] == "tiny" else [])
        ours = row["variant"] == "tritonconv"
        assert list(row["chosen"]) == ([p for p in ALL_PASSES[:3] if row["pass"] in (p, ALL_PASSES[3])] if ours else [])
        assert row["speedup_p20"] <= row["speedup"] <= row["speedup_p80"]
        if not ours:
            assert row["speedup"] == 1


def test_useful_work_of_a_training_step_is_the_three_passes(tmp_path):
    _, found = run(tmp_path, layer(), passes=ALL_PASSES, layouts=("ncdhw",))
    work = {row["pass"]: (row["flops"], row["bytes"]) for row in found.results}
    assert work[ALL_PASSES[3]] == tuple(sum(work[name][i] for name in ALL_PASSES[:3]) for i in range(2))


def test_single_variants_are_timed_or_skipped_with_the_reason(tmp_path):
    singles = registry.variants("forward")
    _, found = run(tmp_path, layer(), passes=("forward",), layouts=("ncdhw",), variants=singles)
    timed = {row["variant"]: row["chosen"] for row in found.results}
    skipped = {row["variant"]: row["message"] for row in found.skips}
    assert timed.keys() | skipped.keys() == {record.name for record in singles} | {"torch", "tritonconv"}
    assert timed["forward_torch_phases"] == {"forward": "forward_torch_phases"}
    assert "stride 1" in skipped["forward_torch_conv"]
    assert not found.errors


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("shifted by a voxel", lambda y: torch.roll(y, 1, dims=4)),
        ("a wrong border", lambda y: torch.cat((y[..., :-1], y[..., -1:] * 1.01), dim=-1)),
        ("not a number", lambda y: y * torch.nan),
        ("a plane missing", lambda y: y[:, :, 1:]),
        ("axes mixed up", lambda y: y.transpose(2, 3).contiguous()),
        ("wrong at size alone", lambda y: torch.cat((y[..., :12], torch.roll(y[..., 12:], 1, dims=-1)), dim=-1)),
    ],
)
def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, what, change):
    monkeypatch.setattr(operations, "conv_transpose3d", lambda *args: change(F.conv_transpose3d(*args)))
    outcome, found = run(tmp_path, layer(), passes=("forward",), layouts=("ncdhw",))
    assert outcome.errors == 1
    assert [row["variant"] for row in found.results] == ["torch"]
    (error,) = found.errors
    assert (error["variant"], error["status"], error["layer"]) == ("tritonconv", "wrong", "tiny")
    assert error["message"].startswith("y: ")


def test_a_wrong_gradient_is_found_in_a_training_step(tmp_path, monkeypatch):
    def ten_percent_more_bias_gradient(x, weight, bias, *args):
        return F.conv_transpose3d(x, weight, bias + 0.1 * (bias - bias.detach()), *args)

    monkeypatch.setattr(operations, "conv_transpose3d", ten_percent_more_bias_gradient)
    _, found = run(tmp_path, layer(), passes=("forward", "forward_backward"), layouts=("ncdhw",))
    assert [(row["pass"], row["message"][:9]) for row in found.errors] == [("forward_backward", "grad_bias")]


def test_a_wrong_variant_is_not_timed_beside_right_ones(tmp_path, sabotage):
    sabotage("forward_torch_phases", lambda y: torch.roll(y, 1, dims=4))
    singles = (registry.variant("forward_torch_phases"), registry.variant("forward_torch_columns"))
    _, found = run(tmp_path, layer(), passes=("forward",), layouts=("ncdhw",), variants=singles)
    assert [(row["variant"], row["status"]) for row in found.errors] == [("forward_torch_phases", "wrong")]
    assert {row["variant"] for row in found.results} == {"torch", "tritonconv", "forward_torch_columns"}


def test_a_variant_that_raises_is_a_row_and_the_run_goes_on(tmp_path, sabotage):
    def fail(y):
        raise MemoryError("no room")

    sabotage("forward_torch_phases", fail)
    single = (registry.variant("forward_torch_phases"),)
    outcome, found = run(
        tmp_path, layer(), layer("b", c_in=5), passes=("forward",), layouts=("ncdhw",), variants=single
    )
    assert outcome.errors == 2
    assert {(row["status"], row["message"]) for row in found.errors} == {("error", "MemoryError: no room")}
    assert {row["variant"] for row in found.results} == {"torch", "tritonconv"}


def test_a_cell_without_memory_is_a_row_and_the_run_goes_on(tmp_path, monkeypatch):
    graphs, kept = weakref.WeakSet(), []

    def captured(call, device):
        graph = functools.partial(call)
        graphs.add(graph)
        return graph

    peaks = iter([1, None, 2, 3])

    def peak_bytes(call, device):
        peak = next(peaks)
        if peak is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return peak

    def watch(call):
        call()
        return 1.0

    watch.readings = lambda: {"sm_mhz": 1980, "late_samples": 0}
    monkeypatch.setattr(cell.CellTimer, "clock", property(lambda timer: watch))
    monkeypatch.setattr(gpu, "captured", captured)
    monkeypatch.setattr(gpu, "peak_bytes", peak_bytes)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: kept.append(len(graphs)))
    outcome, found = run(tmp_path, layer(), layer("b", c_in=5), passes=("forward",), layouts=("ncdhw",))
    assert (outcome.reason, outcome.errors, found.end["cells"]) == ("complete", 1, 2)
    (error,) = found.errors
    assert (error["layer"], error["variant"], error["status"]) == ("tiny", "all", "error")
    assert "out of memory" in error["message"] and "context_lost" not in error
    assert [(row["layer"], row["peak_bytes"]) for row in found.results] == [("b", 2), ("b", 3)]
    assert kept == [0]  # no graph is left when the memory is given back


@pytest.mark.parametrize(
    ("error", "rows"), [(TypeError("a mistake"), 0), (RuntimeError("CUDA error: misaligned address"), 1)]
)
def test_what_is_no_lack_of_memory_ends_the_run(tmp_path, monkeypatch, error, rows):
    def raises(*args, **how):
        raise error

    monkeypatch.setattr(cell, "measure", raises)
    with pytest.raises(type(error), match=str(error)):
        run(tmp_path, layer(), passes=("forward",), layouts=("ncdhw",))
    found = read(latest(tmp_path))
    assert [row["context_lost"] for row in found.errors] == [True] * rows and not found.results
    assert found.end["reason"] == "error" and str(error) in found.end["message"]


def test_rows_carry_the_sources_and_the_versions_they_were_measured_with(tmp_path):
    single = registry.variant("forward_torch_phases")
    _, found = run(tmp_path, layer(), passes=ALL_PASSES, layouts=("ncdhw",), variants=(single,))
    for row in found.results:
        assert row["versions"] == versions_of(CPU) and row["versions"]["torch"] == str(torch.__version__)
        expected = {name: revision(registry.variant(chosen)) for name, chosen in row["chosen"].items()}
        assert row["sources"] == expected and bool(expected) == (row["variant"] != "torch")


class Interrupting(Progress):
    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, text: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupt_keeps_every_finished_row(tmp_path):
    outcome, found = run(tmp_path, layer(), progress=Interrupting(3))
    assert outcome.reason == found.end["reason"] == "interrupted"
    assert len(found.results) == 3 * 2


def test_an_interrupt_inside_a_call_ends_the_run_too(tmp_path, sabotage):
    def stop(y):
        raise KeyboardInterrupt

    sabotage("forward_torch_phases", stop)
    single = (registry.variant("forward_torch_phases"),)
    outcome, found = run(tmp_path, layer(), passes=("forward_backward", "forward"), layouts=("ncdhw",), variants=single)
    assert outcome.reason == found.end["reason"] == "interrupted"
    assert {row["pass"] for row in found.results} == {"forward_backward"}


def test_a_budget_ends_early_with_every_suite_seen(tmp_path, monkeypatch):
    layers = [
        layer(f"{suite}{c_in}", c_in=c_in, suite=suite)
        for suite, first in (("unet", 4), ("gan", 30))
        for c_in in range(first, first + 20)
    ]
    now = iter(range(10_000))
    for module in (runner, cell):
        monkeypatch.setattr(module, "perf_counter", lambda: next(now) / 100)  # every look at the clock takes 10 ms
    outcome, found = run(tmp_path, *layers, seconds=1.0, passes=("forward",), layouts=("ncdhw",))
    assert outcome.reason == found.end["reason"] == "budget"
    assert 2 <= found.end["cells"] < 40
    seen = [row["suite"] for row in found.results if row["variant"] == "torch"]
    assert abs(seen.count("unet") - seen.count("gan")) <= 1
    assert [row["when"] for row in found.roofs][-1] == "end"


def test_the_inputs_depend_on_the_seed_and_the_layer_alone(tmp_path):
    errors = []
    for layers, seed in (([layer("x")], 0), ([layer("y", c_in=5), layer("x")], 0), ([layer("x")], 1)):
        _, found = run(tmp_path, *layers, passes=("forward",), layouts=("ncdhw",), seed=seed)
        errors.append([row["max_error"] for row in found.results if row["layer"] == "x"])
    assert errors[0] == errors[1] != errors[2]


def test_half_precision_is_judged_by_torchs_own_error(tmp_path):
    _, found = run(tmp_path, layer(), dtypes=(torch.bfloat16,), passes=ALL_PASSES, layouts=("ndhwc",))
    assert not found.errors
    assert {row["dtype"] for row in found.results} == {"bfloat16"}


def test_rows_are_plain_json(tmp_path):
    outcome, _ = run(tmp_path, layer(), passes=("forward",), layouts=("ncdhw",))
    for line in outcome.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(text))


def test_a_layer_whose_weight_is_too_large_is_left_out_with_the_reason(tmp_path):
    heavy = layer("heavy", c_in=512, c_out=512, kernel=4)
    _, found = run(tmp_path, layer(), heavy, passes=("forward",), layouts=("ncdhw",))
    assert {row["layer"] for row in found.results} == {"tiny"}
    assert found.end["of_cells"] == 1
    assert [(row["layer"], row["message"][:26]) for row in found.skips] == [("heavy", "its weight alone is 67 MB ")]
    assert "left out: heavy: its weight alone is 67 MB" in summary(found)


def test_problem_sizes_are_recorded_as_timed_and_as_in_the_model(tmp_path):
    big = layer("big", c_in=64, c_out=64, size=(32, 32, 32))
    _, found = run(tmp_path, big, passes=("forward",), layouts=("ncdhw",))
    row = found.results[0]
    assert row["scaled"] is True
    assert row["original"]["size"] == [32, 32, 32]
    timed = {key: tuple(value) if isinstance(value, list) else value for key, value in row["problem"].items()}
    timed.pop("back_crop")
    assert Problem(**timed) == big.problem(scale="cpu")
