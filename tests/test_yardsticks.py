"""Yardsticks beside the layers: a copy of the same bytes, torch's peak memory, ATen's bias passes, cuDNN's graph."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.test_results import ENVIRONMENT, result
from tritonconv.lab import cli
from tritonconv.lab.bench import bias_rates, cudnn_graph, memory, results, same_traffic
from tritonconv.lab.bench.calls import make_tensors, work
from tritonconv.lab.bench.operations import torch_call
from tritonconv.lab.bench.results import Writer, read
from tritonconv.lab.bench.summary import summary
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import Problem

CPU = torch.device("cpu")
TINY = "monai_unet_spleen_32_2"


def small(bias: bool = True, layout: str = "ndhwc", dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(n=1, c_in=3, c_out=2, size=(2, 3, 4), kernel=(3, 3, 3), stride=(2, 2, 2), crop=(1, 1, 1),
                   out_size=(4, 6, 8), dtype=dtype, layout=layout, bias=bias)  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_copy_of_the_same_bytes_runs_beside_the_contestants(tmp_path, capsys):
    command = ["bench", "--only", TINY, "--passes", "forward", "--layout", "ncdhw", "--quiet", "--copies",
               "--cudnn-graph", "--output", str(tmp_path)]  # fmt: skip
    assert cli.main(command) == 0
    run = results.read(results.latest(tmp_path))
    assert [row["variant"] for row in run.results] == ["torch", "tritonconv"]
    assert same_traffic.NAME not in {row["variant"] for row in run.nulls}
    for row in run.results:
        assert row["copy_ms"] > 0 and row["percent_of_copy"] > 0
    assert [(row["variant"], row["message"]) for row in run.skips] == [(cudnn_graph.NAME, "cuDNN needs a GPU")]
    assert "as fast as a copy of the same bytes, forward float32: torch " in capsys.readouterr().out
    problem = workload(TINY).problem(scale="cpu")
    (target,) = same_traffic.call(problem, CPU, "forward")()
    assert 0 <= work(problem, "forward")[1] - 2 * target.numel() * target.element_size() < 8


def test_peak_memory_is_held_against_torchs(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
        for layer, ours in (("a", 95), ("b", 105), ("c", 130)):
            writer.write("result", result(layer, "torch", 1.0, peak_bytes=100))
            writer.write("result", result(layer, "tritonconv", 2.0, peak_bytes=ours))
        writer.write("result", result("d", "tritonconv", 2.0, peak_bytes=900))  # torch's is not known
    run = read(writer.path)
    head, worst = memory.lines(run)
    assert "most 1.300: 1 of 3 above 1.05" in head and worst.split() == ["1.30", "c", "forward", "float32", "ncdhw"]
    assert head in summary(run)
    run.results = [row for row in run.results if row["layer"] not in "c"]
    assert memory.lines(run) == [memory.lines(run)[0]] and memory.lines(run)[0].endswith("no layer above 1.05")
    run.results = [{**row, "peak_bytes": None} for row in run.results]
    assert memory.lines(run) == []


def test_bias_passes_are_atens_and_count_their_bytes(monkeypatch):
    monkeypatch.setitem(bias_rates.SHAPES, "cpu", (1, 2, 3, 4, 5))
    moved = []
    monkeypatch.setattr(bias_rates.roofs, "times_of", lambda call, watch, seconds: [call().numel() * 1.0])
    monkeypatch.setattr(bias_rates.roofs, "row_of", lambda name, text, dtype, size, unit, times: moved.append(
        (name, size, times, text)))  # fmt: skip
    list(bias_rates.measure(CPU, [torch.float32], 0.0))
    assert [one[:3] for one in moved] == [("bias_add", 960, [120.0]), ("bias_gradient", 480, [2.0])] * 2
    assert moved[3][3] == "ATen's bias gradient, 1x2x3x4x5 float32 ndhwc"


class Node:
    """A tensor of the stand-in's graph: its value follows from those of others."""

    def __init__(self, value, **facts):
        self.value, self.facts = value, facts

    def __getattr__(self, name):
        def keep(value):
            self.facts[name.removeprefix("set_")] = value
            return self

        return keep


class Graph:
    """As much of cuDNN's graph as the contestant uses, by torch."""

    def __init__(self, **types):
        self.types, self.built = types, []

    def tensor(self, name, dim, stride, data_type):
        return Node(lambda given, node=None: given[node], dim=dim, stride=stride, data_type=data_type)

    def conv_dgrad(self, loss, filter, padding, stride, dilation, name):
        def value(given, node):
            size = node.facts["dim"]
            return torch.nn.grad.conv3d_input(size, given[filter], given[loss], stride, padding, dilation)

        return Node(value)

    def bias(self, name, input, bias):
        return Node(lambda given, node: input.value(given, input) + given[bias])

    def get_workspace_size(self):
        return 16

    def execute(self, given, workspace, handle):
        (out,) = [node for node in given if node.facts.get("output")]
        assert workspace.numel() == 16 and handle == "handle" and self.built[-1] == "build_plans"
        given[out].copy_(out.value(given, out))

    def __getattr__(self, name):
        return lambda *arguments: self.built.append(name)


def test_cudnns_graph_is_the_data_gradient_and_the_bias(monkeypatch):
    cudnn = ModuleType("cudnn")
    cudnn.__spec__ = ModuleSpec("cudnn", None)
    cudnn.pygraph, cudnn.create_handle, cudnn.set_stream = Graph, lambda: "handle", lambda handle, stream: None
    cudnn.data_type = SimpleNamespace(FLOAT="float", HALF="half", BFLOAT16="bfloat16")
    cudnn.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1))
    for bias in (True, False):
        problem = small(bias)
        tensors = make_tensors(problem, CPU, 0)
        run = cudnn_graph.call(problem, tensors, CPU)
        (mine,), (want,) = run(), torch_call(problem, tensors, "forward")()
        torch.testing.assert_close(mine, want)
        assert mine.is_contiguous(memory_format=torch.channels_last_3d) and run()[0].data_ptr() != mine.data_ptr()
    gpu = torch.device("cuda")
    assert cudnn_graph.why_not(small(), CPU, "forward") == "cuDNN needs a GPU"
    assert "only the forward" in cudnn_graph.why_not(small(), gpu, "backward_data")
    assert cudnn_graph.why_not(small(dtype=torch.float64), gpu, "forward") == "no graph for torch.float64"
    monkeypatch.setattr(cudnn_graph.importlib.util, "find_spec", lambda name: None)
    assert cudnn_graph.why_not(small(), gpu, "forward") == "not installed: pip install nvidia-cudnn-frontend"
