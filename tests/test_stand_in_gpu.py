"""Code that runs only beside a GPU, beside a stand-in for one (stand_in_gpu.py); each test in a process of its own.

A campaign from its first step to its last, training steps, and one case of each of the tests for a GPU.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import stand_in_gpu
import stand_in_ncu
from stand_in_process import python_beside, script

from tritonconv.kernels.registry import variant
from tritonconv.lab.bench import results
from tritonconv.problem import PASSES

TESTS = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: test_gpu.py asks it"),
    pytest.mark.skipif(shutil.which(stand_in_gpu.COMPILER) is None, reason=f"needs {stand_in_gpu.COMPILER}"),
]
SHARED = "forward_shuffle+backward_data_fused+backward_weight_fused"


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Runs Python with arguments in a process that may have the stand-in: (exit code, standard output)."""
    run_python = python_beside(tmp_path_factory.mktemp("stand_in_gpu"))

    def run(*arguments: object) -> tuple[int, str]:
        done = run_python(*arguments)
        print(done.stdout, done.stderr, sep="\n")  # pytest shows it where the test fails
        return done.returncode, done.stdout

    return run


def test_a_campaign_goes_through_all_its_steps(beside, tmp_path, ncu):
    layer = "segresnet_deconv_up2"
    asked = ("--suite", "unet", "--only", layer, "--dtype", "float16", "--scale", "cpu", "--no-compile", "--quiet")
    asked = ("--seconds", stand_in_gpu.SECONDS, "--out", tmp_path, "--no-install", *asked)
    command = (TESTS / "stand_in_gpu.py", "campaign", *asked)
    code, out = beside(*command)
    assert code == 0
    found = results.read(results.latest(tmp_path))
    assert (found.environment["device"], found.environment["device_name"]) == ("cuda", stand_in_gpu.NAME)
    assert found.end["reason"] == "complete" and not found.errors

    checked = {(row["pass"], row["layout"]) for row in found.checks if variant(row["variant"]).backend == "triton"}
    assert checked == {(name, layout) for name in PASSES for layout in ("ncdhw", "ndhwc")}
    assert {row["name"] for row in found.roofs} >= {"copy_memory", "launch", "matmul"}
    assert {(row["pass"], row["layout"]) for row in found.tuned} == checked
    assert {variant(row["variant"]).backend for row in found.tuned} == {"triton"}
    assert Counter(row["variant"] for row in found.results) == {"torch": 4, "tritonconv": 4}
    for row in found.results:
        assert row["timing"] == "gpu" and row["gpu_ms"] == row["median_ms"]
        assert (
            row["graph_ms"] == pytest.approx(row["gpu_ms"], rel=0.1) and 0 < row["wall_ms"] != row["gpu_ms"]
        )  # the host has its own clock
        assert row["sm_mhz"] == stand_in_gpu.MHZ and row["late_samples"] == 0
        if row["variant"] == "tritonconv":  # the choices that were tuned, as they are now
            last = {each["pass"]: each for each in found.tuned if each["layout"] == row["layout"]}
            assert row["chosen"] == {name: last[name]["variant"] for name in row["chosen"]}
            assert row["speedup"] > 1
    assert Counter(row["variant"] for row in found.overheads) == {"torch": 3, "tritonconv": 3}
    assert Counter(row["variant"] for row in found.nulls) == {"torch_again": 6, "torch_by_our_road": 6}  # two of tune
    assert all(row["gpu_speedup"] == pytest.approx(1, rel=0.02) for row in found.nulls)
    assert found.end["spent"].keys() >= {"verify", "roofs", "tune", "bench", "overhead"}
    assert sum(sum(kinds.values()) for kinds in found.end["spent"].values()) == pytest.approx(
        found.end["seconds"], rel=0.02
    )

    code, out = beside(*command)
    assert code == 0
    assert "verify: 0 answers" in out and "tune: 0 choices" in out and "bench: 0 of 0 cells, 4 known before" in out

    code, out = beside(TESTS / "stand_in_gpu.py", "profile", tmp_path, "--ncu", ncu, "--quiet")
    assert code == 0
    whole = results.load(tmp_path)
    assert {row["pass"]: row["variant"] for row in whole.profiles} == dict.fromkeys(
        ("forward", "forward_backward"), "tritonconv"
    )
    assert all(row["duration_us"] < stand_in_gpu.PRODUCT for row in whole.profiles)  # the tuned kernels, not torch's
    assert len(whole.results) == 8 and "times as fast as the best torch" in out


@pytest.fixture
def ncu(tmp_path_factory):
    return stand_in_ncu.install(tmp_path_factory.mktemp("ncu"))


def test_the_counters_of_a_layer_are_those_of_one_warm_call(beside, tmp_path, ncu):
    asked = ("--only", "segresnet_deconv_up2", "--dtype", "float16", "--layout", "ndhwc", "--scale", "cpu", "--quiet")
    named = ("--contestants", "torch,forward_shuffle", "--ncu", ncu, "--output", tmp_path)
    code, out = beside(TESTS / "stand_in_gpu.py", "profile", *asked, *named)
    assert code == 0
    (path,) = tmp_path.glob("profile-*.jsonl")
    rows = {row["variant"]: row for row in results.read(path).profiles}
    us = {name: row["duration_us"] for name, row in rows.items()}
    assert us["torch"] == stand_in_gpu.PRODUCT
    assert us["forward_shuffle"] == stand_in_gpu.LAUNCH  # so small a layer takes the weight as it is given
    assert rows["torch"]["counters"] == {"Duration [ns]": 1e6} and "a_kernel" in out


@pytest.mark.parametrize("step", ["campaign", "a call"])  # a campaign tunes and times
def test_all_is_asked_of_the_gpu_that_is_meant_though_another_is_the_current_one(beside, tmp_path, step):
    code, out = beside(
        *script(
            f"""
            import torch, tritonconv
            from pathlib import Path
            from tritonconv.lab.bench.progress import Progress
            from tritonconv.lab.bench.workloads import workload
            from tritonconv.lab import campaign, verification
            from tritonconv.kernels import triton_launch, triton_target
            from tritonconv.kernels.registry import variant
            from tritonconv.lab.bench.options import Options

            stand_in_gpu.shrink()
            verification.SAMPLE_LAYERS = {{"k2s2": "segresnet_deconv_up2"}}
            asked, layer, folder = set(), workload("segresnet_deconv_up2"), Path({str(tmp_path)!r})
            triton_target.target = triton_launch.target = lambda: asked.add(stand_in_gpu.now.device)
            stand_in_gpu.now.device = 7
            options = Options((layer,), ("forward",), (torch.float16,), ("ncdhw",), (variant("forward_phases"),),
                              device=stand_in_gpu.GPU, seconds=stand_in_gpu.SECONDS)
            if {step!r} == "campaign":
                assert campaign.Campaign(options, folder, Progress()).run().reason == "complete"
            else:
                x, weight = torch.randn(1, 4, 2, 2, 2).cuda(), torch.randn(4, 3, 2, 2, 2).cuda()
                with tritonconv.use("forward_phases"):
                    calls = [tritonconv.conv_transpose3d(x, weight, None, 2).cpu() for _ in range(2)]
                assert torch.equal(*calls)
            print(stand_in_gpu.now.device, *asked)
            """
        )
    )
    assert code == 0
    assert out.split()[-2:] == ["7", "0"]


def test_a_tensor_of_the_cpu_among_those_of_the_device_is_refused(beside):
    code, out = beside(
        *script(
            """
            import torch, tritonconv
            from tritonconv import Problem
            from tritonconv.kernels.registry import variant

            problem = Problem(1, 4, 4, (2, 3, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 6, 8))
            x, weight = torch.randn(problem.x_shape), torch.randn(problem.weight_shape)
            gather = variant("forward_gather")
            calls = [
                lambda x, weight: torch.conv_transpose3d(x, weight, None, 2),
                lambda x, weight: tritonconv.conv_transpose3d(x, weight, None, 2),
                lambda x, weight: gather.compute(problem, gather.default(problem, x.device), x, weight, None),
            ]
            for call in calls:
                assert call(x.cuda(), weight.cuda()).device == torch.device("cuda", 0)
                try:
                    call(x.cuda(), weight)
                except (RuntimeError, ValueError) as error:
                    print(error)
            """
        )
    )
    assert code == 0
    same, own, pointer = out.splitlines()
    assert "Expected all tensors to be on the same device" in same
    assert "weight is on cpu but input is on cuda:0" in own
    assert "cannot be accessed from Triton" in pointer


def test_a_training_step_is_torchs_on_the_cpu_also_when_it_is_replayed(beside):
    code, out = beside(
        *script(
            """
            import torch, tritonconv
            from tritonconv import dispatch

            theirs = torch.nn.ConvTranspose3d(4, 6, 3, 2, 1, 1)
            with torch.no_grad():
                for each in theirs.parameters():
                    each.random_(-3, 4)  # integers, for which every sum is exact
            ours = tritonconv.ConvTranspose3d(4, 6, 3, 2, 1, 1)
            ours.load_state_dict(theirs.state_dict())
            ours.cuda()
            for step in range(3):
                x, grad_y = (torch.randint(-3, 4, size).float() for size in ((1, 4, 2, 3, 2), (1, 6, 4, 6, 4)))
                seen = []
                for layer, device in ((theirs, "cpu"), (ours, "cuda")):
                    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
                    mine = x.clone().to(device).requires_grad_()
                    with tritonconv.use("forward_phases", "backward_data_gemm", "backward_weight_splitk"):
                        y = layer(mine)
                        optimizer.zero_grad()
                        y.backward(grad_y.to(device))
                    optimizer.step()
                    seen.append([y, mine.grad, *layer.parameters()])
                    assert all(each.device.type == device for each in seen[-1])
                assert all(torch.equal(right, each.cpu()) for right, each in zip(*seen, strict=True))
                replays = [each for plan in dispatch._by_problem.values() for each in plan.replays.values()]
                print(sum(each.counts.anew for each in replays), sum(each.counts.repeated for each in replays))
            """
        )
    )
    assert code == 0
    assert out.splitlines() == ["2 0", "2 2", "2 4"]  # the forward, and both gradients


def test_a_graph_makes_its_calls_again_and_waits_for_nothing(beside):
    code, out = beside(
        *script(
            """
            import torch
            from tritonconv.lab.bench.gpu import captured

            x, y, halves = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), torch.ones(3)
            replay = captured(lambda: y.copy_((x * 2).view(3, 1).squeeze(1)), x.device)
            x.fill_(5)
            replay()
            print(*y.cpu().tolist())
            for call in (lambda: x.sum().item(), lambda: x.cpu(), lambda: halves.cuda(), torch.cuda.synchronize):
                print(captured(call, x.device))
            """
        )
    )
    assert code == 0
    assert out.splitlines() == ["10.0 10.0 10.0", *["None"] * 4]


def test_the_tests_for_a_gpu_pass(beside):
    names = [
        f"test_gpu.py::test_a_training_step_in_a_cuda_graph[{SHARED}]",
        f"test_gpu.py::test_launches_follow_the_current_stream[{SHARED}]",
        "test_gpu.py::test_what_waits_for_the_gpu_is_not_captured_and_what_comes_after_is",
        "test_sanitize.py::test_exact[backward_weight_fused]",
        "test_nonfinite.py::test_a_kernel_loses_none_and_declares_where_it_has_more[forward_shuffle]",
    ]
    chosen = [TESTS / name for name in names]
    code, out = beside(TESTS / "stand_in_gpu.py", "pytest", "-p", "no:cacheprovider", *chosen)
    assert code == 0, out
    assert f"{len(names)} passed" in out


def test_those_of_captured_models_pass(beside):
    names = [
        f"test_a_captured_layer_is_bitwise_the_eager_one[{SHARED}]",
        f"test_two_streams_at_once[{SHARED}]",
        "test_a_captured_model_trains_bitwise_as_the_eager_one",
    ]
    chosen = [TESTS / f"test_graphed_gpu.py::{name}" for name in names]
    code, out = beside(TESTS / "stand_in_gpu.py", "pytest", "-p", "no:cacheprovider", *chosen)
    assert code == 0, out
    assert f"{len(chosen)} passed" in out


def test_those_of_large_tensors_pass_on_small_ones(beside):
    code, out = beside(
        *script(
            """
            import test_giants, test_gpu
            from tritonconv import Problem

            test_gpu.MOST_VOXELS = 4
            test_gpu.test_rounding_is_torchs_on_the_same_gpu("forward_shuffle", "float16")
            test_giants.BEYOND = 0
            test_giants.GIANT = {"k2 s2": Problem(1, 8, 8, (11, 2, 3), (2, 2, 2), (2, 2, 2), (0, 0, 0), (22, 4, 6))}
            test_giants.test_tensors_beyond_2_to_31_elements("k2 s2", "ndhwc")
            print(*(record.name for record in test_giants.judged("k2 s2", "ndhwc")))
            """
        )
    )
    assert code == 0, out
    assert {"forward_shuffle", "backward_data_fused", "backward_weight_splitk"} <= set(out.split())
