"""cuDNN's graph API as a contestant: the transposed convolution and its bias as one fused graph (data gradient, add).

torch calls cuDNN for the product alone and adds the bias in a pass of its own; this is the stronger baseline. It needs
the package nvidia-cudnn-frontend and a GPU. The weight is laid out as cuDNN wants it before the timing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from tritonconv.lab.bench.calls import TensorCall, Tensors
from tritonconv.problem import LAYOUTS, Problem

NAME = "cudnn_graph"
MODULE, PACKAGE = "cudnn", "nvidia-cudnn-frontend"
TYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}


def why_not(problem: Problem, device: torch.device, pass_name: str) -> str | None:
    """Why it does not run; None where it may. Whether cuDNN has a plan is found by building one."""
    if device.type != "cuda":
        return "cuDNN needs a GPU"
    if importlib.util.find_spec(MODULE) is None:
        return f"not installed: pip install {PACKAGE}"
    if pass_name != "forward":
        return "only the forward has a bias to be fused"
    if problem.epilogue is not None:
        return "its graph ends with the bias"
    if problem.dtype not in TYPES:
        return f"no graph for {problem.dtype}"
    return None if problem.torch_crop.exact else "cuDNN has one padding for both ends"


def call(problem: Problem, tensors: Tensors, device: torch.device) -> TensorCall:
    """The call, its plan built. Raises RuntimeError, also cuDNN's, where there is no plan for the problem."""
    cudnn: Any = importlib.import_module(MODULE)
    handle = cudnn.create_handle()
    kind = getattr(cudnn.data_type, TYPES[problem.dtype])
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )  # fmt: skip
    weight = tensors.weight.contiguous(memory_format=LAYOUTS[problem.layout])
    given = {"x": tensors.x, "weight": weight}
    if tensors.bias is not None:
        given["bias"] = tensors.bias.view(1, -1, 1, 1, 1)

    def likeness(name: str, tensor: torch.Tensor) -> Any:
        return graph.tensor(name=name, dim=list(tensor.shape), stride=list(tensor.stride()), data_type=kind)

    nodes = {name: likeness(name, tensor) for name, tensor in given.items()}
    stride, padding, _, _, dilation = problem.torch_arguments
    y = torch.empty(problem.y_shape, dtype=problem.dtype, device=device, memory_format=LAYOUTS[problem.layout])
    # A transposed convolution is the data gradient of a convolution whose output is x; the size of y says the rest.
    node = graph.conv_dgrad(loss=nodes["x"], filter=nodes["weight"], padding=list(padding), stride=list(stride),
                            dilation=list(dilation), name="transposed")  # fmt: skip
    node.set_dim(list(y.shape)).set_stride(list(y.stride()))
    if "bias" in nodes:
        node = graph.bias(name="add", input=node, bias=nodes["bias"])
        node.set_dim(list(y.shape)).set_stride(list(y.stride()))
    node.set_output(True).set_data_type(kind)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    operands = {nodes[name]: tensor for name, tensor in given.items()}

    def run() -> tuple[torch.Tensor]:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        out = torch.empty_like(y)
        graph.execute({**operands, node: out}, workspace, handle=handle)
        return (out,)

    return run
