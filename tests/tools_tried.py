"""The tools and wrappers that ``tool_combinations.py`` tries, each as a function of a model and its inputs."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

Tensors = list[torch.Tensor]


class Net(nn.Module):
    """A convolution, the layer, a batch norm; ``sized`` asks for the layer's size by ``output_size``."""

    def __init__(self, layer: nn.ConvTranspose3d, sized: bool) -> None:
        super().__init__()
        self.enter = nn.Conv3d(layer.in_channels, layer.in_channels, 1)
        self.up = layer
        self.norm = nn.BatchNorm3d(layer.out_channels)
        self.sized, self.kernel, self.stride = sized, layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: torch.Tensor):
        x = self.enter(x)
        if self.sized:
            size: list[int] = []
            for axis in range(3):
                reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1 - 2 * self.padding[axis]
                size.append((x.size(axis + 2) - 1) * self.stride[axis] + reach)
            return self.norm(self.up(x, output_size=size))
        return self.norm(self.up(x))


@dataclass(frozen=True)
class Case:
    """A model with torch's layer, two inputs of different sizes, and how they are run."""

    model: Net
    x: torch.Tensor
    other: torch.Tensor
    dynamic: bool


Tool = Callable[[nn.Module, Case], Tensors]


def step(model: Callable, x: torch.Tensor, parameters: nn.Module) -> Tensors:
    """The answer, and the gradients of the input and the parameters."""
    leaf = x.clone().requires_grad_()
    parameters.zero_grad(set_to_none=True)
    y = model(leaf)
    y.double().square().sum().backward()
    gradients = [leaf.grad, *[p.grad for p in parameters.parameters()]]
    return [y.detach(), *[whole(gradient) for gradient in gradients if gradient is not None]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapped(wrap: Callable[[nn.Module], Callable], model: nn.Module, case: Case) -> Tensors:
    """A tool that keeps the model trainable."""
    tool = wrap(model)
    return step(tool, case.x, tool if isinstance(tool, nn.Module) else model)


def compiled(model: nn.Module, case: Case) -> Tensors:
    torch._dynamo.reset()
    tool = torch.compile(model, backend="aot_eager", dynamic=case.dynamic, fullgraph=True)
    return step(tool, case.x, model) + step(tool, case.other, model)


def exported(model: nn.Module, case: Case) -> Tensors:
    shapes = (dict.fromkeys((0, 2, 3, 4), torch.export.Dim.AUTO),) if case.dynamic else None
    program = torch.export.export(model, (case.x,), dynamic_shapes=shapes).module()
    return [program(case.x), *([program(case.other)] if case.dynamic else [])]


def onnx(model: nn.Module, case: Case) -> Tensors:
    import onnxruntime

    buffer = io.BytesIO()
    torch.onnx.export(model.float(), (case.x.float(),), buffer, dynamo=case.dynamic, verbose=False)
    run = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(run.run(None, {run.get_inputs()[0].name: case.x.float().numpy()})[0])]


def jit_trace(model: nn.Module, case: Case) -> Tensors:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        graph = torch.jit.trace(model, case.x)
    warned = sum(issubclass(each.category, torch.jit.TracerWarning) for each in said)
    return [graph(case.x), graph(case.other), torch.tensor(warned)]


def jit_script(model: nn.Module, case: Case) -> Tensors:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    graph = torch.jit.load(buffer)
    return [graph(case.x), graph(case.other)]


def fx(model: nn.Module, case: Case) -> Tensors:
    graph = torch.fx.symbolic_trace(model)
    leaves = sum(node.op == "call_module" for node in graph.graph.nodes)
    return [torch.tensor(leaves), *step(graph, case.x, graph), *step(graph, case.other, graph)]


def made_fx(model: nn.Module, case: Case) -> Tensors:
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = "symbolic" if case.dynamic else "real"
    return [make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(case.x)(case.x)]


def eager_quantized(model: nn.Module, case: Case) -> Tensors:
    model = nn.Sequential(quantization.QuantStub(), model.float(), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.QConfig(
        activation=quantization.default_observer, weight=quantization.default_weight_observer
    )
    quantization.prepare(model, inplace=True)(case.x.float())
    return [quantization.convert(model, inplace=True)(case.x.float())]


def fx_quantized(model: nn.Module, case: Case) -> Tensors:
    mapping = quantization.get_default_qconfig_mapping()
    prepared = quantize_fx.prepare_fx(model.float().eval(), mapping, (case.x.float(),))
    prepared(case.x.float())
    return [quantize_fx.convert_fx(prepared)(case.x.float())]


def fused(model: nn.Module, case: Case) -> Tensors:
    return [quantization.fuse_modules(model.eval(), [["up", "norm"]])(case.x)]


def counted(model: nn.Module, case: Case) -> Tensors:
    with FlopCounterMode(display=False) as counter:
        values = step(model, case.x, model)
    return [torch.tensor(counter.get_total_flops()), *values]


def autocast(model: nn.Module, case: Case) -> Tensors:
    with torch.autocast("cpu", torch.bfloat16):
        return [model.float().eval()(case.x.float())]


def averaged(model: nn.Module) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def per_sample(model: nn.Module, case: Case) -> Tensors:
    from torch.func import functional_call, grad, vmap

    model.eval()
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    return list(vmap(grad(loss), in_dims=(None, 0))(values, case.x).values())


def checkpointed(model: nn.Module) -> Callable:
    return lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def normed(model: Net) -> nn.Module:
    parametrizations.weight_norm(model.up, dim=1)
    return model


def thop(model: nn.Module, case: Case) -> Tensors:
    import thop

    return [torch.tensor(thop.profile(model, inputs=(case.x,), verbose=False))]


def ptflops(model: nn.Module, case: Case) -> Tensors:
    import ptflops

    size, same = tuple(case.x.shape[1:]), {"as_strings": False, "print_per_layer_stat": False}
    backend = "aten" if case.dynamic else "pytorch"
    return [torch.tensor(ptflops.get_model_complexity_info(model.float(), size, backend=backend, **same))]


def fvcore(model: nn.Module, case: Case) -> Tensors:
    from fvcore.nn import FlopCountAnalysis

    counter = FlopCountAnalysis(model, case.x).unsupported_ops_warnings(False)
    return [torch.tensor(counter.total())]


def torchinfo(model: nn.Module, case: Case) -> Tensors:
    import torchinfo

    found = torchinfo.summary(model, input_data=case.x, verbose=0)
    return [torch.tensor([found.total_mult_adds, found.total_params, found.total_output_bytes])]


TOOLS: dict[str, Tool] = {
    "torch.compile": compiled,
    "torch.export": exported,
    "torch.jit.trace": jit_trace,
    "torch.jit.script": jit_script,
    "torch.fx": fx,
    "make_fx": made_fx,
    "eager quantization": eager_quantized,
    "FX quantization": fx_quantized,
    "fuse_modules": fused,
    "FlopCounterMode": counted,
    "autocast": autocast,
    "torch.func": per_sample,
    "AveragedModel": partial(wrapped, averaged),
    "weights_only loading": partial(wrapped, reloaded),
    "checkpoint": partial(wrapped, checkpointed),
    "weight_norm": partial(wrapped, normed),
    "DDP": partial(wrapped, nn.parallel.DistributedDataParallel),
    "FSDP2": partial(wrapped, sharded),
}
PACKAGES: dict[str, Tool] = {
    "onnxruntime": onnx, "thop": thop, "ptflops": ptflops, "fvcore": fvcore, "torchinfo": torchinfo,
}  # fmt: skip
