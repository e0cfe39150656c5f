"""torch's own answer is wrong at full size, with no error: the bench and the tuner say so and go on. CPU only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_runner import layer, run
from test_tuning import TORCH, UP, broken, clockless, entries, folder, winner  # noqa: F401

import tritonconv
from tritonconv import Problem
from tritonconv.autotune.tuning.session import Session, tasks_of
from tritonconv.kernels import registry
from tritonconv.lab.bench import case, gate, operations
from tritonconv.lab.bench.operations import torch_call
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.bench.standings import standings
from tritonconv.lab.bench.summary import summary
from tritonconv.problem import PASSES

CPU = torch.device("cpu")
GARBAGE = 5.5e22  # a grad_weight of torch's on a GPU had it
STEP = Problem(1, 4, 3, (6, 4, 9), (2, 2, 2), (2, 2, 2), (0, 0, 0), (12, 8, 18), bias=True)


@pytest.fixture
def wrong_torch(monkeypatch):
    """torch's own call answers with garbage in an output, for problems with so many voxels along w."""

    def spoil(output: str, width: int) -> None:
        def call_of(problem, tensors, pass_name):
            call, names = torch_call(problem, tensors, pass_name), gate.OUTPUTS[pass_name]
            if problem.size[2] != width or output not in names:
                return call
            return lambda: tuple(
                value + GARBAGE if name == output else value for name, value in zip(names, call(), strict=False)
            )

        monkeypatch.setattr(case, "torch_call", call_of)

    return spoil


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("reduced", [False, True], ids=["at size", "too small to be reduced"])
def test_where_torch_is_wrong_its_row_says_so_and_the_run_goes_on_without_it(tmp_path, wrong_torch, reduced):
    wide = layer(size=(3, 4, 5) if reduced else (3, 4, 8))
    wrong_torch("grad_weight", wide.size[2])
    outcome, found = run(
        tmp_path, wide, layer("other", size=(3, 4, 9)), passes=("forward", "forward_backward"), layouts=("ncdhw",)
    )
    assert (outcome.reason, outcome.errors) == ("complete", 1)
    (error,) = found.errors
    cell = (error["layer"], error["pass"], error["variant"], error["status"])
    assert cell == ("tiny", "forward_backward", "torch", "wrong")
    assert error["message"].startswith("grad_weight: ")
    timed = [(row["layer"], row["pass"], row["variant"]) for row in found.results]
    both = [("tiny", "forward"), ("other", "forward"), ("other", "forward_backward")]
    assert sorted(timed) == sorted([(*each, name) for each in both for name in ("torch", "tritonconv")]
                                   + [("tiny", "forward_backward", "tritonconv")])  # fmt: skip
    (alone,) = [row for row in found.results if (row["layer"], row["pass"]) == ("tiny", "forward_backward")]
    assert alone["speedup"] is None and alone["max_error"] <= alone["tolerance"]
    assert "wrong: torch on tiny (forward_backward): grad_weight: " in summary(found)
    assert {(one.ours["layer"], one.ours["pass"]) for one in standings(found.results)} == set(both)


@pytest.mark.usefixtures("quick")
def test_what_was_held_against_torchs_wrong_answer_is_judged_again(tmp_path, wrong_torch, monkeypatch):
    """The public operation agrees with torch, a variant behind it does not, and float64 is on its side."""
    wrong_torch("y", 8)
    monkeypatch.setattr(
        operations, "conv_transpose3d",
        lambda x, *args: F.conv_transpose3d(x, *args) + (GARBAGE if x.shape[-1] == 8 else 0),
    )  # fmt: skip
    single = (registry.variant("forward_torch_phases"),)
    _, found = run(tmp_path, layer(), passes=("forward",), layouts=("ncdhw",), variants=single)
    assert [row["variant"] for row in found.results] == ["forward_torch_phases"]
    assert sorted((row["variant"], row["status"]) for row in found.errors) == [
        ("torch", "wrong"), ("tritonconv", "wrong")
    ]  # fmt: skip


@pytest.mark.parametrize("problem", [STEP, UP], ids=["at size", "too small to be reduced"])
def test_torch_cannot_win_where_its_answer_is_wrong(clockless, wrong_torch, problem, broken):  # noqa: F811
    """By the clock torch's own wins; its step is wrong in grad_weight, and so is the variant that is torch's own."""
    clockless[TORCH] = 1.0
    for name in PASSES[1:]:
        clockless[f"{name}_torch_native"] = 1.0
    native = registry.variant("backward_weight_torch_native").launch

    def launch(asked, config, x, grad_y, need_bias):
        grad_weight, grad_bias = native(asked, config, x, grad_y, need_bias)
        return grad_weight + GARBAGE * (asked == problem), grad_bias

    broken("backward_weight_torch_native", launch)
    wrong_torch("grad_weight", problem.size[2])
    rows: list[tuple[str, dict]] = []
    report = Session(CPU, write=lambda kind, row: rows.append((kind, row))).run(tasks_of([problem]), Progress())
    assert report.errors == 0 and len(report.winners) == 3
    assert winner("forward") == "forward_torch_native"
    assert winner("backward_weight") not in ("backward_weight_torch_native", TORCH)
    said = {row["pass"]: row for kind, row in rows if kind == "error" and row["variant"] == TORCH}
    assert sorted(said) == ["backward_weight", "forward_backward"]  # each is judged by its own call
    for row in said.values():
        assert row["status"] == "wrong"
        assert row["message"].startswith("grad_weight: torch's own is wrong at this size: max error 5.5e+22 ")


def test_nothing_is_stored_where_neither_torch_nor_a_variant_is_right(clockless, wrong_torch, broken):  # noqa: F811
    wrong_torch("y", STEP.size[2])
    for record in registry.variants("forward"):
        right = record.compute
        broken(record.name, lambda asked, *args, right=right: right(asked, *args) * (1.01 if asked == STEP else 1))
    report = tritonconv.tune(STEP)
    assert not entries() and not report.winners  # no training step has a right y either
