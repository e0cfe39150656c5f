"""The cost model: what variants say they execute, estimates, pruning, ceilings, and the command. No GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from tritonconv.autotune import ceilings, choose, model, serving
from tritonconv.autotune.ceilings import Ceilings
from tritonconv.autotune.choose import Source
from tritonconv.autotune.first import first
from tritonconv.autotune.key import Key
from tritonconv.autotune.serving import Part
from tritonconv.autotune.sources import revision
from tritonconv.autotune.store import Entry, Table
from tritonconv.autotune.tuning.candidates import candidates
from tritonconv.autotune.tuning.session import EFFORTS, WHOLE
from tritonconv.kernels import registry
from tritonconv.kernels.registry import variant, variants
from tritonconv.lab import cli
from tritonconv.lab.bench.workloads import distinct, workload, workloads
from tritonconv.problem import Problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = Ceilings("a GPU", {"float32": 60e12, "tf32": 400e12, "bfloat16": 800e12, "float16": 800e12}, 60e12, 3e12, 6e12,
               132, 228 * 1024, 65536, 4.0)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32)


def problem(layer: str, dtype=torch.bfloat16, layout: str = "ndhwc") -> Problem:
    return workload(layer).problem(dtype, layout)


def layers(dtype, layout) -> list[Problem]:
    return [layer.problem(dtype, layout) for layer, _ in distinct(workloads())]


def triton(pass_name: str | None = None):
    return [record for record in variants(pass_name) if record.backend == "triton"]


@pytest.fixture(autouse=True)
def compiled():
    """Triton variants are asked on behalf of a GPU, with TF32 as torch has it for convolutions there."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        yield


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_variant_has_a_finite_estimate_of_every_config_it_may_run(dtype, layout):
    seen = set()
    for each in layers(dtype, layout):
        for record in variants():
            if record.supports(each, CUDA if record.backend == "triton" else CPU) is not None:
                continue
            useful = each.flops
            for config in record.space(each, CUDA)[::5]:
                work = model.work_of(record, each, config)
                assert work.flops >= 0.999 * useful, (record.name, str(each), config)
                assert work.cache_bytes >= work.memory_bytes >= each.bytes(record.pass_name), (record.name, str(each))
                assert work.launches >= 1
                guess = model.estimate(record, each, config, GPU)
                assert guess.ms > 0 and (guess.ms < math.inf or guess.limit == "shared memory")
            seen.add(record.name)
    assert len(seen) >= len(variants()) - 6


@pytest.mark.skipif(not registry.have_triton(), reason="needs Triton")
class TestTheKernels:
    def ms(self, name: str, each: Problem, **changes) -> float:
        record = variant(name)
        return model.estimate(record, each, {**record.default(each, CUDA), **changes}, GPU).ms

    def test_a_gather_executes_what_its_masks_throw_away(self):
        each = problem("psmnet_train_64_32")
        gather, phases = (variant(name) for name in ("forward_gather", "forward_phases"))
        ratio = (
            model.work_of(gather, each, gather.default(each, CUDA)).flops
            / model.work_of(phases, each, phases.default(each, CUDA)).flops
        )
        assert 6 < ratio < 10  # stride 2: eight times the products
        assert self.ms("forward_gather", each) > 2 * self.ms("forward_phases", each)

    def test_the_shuffle_is_best_where_kernel_is_stride(self):
        each = problem("segresnet_deconv_up2")
        served = [record.name for record in triton("forward") if record.supports(each, CUDA) is None]
        assert "forward_phases" in served
        assert min(served, key=lambda name: self.ms(name, each)).startswith("forward_shuffle")

    def test_splits_fill_the_machine(self):
        each = problem("segresnet_deconv_up2")
        default = variant("backward_weight_splitk").default(each, CUDA)
        assert default["SPLITS"] > 16
        assert self.ms("backward_weight_splitk", each, SPLITS=1) > 4 * self.ms("backward_weight_splitk", each)

    def test_depthwise_is_bound_by_memory_or_its_launch_not_by_a_matrix_unit(self):
        each = problem("mednext_k5_dw_64")
        record = variant("forward_depthwise")
        guess = model.estimate(record, each, record.default(each, CUDA), GPU)
        assert guess.limit in ("vector", "memory", "cache", "sram", "issue", "launch") and not guess.work.matrix

    def test_a_larger_problem_never_costs_less(self):
        small = problem("psmnet_train_64_32")
        large = dataclasses.replace(small, n=4 * small.n)
        for record in triton():
            if record.supports(small, CUDA) is None and record.supports(large, CUDA) is None:
                config = record.default(small, CUDA)
                assert model.estimate(record, large, config, GPU).ms >= model.estimate(record, small, config, GPU).ms, (
                    record.name
                )

    def test_more_shared_memory_than_a_multiprocessor_has_cannot_run(self):
        each = problem("psmnet_train_64_32")
        assert self.ms("forward_phases", each, BLOCK_M=256, BLOCK_N=256, BLOCK_K=256, num_stages=4) == math.inf

    def test_candidates_are_a_dozen_with_the_default_among_them_best_first(self):
        each = problem("psmnet_train_64_32")
        for record in triton("forward"):
            if record.supports(each, CUDA) is None:
                found = model.candidates(record, each, CUDA, GPU)
                times = [guess.ms for _, guess in found]
                assert len(found) <= 12 and times == sorted(times)
                assert record.default(each, CUDA) in [config for config, _ in found]
                assert len(model.candidates(record, each, CUDA, GPU, most=3)) <= 3

    def test_two_candidates_load_through_a_pipeline_and_without_one(self):
        each, record = problem("psmnet_train_64_32"), variant("forward_phases")
        for most in (2, 3, 12):
            found = model.candidates(record, each, CUDA, GPU, most)
            assert {guess.work.pipelined for _, guess in found[:most]} == {True, False}
        tiles = {(config["BLOCK_M"], config["BLOCK_N"]) for config, _ in model.candidates(record, each, CUDA, GPU)}
        assert len(tiles) > 1

    def test_cells_load_less_for_the_weight_gradient_of_few_channels_and_more_for_many(self):
        few, many = problem("igev_16_8"), problem("vqvae3d_256_256")
        cells, taps = variant("backward_weight_cells"), variant("backward_weight_splitk")

        def least(record, each) -> float:
            return min(guess.work.cache_bytes for _, guess in model.candidates(record, each, CUDA, GPU))

        assert least(cells, few) < least(taps, few) / 2
        assert least(cells, many) > least(taps, many)

    def test_tiles_of_cells_without_a_tap_are_not_counted(self):
        each, record = problem("psmnet_train_64_32"), variant("backward_weight_cells")
        base = record.default(each, CUDA)
        # 64 channels: one delta of a tile; 4 phases of 32 channels: one phase of d. Along d 3 of 4 pairs have a tap.
        work = model.work_of(record, each, {**base, "BLOCK_M": 128, "BLOCK_N": 64})
        single = model.work_of(record, each, {**base, "BLOCK_M": 32, "BLOCK_N": 64})
        assert work.flops / single.flops == pytest.approx(48 / 27)

    def test_narrow_loads_and_torn_sectors_of_ncdhw_cost_more(self):
        last, first = (problem("psmnet_train_64_32", layout=layout) for layout in ("ndhwc", "ncdhw"))
        for name in ("forward_phases", "backward_data_gemm", "backward_weight_splitk"):
            config = {**variant(name).default(first, CUDA), "BLOCK_W": 32}
            works = [model.work_of(variant(name), each, config) for each in (last, first)]
            assert works[0].sram_bytes < works[1].sram_bytes, name

    def test_triton_candidates_are_those_that_the_model_does_not_rule_out_and_more_with_each_effort(self):
        each = problem("psmnet_train_64_32")
        efforts = (*EFFORTS, WHOLE)
        fields = [candidates(each, CUDA, "forward", GPU, effort) for effort in efforts]
        for effort, field in zip(efforts, fields, strict=True):
            least = min(one.predicted_ms for one in field if one.selection.variant.backend == "triton")
            names = [one.selection.variant.name for one in field]
            assert all(one.predicted_ms <= effort.far * least for one in field)
            assert max(names.count(name) for name in names) <= effort.configs
            assert "forward_phases" in names and ("forward_torch_native" in names) == effort.formulations
        labels = [{one.label for one in field} for field in fields]
        assert labels[0] < labels[1] < labels[2]
        # A kernel that executes eight products for each one that counts is no candidate at first.
        assert not any("forward_gather" in label for label in labels[0])

    def test_the_model_is_the_default_on_a_gpu_that_it_was_held_against(self, monkeypatch):
        monkeypatch.setattr(choose, "_firsts", {})
        measured = dataclasses.replace(GPU, measured=True).to_json()
        each = problem("segresnet_deconv_up2", layout="ncdhw")
        monkeypatch.setattr(serving, "part", lambda device: Part("gpu", (8, 0), 108))
        monkeypatch.setattr(choose, "sources_of", lambda device: (Source(Table("gpu", {}, measured)),))
        assert choose.choose(each, CUDA, "forward").variant.name == "forward_torch_native"
        monkeypatch.setattr(serving, "part", lambda device: Part("gpu", (9, 0), 132))
        found = choose.choose(each, CUDA, "forward")
        assert found.variant.backend == "triton" and "cost model" in found.reason
        assert found[:2] == first(each, CUDA, "forward", choose.ceilings_of(CUDA))[:2]

    def test_a_neighbours_choice_that_the_model_rules_out_is_not_taken(self, monkeypatch):
        each = problem("psmnet_train_64_32", layout="ncdhw")
        near = dataclasses.replace(each, n=2 * each.n)
        measured = dataclasses.replace(GPU, measured=True).to_json()

        def chosen_with(name: str) -> str:
            record = variant(name)
            config = dict(record.default(near, CUDA))
            entry = Entry(name, config, 1.0, 2.0, revision(record), "", "forward", "2026-01-01", {})
            table = Table("gpu", {str(Key.of(near, "forward")): entry}, measured)
            monkeypatch.setattr(choose, "sources_of", lambda device: (Source(table),))
            monkeypatch.setattr(serving, "part", lambda device: Part("gpu", (9, 0), 132))
            monkeypatch.setattr(choose, "_firsts", {})
            return choose.choose(each, CUDA, "forward").variant.name

        likely = next(r.name for r, *_ in model.rank(each, CUDA, "forward", GPU) if r.backend == "triton")
        assert chosen_with(likely) == likely
        assert chosen_with("forward_gather") != "forward_gather"  # eight times the products

    def test_an_empty_batch_beside_a_tuned_size_costs_nothing(self, monkeypatch):
        each = dataclasses.replace(problem("psmnet_train_64_32"), size=(1, 1, 1), out_size=(2, 2, 2), n=1)
        record = variant("forward_phases")
        config = {**record.default(each, CUDA), "num_stages": 1}
        entry = Entry(record.name, config, 1.0, 2.0, revision(record), "", "forward", "2026-01-01", {})
        table = Table("gpu", {str(Key.of(each, "forward")): entry}, dataclasses.replace(GPU, measured=True).to_json())
        monkeypatch.setattr(choose, "sources_of", lambda device: (Source(table),))
        empty = dataclasses.replace(each, n=0)
        assert choose.choose(empty, CUDA, "forward").variant.name == "forward_torch_native"
        assert model.estimate(record, empty, config, GPU).ms < 1


# ------------------------------------------------------------------ ceilings


def roof(name: str, value: float, dtype: str | None = None) -> dict:
    return {"name": name, "value": value, "dtype": dtype}


def test_ceilings_come_from_roofs_the_best_of_each():
    rows = [roof("copy_memory", 1e10), roof("copy_memory", 2e10), roof("copy_cache", 9e10), roof("launch", 7.0)]
    rows += [roof("launch", 5.0), roof("matmul", 3e11, "float32")]
    found = ceilings.from_roofs(rows, {"device_name": "a box"}, CPU)
    assert (found.memory, found.cache, found.launch_us, found.matrix["float32"]) == (2e10, 9e10, 5.0, 3e11)
    assert found.measured and found.device == "a box"
    assert ceilings.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert ceilings.from_roofs(rows[:2], {"device_name": "a box"}, CPU) is None
    assert not ceilings.nominal(CPU).measured


def test_what_l2_hands_out_is_measured_or_assumed():
    rows = [roof("copy_memory", 4e12), roof("matmul", 8e14, "bfloat16")]
    assert ceilings.from_roofs(rows, {"device_name": "a GPU"}, CUDA).cache == 8e12
    assert ceilings.from_roofs([*rows, roof("copy_l2", 6e12)], {"device_name": "a GPU"}, CUDA).cache == 6e12


@pytest.mark.parametrize("data", [{}, {"device": "x"}, {**GPU.to_json(), "memory": 0}, {**GPU.to_json(), "more": 1}])
def test_ceilings_that_are_none_are_not_read(data):
    assert ceilings.from_json(data) is None


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize(
    ("predicted", "measured", "value"),
    [([1, 2, 3], [10, 20, 30], 1.0), ([3, 2, 1], [10, 20, 30], -1.0), ([1, 1, 1], [1, 2, 3], 0.0),
     ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138)],
)  # fmt: skip
def test_spearmans_correlation(predicted, measured, value):
    assert model.correlation(predicted, measured) == pytest.approx(value)


def test_the_command_reports_the_correlation_of_a_file(tmp_path, capsys):
    each = workload("vnet_up3").problem(scale="cpu")
    sizes = ("n", "c_in", "c_out", "size", "kernel", "stride", "crop", "out_size", "dilation", "groups", "bias")
    head = {"kind": "timing", "layer": "vnet_up3", "suite": "unet", "pass": "forward", "dtype": "float32",
            "layout": "ncdhw", "config": {}, "stage": "screen", "n_runs": 3, "predicted_ms": None, "speedup": 1.0,
            "problem": {name: getattr(each, name) for name in sizes}}  # fmt: skip
    environment = {"kind": "environment", "schema": 1, "run": "r", "utc": "", "device": "cpu", "device_name": "a box",
                   "threads": 1, "torch": "2", "triton": None, "scale": "cpu", "scale_rule": "",
                   "commit": None}  # fmt: skip
    names = [record.name for record in variants("forward") if record.backend == "torch"
             and record.supports(each, CPU) is None]  # fmt: skip
    ranked = sorted(names, key=lambda name: model.estimate(variant(name), each, {}, ceilings.nominal(CPU)).ms)
    rows = [environment]
    for index, name in enumerate(ranked, start=1):
        rows.append({**head, "variant": name, "median_ms": index, "p20_ms": index, "p80_ms": index})
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(path), "--model"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[2:4] == ["forward", "1"] and float(line[4]) > 0.9
    path.write_text(json.dumps(environment) + "\n")
    assert cli.main(["report", str(path), "--model"]) == 2
    assert "tritonconv tune" in capsys.readouterr().err


def test_passes_without_a_count_of_their_own_use_the_problems(monkeypatch):
    bare = dataclasses.replace(variant("forward_torch_phases"), work=None)
    each = workload("vnet_up3").problem(scale="cpu")
    work = model.work_of(bare, each, {})
    assert (work.flops, work.memory_bytes, work.launches) == (each.flops, each.bytes(), 1)
