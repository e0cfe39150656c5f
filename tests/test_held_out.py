"""The fit of an H200's timings: the figures for layers it has not seen, the file that ships, and the choice by it."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import compiled, problem  # noqa: F401  (a fixture)

from tritonconv.autotune import ceilings, choose, first, fit, serving
from tritonconv.autotune.fit import Fit, Smoother, place
from tritonconv.autotune.rules import FALLBACK
from tritonconv.autotune.serving import Part
from tritonconv.autotune.store import Table
from tritonconv.autotune.tuning import held_out
from tritonconv.errors import ResultsError
from tritonconv.kernels import registry
from tritonconv.lab import cli, predictions
from tritonconv.lab.bench import results
from tritonconv.lab.bench.layer_sizes import resized
from tritonconv.problem import PASSES

ROWS = Path(__file__).resolve().parent.parent / "plots" / "examples" / "nvidia_h200"
FITTED = ROWS, ROWS / "2026-11-29-tune"
SHIPPED = Path(fit.__file__).with_name("fit_sm_90.json")
CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not registry.have_triton(), reason="needs Triton")
LEAST_OF_ORACLE, MOST_SLOW = 0.9, 0.08


def trials(*paths: Path) -> tuple[list[held_out.Trial], ceilings.Ceilings]:
    """The groups of the rows, and the ceilings."""
    runs = [results.load(path) for path in paths]
    with predictions.as_on(runs[0]):
        limits = predictions.ceilings_of(runs[0])
        return held_out.trials_of(predictions.timed_in(runs), limits), limits


@pytest.fixture(scope="module")
def measured():
    """Of the rows that what ships is fitted to."""
    return trials(*FITTED)


@pytest.fixture(scope="module")
def fits(measured):
    """With the candidates of the campaign alone: a later run has its new kernels on few layers, so that the rest has
    none of them where such a layer is left out."""
    campaign = {key(each): each for each in trials(ROWS)[0]}
    return [([campaign[key(each)] for each in mine], fitted) for mine, fitted in held_out.fits(*measured)]


def key(trial: held_out.Trial) -> tuple:
    return trial.layer, trial.problem, trial.pass_name


@pytest.fixture
def hopper():
    from tritonconv.kernels.triton_target import assume_capability

    with assume_capability(90):
        yield


@pytest.mark.parametrize("served", [held_out.safe, lambda sample: True], ids=["safe", "all"])
def test_choices_for_layers_left_out_are_nearly_the_best_and_seldom_slow(fits, served):
    found = held_out.scores(fits, served)
    assert len(found) == 235
    for name in PASSES:
        oracle, choice, slow = held_out.figures([each for each in found if each.trial.pass_name == name])
        assert choice >= LEAST_OF_ORACLE * oracle and slow <= MOST_SLOW, (name, oracle, choice, slow)


def test_nothing_of_a_layer_or_its_siblings_is_in_what_its_fit_has_seen(measured):
    groups, _ = measured
    seen = set()
    for mine, rest in held_out.folds(groups):
        layers = {group.layer for group in mine}
        assert not layers & {group.layer for group in rest} and len(mine) + len(rest) == len(groups)
        kinds, others = ({shape(group.problem) for group in some} for some in (mine, rest))
        assert len(kinds) == 1 and not kinds & others
        seen |= layers
        if "toothseg_256_last" in layers:
            assert {"nnunet_dynunet_128_up4", "nnunet_resenc_160x192_up4"} < layers
    assert len(seen) == 40


def shape(each) -> tuple:
    return each.c_in, each.c_out, each.kernel, each.stride, each.groups


def test_what_ships_is_what_the_committed_rows_give(measured):
    groups, limits = measured
    kept, made = Fit.from_json(json.loads(SHIPPED.read_text())), held_out.fit(groups, limits, {})
    assert kept.ceilings.factors == pytest.approx(made.ceilings.factors)
    for group in groups:
        mine, theirs = (each.torch_ms(group.problem, group.pass_name, limits) for each in (kept, made))
        assert mine == pytest.approx(theirs, rel=0.01)
        assert 0.4 < mine / group.torch_ms < 2.5, (group.layer, group.pass_name)


def test_the_command_prints_the_figures_and_writes_the_fit(tmp_path, capsys, monkeypatch, measured):
    groups = measured[0]
    monkeypatch.setattr(held_out, "folds", lambda _: [(groups[:1], groups)])
    assert cli.main(["report", *map(str, FITTED), "--held-out", "--fit", str(tmp_path / "fit.json")]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200: 235 problems" in said and "siblings" in said and said.count("of the oracle") == 2
    written, kept = (Fit.from_json(json.loads(path.read_text())) for path in (tmp_path / "fit.json", SHIPPED))
    assert written.versions == kept.versions and written.ceilings.factors == pytest.approx(kept.ceilings.factors)
    for name in PASSES:
        assert written.passes[name].kernels.kinds == kept.passes[name].kernels.kinds
        assert written.passes[name].rates == pytest.approx(kept.passes[name].rates, abs=0.01)


def test_a_later_run_adds_the_kernels_that_were_not_timed_before():
    first, later = (results.load(path) for path in FITTED)
    both, alone = ({each.sample.record.name for each in some} for some in
                   (predictions.timed_in([first, later]), predictions.timed(first)))  # fmt: skip
    new = {"forward_depthwise_cells", "backward_weight_shuffle"}
    assert new <= both - alone and all("_torch_" not in name for name in both - alone)
    timed = predictions.timed_in([first, later])
    old = [each for each in timed if each.sample.record.name in alone]
    assert old == predictions.timed(first)


def test_corrections_leave_out_what_was_timed_while_wide_layers_counted_in_64_bits(measured):
    """In NDHWC some took 5 to 13 times as long as for half of the images, whose offsets have 32."""
    groups, limits = measured
    (layer,) = {group.layer for group in groups if math.prod(group.problem.y_shape) > fit.WIDE}
    stale = [each for group in groups for each, _ in group.timed if not each.lasting]
    assert {each.layer for each in stale} == {layer} and all(each.sample.record.backend == "triton" for each in stale)
    assert all(not held_out.lasting(each.sample, "2026-11-29") for each in stale)
    assert all(held_out.lasting(each.sample, held_out.COUNTED_IN_32_BITS) for each in stale)
    for found in held_out.fit(groups, limits, {}).passes.values():
        wide = [kind for kind, where in zip(found.kernels.kinds, found.kernels.places, strict=True) if where[-1]]
        assert all("_torch_" in kind for kind in wide) and found.torch.places[:, -1].any()


def test_a_fit_is_of_one_device(tmp_path):
    other = dataclasses.replace(results.load(FITTED[1]), environment={"device_name": "another"})
    with pytest.raises(ResultsError, match=r"of one device, got NVIDIA H200 \(.*\), another \("):
        predictions.fitted([results.load(ROWS), other], True, None)


def test_corrections_follow_what_is_near_and_end_at_one_far_away():
    places = np.array([[0.0] * 9, [1.0] + [0.0] * 8])
    found = Smoother.of(["a", "b"], places, np.log([3.0, 1.0]), fit.TORCHS)
    assert found.at("a", places[0]) == pytest.approx(3.0, rel=0.15)
    assert found.at("b", places[0]) == pytest.approx(1.0, rel=0.05)
    bumps = Smoother.of(["a"], places[:1], np.log([3.0]), fit.TORCHS._replace(slope=0.0))
    assert bumps.at("a", places[0] + 10) == pytest.approx(1.0)
    sibling = found.at("a" + fit.UNPIPELINED, places[0])
    assert 1.5 < sibling < found.at("a", places[0])


def test_layers_that_differ_in_size_alone_are_near():
    each = problem("segresnet_deconv_up2")
    larger, other = resized(each, tuple(size + 2 for size in each.size)), problem("psmnet_train_64_32")
    near, far = (float(np.abs(place(each) - place(one)).max()) for one in (larger, other))
    assert near < 0.1 < 0.5 < far


# ------------------------------------------------------------------ the choice


def choice(each, pass_name="forward") -> choose.Selection:
    fitted = fit.shipped_fit(serving.HOPPER)
    return choose.Selection(*first.first(each, CUDA, pass_name, fitted.ceilings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_is_first_where_it_is_expected_to_win_and_torchs_own_elsewhere(hopper, dtype):
    wins = choice(problem("mednext_k3_dw_64", dtype))
    assert wins.variant.name == "forward_depthwise_cells" and "cost model expects" in wins.reason
    loses = choice(problem("toothseg_256_last", dtype), "backward_data")
    assert loses.variant.name == FALLBACK["backward_data"] and "torch's own to take" in loses.reason


def test_every_pass_of_every_timed_layer_has_a_first_that_serves_it(hopper, measured):
    kernels = 0
    for group in measured[0]:
        found = choice(group.problem, group.pass_name)
        assert found.variant.pass_name == group.pass_name and found.variant.supports(group.problem, CUDA) is None
        kernels += found.variant.backend == "triton"
    assert kernels > 150


def steps_of_python() -> dict[int, int]:
    found: dict[int, int] = {}
    for step in range(200_000):
        found[step % 997] = found.get(step % 991, 0) + step
    return found


def test_a_choice_does_not_stall(hopper):
    """For three passes it takes less than 400,000 steps of Python, 50 ms on one CPU of 2026, where ranking whole spaces
    took 75 to 217. CPU time of both in turns: neither other programs nor the CPU's speed count."""
    each, times = problem("psmnet_train_64_32"), []
    for more in range(1, 8):
        other = resized(each, tuple(size + more for size in each.size))
        begin = time.process_time()
        for name in PASSES:
            choice(other, name)
        between = time.process_time()
        steps_of_python()
        times.append((between - begin, time.process_time() - between))
    mine, steps = map(min, zip(*times, strict=True))
    assert mine < 2 * steps


def test_variants_that_were_not_timed_do_not_take_part():
    fitted = fit.shipped_fit(serving.HOPPER)
    names = {record.name for record in registry.variants() if first.takes_part(record, fitted)}
    assert {"forward_shuffle_given", "forward_torch_shuffle", "backward_weight_splitk"} <= names
    assert not names & {"forward_torch_native", "forward_torch_linear", "forward_torch_phases"}


# ------------------------------------------------------------------ other GPUs of the same kind


PCIE = Part("NVIDIA H100 PCIe", (9, 0), 114)


def test_a_narrower_gpu_has_its_own_rates():
    base = fit.shipped_fit(serving.HOPPER).ceilings
    found = ceilings.scale_to(base, PCIE._replace(bandwidth=2.04e12))
    assert found.multiprocessors == 114 and not found.measured and found.factors == base.factors
    assert found.matrix["bfloat16"] == pytest.approx(base.matrix["bfloat16"] * 114 / 132)
    assert found.memory == pytest.approx(ceilings.COPIED * 2.04e12) and found.cache >= found.memory
    unsaid = ceilings.scale_to(base, PCIE)
    assert unsaid.memory == pytest.approx(ceilings.COPIED * 3350e9 * 114 / 132)
    assert (unsaid.shared_bytes, unsaid.registers) == (base.shared_bytes, base.registers)
    assert ceilings.scale_to(base, Part(base.device, (9, 0), 132)) is base


def test_a_part_says_what_torch_says_of_it(monkeypatch):
    said = SimpleNamespace(name="NVIDIA H100 PCIe", major=9, minor=0, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    part = serving.part.__wrapped__
    assert part(CUDA) == PCIE
    said.memory_clock_rate, said.memory_bus_width, said.shared_memory_per_multiprocessor = 1593000, 5120, 233472
    assert part(CUDA).bandwidth == pytest.approx(2.04e12, rel=0.01) and part(CUDA).shared_bytes == 233472


def test_rates_are_the_measured_ones_of_the_gpu_else_those_adapted_to_it(monkeypatch):
    base, tables = fit.shipped_fit(serving.HOPPER).ceilings, {"there": Table("gpu")}
    monkeypatch.setattr(choose, "sources_of", lambda device: (choose.Source(tables["there"]),))
    monkeypatch.setattr(serving, "part", lambda device: PCIE)
    assert choose.ceilings_of(CUDA) == ceilings.scale_to(base, PCIE)
    tables["there"] = Table("gpu", {}, base.to_json())  # of the GPU whose table serves it
    assert choose.ceilings_of(CUDA).multiprocessors == 114
    tables["there"] = Table("gpu", {}, dataclasses.replace(base, device=PCIE.name, memory=1e12).to_json())
    assert choose.ceilings_of(CUDA).memory == 1e12


def test_a_slower_memory_makes_both_sides_slower(hopper):
    fitted, each = fit.shipped_fit(serving.HOPPER), problem("segresnet_deconv_up2")
    slow = dataclasses.replace(fitted.ceilings, memory=fitted.ceilings.memory / 2)
    assert fitted.torch_ms(each, "forward", slow) > 1.5 * fitted.torch_ms(each, "forward", fitted.ceilings)
    assert math.isfinite(fitted.torch_ms(each, "forward", slow))
