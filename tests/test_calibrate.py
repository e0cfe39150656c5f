"""The factors that correct the cost model: what they are made of, where they count, and that they stay in the store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_model import GPU, compiled, layers, problem, triton  # noqa: F401  (a fixture)

from tritonconv.autotune import ceilings, model, store
from tritonconv.autotune.key import device_name
from tritonconv.autotune.model import LEAST_TIMINGS as LEAST
from tritonconv.autotune.sources import revision
from tritonconv.autotune.tuning import calibrate, session
from tritonconv.autotune.tuning.calibrate import Sample
from tritonconv.autotune.tuning.journal import Journal, Timing
from tritonconv.autotune.tuning.session import Session, tasks_of
from tritonconv.epilogue import Epilogue
from tritonconv.kernels import registry
from tritonconv.kernels.registry import variant
from tritonconv.lab.bench.progress import Progress
from tritonconv.lab.inspection.precompile import Precompiler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAME = "forward_phases" if registry.have_triton() else "forward_torch_phases"


def guess(name: str, each, limits=GPU, **changes) -> model.Estimate:
    record = variant(name)
    return model.estimate(record, each, {**record.default(each, CUDA), **changes}, limits)


def measured(name: str, times: float, count: int, **changes) -> list[Sample]:
    """Samples of a variant that takes ``times`` what is predicted, its launches apart."""
    record, found = variant(name), []
    for each in layers(torch.bfloat16, "ndhwc"):
        if record.supports(each, CUDA) is None and guess(name, each, **changes).limit != model.LAUNCH:
            one = guess(name, each, **changes)
            launches = one.work.launches * GPU.launch_us * 1e-3
            config = {**record.default(each, CUDA), **changes}
            found.append(Sample(record, each, config, (one.ms - launches) * times + launches))
    assert len(found) >= count
    return found[:count]


def kind(name: str, **changes) -> str:
    each = next(each for each in layers(torch.bfloat16, "ndhwc") if variant(name).supports(each, CUDA) is None)
    config = {**variant(name).default(each, CUDA), **changes}
    return model.kind(variant(name), config, guess(name, each, **changes).work)


needs_triton = pytest.mark.skipif(not registry.have_triton(), reason="needs Triton")


@needs_triton
def test_a_kind_has_the_median_of_its_ratios_and_is_corrected_by_it():
    found = [*measured(NAME, 2.0, LEAST), *measured(NAME, 5.0, LEAST + 1, num_stages=1)]
    factors = calibrate.factors(calibrate.counts(found, GPU), GPU)
    assert factors[kind(NAME)] == pytest.approx(2) and factors[kind(NAME, num_stages=1)] == pytest.approx(5)
    assert kind(NAME) != kind(NAME, num_stages=1)
    corrected = dataclasses.replace(GPU, factors=factors)
    each = problem("psmnet_train_64_32")
    launches = guess(NAME, each).work.launches * GPU.launch_us * 1e-3
    for changes, times in (({}, 2), ({"num_stages": 1}, 5)):
        before, after = guess(NAME, each, **changes), guess(NAME, each, corrected, **changes)
        assert after.ms - launches == pytest.approx(times * (before.ms - launches))
    # The factors are made against the plain model, whatever was corrected before.
    assert calibrate.factors(calibrate.counts(found, corrected), corrected) == pytest.approx(factors)


@needs_triton
def test_what_was_hardly_timed_has_the_factor_of_all_kernels_of_its_backend():
    found = [*measured(NAME, 3.0, LEAST), *measured("backward_data_gemm", 1.0, LEAST - 1)]
    factors = calibrate.factors(calibrate.counts(found, GPU), GPU)
    assert set(factors) == {kind(NAME), "triton"} and factors["triton"] == pytest.approx(3)
    corrected, each = dataclasses.replace(GPU, factors=factors), problem("psmnet_train_64_32")
    assert guess("backward_data_gemm", each, corrected).ms > 2 * guess("backward_data_gemm", each).ms
    assert guess("forward_torch_native", each, corrected).ms == guess("forward_torch_native", each).ms
    both = calibrate.factors(calibrate.counts([*found, *measured("forward_torch_native", 4.0, LEAST)], GPU), GPU)
    corrected = dataclasses.replace(GPU, factors=both)
    assert both["torch"] == pytest.approx(4)
    assert guess("forward_torch_phases", each, corrected).ms > 2 * guess("forward_torch_phases", each).ms


@needs_triton
def test_a_kernel_that_was_edited_keeps_its_factor(monkeypatch):
    before, found = kind(NAME), measured(NAME, 2.0, LEAST)
    monkeypatch.setattr(calibrate, "revision", lambda record: "another")
    assert kind(NAME) == before == NAME and kind(NAME, num_stages=1) == f"{NAME}{model.UNPIPELINED}"
    assert calibrate.factors(calibrate.counts(found, GPU), GPU)[NAME] == pytest.approx(2)


def test_timings_of_an_earlier_revision_count_until_there_are_newer_ones():
    each, record = problem("psmnet_train_64_32"), variant("forward_torch_native")

    def timing(ms: float, source: str) -> Timing:
        return Timing(str(each), "forward", record.name, {}, source, "screen", {}, median_ms=ms)

    before, now = timing(1.0, "before"), timing(2.0, revision(record))
    assert [one.ms for one in calibrate.samples([before], [each], {})] == [1.0]
    assert [one.ms for one in calibrate.samples([before, now], [each], {})] == [2.0]


@needs_triton
def test_launches_take_what_was_measured_of_them():
    each, one = problem("psmnet_train_64_32"), guess(NAME, problem("psmnet_train_64_32"))
    limits = dataclasses.replace(GPU, factors={model.FIRST_LAUNCH: 0.5, model.FURTHER_LAUNCH: 0.25})
    launch, less = GPU.launch_us * 1e-3, guess(NAME, each, limits)
    assert one.ms - less.ms == pytest.approx(launch * (0.5 + 0.75 * (one.work.launches - 1)))
    assert model.launches_ms(3, limits) == pytest.approx(launch)


def test_nothing_timed_corrects_nothing():
    assert calibrate.factors(calibrate.counts([], GPU), GPU) == {}
    assert calibrate.factors(calibrate.counts(measured("forward_torch_native", 2.0, LEAST - 1), GPU), GPU) == {}
    assert calibrate.factors(calibrate.counts(measured("forward_torch_native", 2.0, LEAST), GPU), GPU) == {
        kind("forward_torch_native"): pytest.approx(2),
        "torch": pytest.approx(2),
    }


def test_samples_are_of_the_variants_as_they_are_now_and_of_these_problems():
    each, other = problem("psmnet_train_64_32"), problem("psmnet_kitti_64_64")
    record = variant("forward_torch_native")

    def timing(text, name=record.name, source=None, stage="screen", versions=(), **more) -> Timing:
        own = source or revision(record)
        return Timing(text, "forward", name, {}, own, stage, dict(versions), **{"median_ms": 1.0, **more})

    kept = timing(str(each), median_ms=3.0)
    left = [timing(str(other)), timing(str(each), name="forward_gone"), timing(str(each), source="another"),
            timing(str(each), status="failed", median_ms=None), timing(str(each), stage="final"),
            timing(str(each), versions={"triton": "3.0"})]  # fmt: skip
    assert calibrate.samples([kept, *left], [each], {}) == [Sample(record, each, {}, 3.0)]


def test_the_hosts_times_are_medians_of_single_calls_by_variant_and_by_backend():
    def timing(name, host_ms, pass_name="forward", versions=(), **more) -> Timing:
        return Timing("", pass_name, name, {}, "", "screen", dict(versions), host_ms=host_ms, **more)

    own, other = "forward_torch_native", "forward_torch_phases"
    kept = [*(timing(own, ms) for ms in (0.1, 0.3, 0.2)), *(timing(other, ms) for ms in (2.0, 1.0))]
    left = [timing(own, 9.0, status="wrong"), timing(own, None), timing(own, 9.0, "forward_backward"),
            timing(own, 9.0, versions={"triton": "3.0"}), timing("forward_gone", 9.0)]  # fmt: skip
    found = calibrate.host_times([*kept, *left], {})
    assert found == {own: 0.2, "forward torch": 0.3}
    if registry.have_triton():  # the kernels of a pass have one time
        kernels = "forward_phases", "forward_gather", "forward_phases"
        both = calibrate.host_times([timing(name, ms) for name, ms in zip(kernels, (0.5, 0.1, 0.3), strict=True)], {})
        assert (
            both == {"forward triton": 0.3}
            and model.host_ms(variant("forward_gather"), dataclasses.replace(GPU, host_ms=both)) == 0.3
        )
    known = dataclasses.replace(GPU, host_ms=found)
    assert model.host_ms(variant(own), known) == 0.2 and model.host_ms(variant(other), known) == 0.3
    assert model.host_ms(variant(own), GPU) == model.host_ms(variant("backward_data_torch_native"), known) == 0.0


@needs_triton
def test_a_tuning_run_corrects_its_predictions_by_what_it_timed_and_keeps_older_factors(tmp_path):
    found = measured(NAME, 2.0, LEAST)
    session = Session(CUDA)
    session.versions = {}
    session.journal, session.ceilings = Journal("a GPU", tmp_path), dataclasses.replace(GPU, factors={"triton": 9.0})
    for one in found[1:]:
        session.journal.add(timing_of(one))
    tasks = tasks_of([one.problem for one in found])
    session._calibrate(tasks)
    assert session.ceilings.factors == {"triton": 9.0}
    session.journal.add(timing_of(found[0]))
    session._calibrate(tasks)
    assert session.ceilings.factors == pytest.approx({kind(NAME): 2.0, "triton": 2.0})


def timing_of(one: Sample) -> Timing:
    record = one.record
    return Timing(str(one.problem), record.pass_name, record.name, one.config, revision(record), "screen", {},
                  median_ms=one.ms, p20_ms=one.ms, p80_ms=one.ms)  # fmt: skip


def test_roofs_that_are_measured_again_keep_the_factors(tmp_path):
    found = dataclasses.replace(GPU, measured=True, factors={"forward_phases": 2.0, "triton": 1.5})
    calibrate.keep(found, CPU, tmp_path)
    calibrate.keep(dataclasses.replace(GPU, measured=True, memory=1e12, factors={"triton": 1.25}), CPU, tmp_path)
    kept = ceilings.from_json(store.read(device_name(CPU), tmp_path).ceilings)
    assert kept.memory == 1e12 and kept.factors == {"forward_phases": 2.0, "triton": 1.25}
    calibrate.keep_factors({"torch": 3.0}, CPU, tmp_path)
    both = ceilings.from_json(store.read(device_name(CPU), tmp_path).ceilings)
    assert both.memory == 1e12 and both.factors == {"forward_phases": 2.0, "triton": 1.25, "torch": 3.0}
    calibrate.keep_factors({}, CPU, tmp_path, {"forward triton": 0.05, "forward_phases": 0.04})
    calibrate.keep(dataclasses.replace(GPU, host_ms={"forward triton": 0.06}), CPU, tmp_path)
    kept = ceilings.from_json(store.read(device_name(CPU), tmp_path).ceilings)
    assert kept.factors == both.factors and kept.host_ms == {"forward triton": 0.06, "forward_phases": 0.04}
    calibrate.keep_factors({"torch": 3.0}, CPU, tmp_path / "nothing measured")
    assert store.read(device_name(CPU), tmp_path / "nothing measured").ceilings is None


def test_tuners_that_end_at_the_same_time_keep_the_factors_of_all(tmp_path):
    calibrate.keep(dataclasses.replace(GPU, measured=True), CPU, tmp_path)
    together = threading.Barrier(8)

    def end(number: int) -> None:
        together.wait(60)
        calibrate.keep_factors({f"kind {number}": 1.0 + number}, CPU, tmp_path)

    with ThreadPoolExecutor(8) as tuners:
        list(tuners.map(end, range(8)))
    kept = ceilings.from_json(store.read(device_name(CPU), tmp_path).ceilings)
    assert kept.factors == {f"kind {number}": 1.0 + number for number in range(8)}


@needs_triton
def test_a_run_puts_back_no_factor_that_it_only_read(tmp_path, monkeypatch):
    """Another run may have corrected it since."""
    monkeypatch.setattr(session, "versions_of", lambda device: {})
    # torch's own tests, which others here import, freeze its switches.
    monkeypatch.setattr(session.gpu, "cudnn_benchmark", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(session, "device_name", lambda device: device_name(CPU))
    monkeypatch.setattr(calibrate, "device_name", lambda device: device_name(CPU))
    found = measured(NAME, 2.0, LEAST)
    before = {"triton": 9.0, "torch": 9.0}
    calibrate.keep(dataclasses.replace(GPU, measured=True, factors=before), CPU, tmp_path)

    def corrected(run, waiting, *args) -> bool:
        calibrate.keep_factors({"torch": 1.5}, CPU, tmp_path)  # by the other run
        for one in found:
            run.journal.add(dataclasses.replace(timing_of(one), host_ms=0.05))
            with_relu = str(dataclasses.replace(one.problem, epilogue=Epilogue("relu")))
            run.journal.add(dataclasses.replace(timing_of(one), problem=with_relu, host_ms=0.5))
        return False

    monkeypatch.setattr(Session, "_all", corrected)
    run = Session(CUDA, tmp_path, compiler=Precompiler(None))
    run.run(tasks_of([one.problem for one in found]), Progress())
    kept = ceilings.from_json(store.read(device_name(CPU), tmp_path).ceilings)
    assert kept.factors == pytest.approx({kind(NAME): 2.0, "triton": 2.0, "torch": 1.5})
    assert kept.host_ms == dict.fromkeys(model.hosts_of(variant(NAME)), 0.05)  # of the plain layers alone


def test_ceilings_without_factors_are_read_and_broken_ones_are_not():
    data = json.loads(json.dumps(GPU.to_json()))
    data.pop("factors")
    assert ceilings.from_json(data) == GPU
    for broken in ({"forward_phases": 0}, {"forward_phases": "2"}, ["forward_phases"]):
        assert ceilings.from_json({**data, "factors": broken}) is None
