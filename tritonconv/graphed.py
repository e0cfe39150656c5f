"""``graphed``: a model as a CUDA graph, over ``torch.cuda.make_graphed_callables``.

torch captures and replays. Three things are added here. The capture waits for the kernels of the model's layers, which
are compiled in the background. A call is held against the capture: torch copies an operand of another shape or dtype
into the captured one wherever that broadcasts or casts, and replays old memory where a parameter was moved. And a
gradient that is accumulated owns its memory: torch hands out the graph's, which the next replay overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from tritonconv.arguments import layout_of
from tritonconv.device import current
from tritonconv.dispatch import wait_until_compiled
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.switches import for_graphs

# Runs of a model until one asks for no kernel that is not compiled: one, or two or three where something is new.
MOST_RUNS = 8
# Where the classes live that spread a model over GPUs, and hook its backward.
PARALLEL = ("torch.nn.parallel.", "torch.distributed.")

Model = TypeVar("Model", bound=nn.Module)


def graphed(model: Model, *sample: torch.Tensor) -> Model:
    """Captures the model's forward, and its backward where autograd records it, as CUDA graphs; in place.

    From then on ``model(*tensors)`` replays them: the GPU's work is the same, bit for bit, and the host starts it at
    once. ``sample`` are tensors such as later calls pass; their values do not matter. Returns ``model``, whose
    ``forward`` is now the replay; ``del model.forward`` makes it eager again. Capture a finished model: on its GPU,
    converted (:func:`tritonconv.convert`), in the mode (``train()`` or ``eval()``) that the graphs are for. In the
    other mode it runs eagerly, and so do its copies (``deepcopy``, pickle).

    Of a tuned layer the kernels are those with the least GPU time (:func:`tritonconv.for_graphs`).
    The model runs on copies of the sample until every kernel of tritonconv is compiled, then torch captures it. The
    graphs keep the kernels that serve it now, whatever is tuned, pinned or forced later. Buffers (a batch norm's
    means) and ``.grad`` are as before. No other thread may use the GPU meanwhile.

    A call raises an error unless all of this holds:

    - its tensors, by position, have the shapes, dtypes, device and memory format (NCDHW or NDHWC) of the sample;
    - one that requires a gradient has a sample that does; a capture under ``torch.no_grad()`` has no backward;
    - autocast is as at the capture, for which it needs ``torch.autocast(..., cache_enabled=False)``;
    - no parameter or buffer was replaced, moved, frozen or unfrozen, and no submodule changed its mode. An optimizer
      and ``load_state_dict`` write in place, which is fine;
    - its backward runs once, before the next call: the graphs hold the activations of one call.

    Outputs, and gradients that are not accumulated, lie in the graphs' memory, which the next call and its backward
    overwrite: clone what must last. Two streams must not run one model at once; two captured models may.

    It cannot capture: a forward that waits for the GPU or looks at values (``.item()``, ``.cpu()``, ``if x.sum() >
    0``), random numbers of another generator than the GPU's default one (dropout is fine: new numbers in each call),
    checkpointing that keeps the random state, outputs that are no tensors, double backward. Python that is no GPU work
    runs at the capture alone, hooks of submodules among it. A model under ``torch.compile`` makes graphs of its own by
    ``mode="reduce-overhead"``; one in DistributedDataParallel is captured first and wrapped then.

    Raises ArgumentError (a ValueError and a RuntimeError) or ArgumentTypeError (a TypeError and a RuntimeError) where
    the model or the sample is refused, or the model fails inside the capture.
    """
    _check_model(model)
    _check_sample(model, sample)
    device, records = sample[0].device, torch.is_grad_enabled()
    # Outside torch.inference_mode: its tensors could not be written in a later call.
    with current(device), for_graphs(), torch.inference_mode(False), torch.set_grad_enabled(records):
        own = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in sample)
        buffers = [(each, each.clone()) for each in model.buffers()]
        try:
            recorded = _run_until_compiled(model, own)
            _capture(model, own)
            gradients = _step(model, own) if recorded else ()
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        model.forward = CapturedForward(model, own, records, gradients)
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"graphed: model expects a torch.nn.Module, got {type(model).__name__}")
    hooks = (model._forward_pre_hooks, model._forward_hooks, model._backward_pre_hooks, model._backward_hooks)
    if any(hooks):
        raise ArgumentError("graphed: model has hooks of its own; remove them, and register them after the capture")
    for name, module in model.named_modules():
        what = f"model.{name}" if name else "model"
        if isinstance(vars(module).get("forward"), CapturedForward):
            raise ArgumentError(f"graphed: {what} is captured already; `del {what}.forward` makes it eager again")
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ArgumentError(
                f"graphed: {what} is under torch.compile, whose mode='reduce-overhead' makes graphs of its own"
            )
        if any(each.__module__.startswith(PARALLEL) for each in type(module).__mro__):
            raise ArgumentError(
                f"graphed: {what} is a {type(module).__name__}; capture the module inside it, then wrap that"
            )


def _check_sample(model: nn.Module, sample: Sequence[torch.Tensor]) -> None:
    if not sample:
        raise ArgumentError("graphed: sample expects the tensors of a call, got none")
    for index, each in enumerate(sample):
        if not isinstance(each, torch.Tensor):
            raise ArgumentTypeError(f"graphed: sample[{index}] expects a tensor, got {each!r} ({type(each).__name__})")
        if each.layout is not torch.strided:
            raise ArgumentTypeError(f"graphed: sample[{index}] has layout {each.layout}, not torch.strided")
    named = [(f"sample[{index}]", each) for index, each in enumerate(sample)]
    named += [(f"model.{name}", each) for name, each in (*model.named_parameters(), *model.named_buffers())]
    for name, tensor in named:
        if is_lazy(tensor):
            raise ArgumentError(f"graphed: {name} has no shape yet; call the model once")
        if tensor.device.type != "cuda":
            raise ArgumentError(f"graphed: {name} is on {tensor.device}, but a CUDA graph needs all of it on a GPU")
        if tensor.device != sample[0].device:
            raise ArgumentError(f"graphed: {name} is on {tensor.device} but sample[0] is on {sample[0].device}")
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise ArgumentError(f"graphed: model.{name} is a buffer that requires a gradient; make it a parameter")
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise ArgumentError(
            "graphed: autocast keeps casts of parameters, which a graph would repeat for ever; capture inside "
            "torch.autocast('cuda', cache_enabled=False)"
        )


def _step(model: nn.Module, sample: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """A call, and its gradients where it is recorded, which no ``.grad`` gets."""
    outputs = tree_leaves(model(*sample))
    for each in outputs:
        if not isinstance(each, torch.Tensor):
            raise ArgumentTypeError(f"graphed: model returns {each!r} ({type(each).__name__}) among its outputs")
    outputs = [each for each in outputs if each.requires_grad]
    if not outputs:
        return ()
    inputs = [each for each in (*sample, *model.parameters()) if each.requires_grad]
    return torch.autograd.grad(outputs, inputs, [torch.zeros_like(each) for each in outputs], allow_unused=True)


def _run_until_compiled(model: nn.Module, sample: Sequence[torch.Tensor]) -> bool:
    """Runs the model until it asks for no kernel that is not there: torch's own stood in, and would be captured.

    Returns whether autograd records it.
    """
    from tritonconv.kernels import triton_background

    device = sample[0].device
    # As torch's own runs, on a side stream: a node of autograd that is left over from the default one ends a capture.
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    try:
        for _ in range(MOST_RUNS):
            wait_until_compiled()
            before = triton_background.submitted
            with torch.cuda.stream(side):
                recorded = bool(_step(model, sample))
            if triton_background.submitted == before:
                return recorded
    finally:
        here.wait_stream(side)
    raise ArgumentError(f"graphed: model asks for new kernels in each of {MOST_RUNS} runs of one sample")


def _capture(model: nn.Module, sample: tuple[torch.Tensor, ...]) -> None:
    """Puts torch's replay in the place of the model's forward."""
    device = sample[0].device
    # torch captures on one stream of the process, of the GPU of its first capture; without it, on a new one.
    stream = getattr(torch.cuda.graph, "default_capture_stream", None)
    if stream is not None and stream.device != device:
        torch.cuda.graph.default_capture_stream = None
    try:
        # This block puts the stream back also where torch's own leaves it: at the end of a capture that failed.
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            # A parameter that is not used has no gradient, as in an eager step.
            torch.cuda.make_graphed_callables(model, sample, allow_unused_input=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        raise ArgumentError(
            f"graphed: model cannot be captured ({error}). A capture refuses what waits for the GPU or moves values to "
            "or from it, what looks at values, and outputs of earlier recorded calls that are still alive"
        ) from error


class CapturedForward:
    """The forward of a captured model: holds a call against the capture, then has torch replay it.

    ``sample`` are the tensors that the graphs read, ``gradients`` those that they write (none: there is no backward),
    and ``records`` tells whether the capture was made with gradients enabled.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: tuple[torch.Tensor, ...],
        records: bool,
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        self.model, self.sample, self.records, self.backward = model, sample, records, bool(gradients)
        self.places = {each.data_ptr() for each in gradients if each is not None and each.numel()}
        self.replay: Callable[..., Any] = model.forward  # torch's; the model's own where its mode has changed
        self.training, self.autocast = model.training, _autocast()
        self.laid_out = [_as_laid_out(each) for each in sample]
        self.modules = dict(model.named_modules())
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.needs_gradient = bool(self.parameters) or any(each.requires_grad for each in sample)
        self.state = _state(self.modules.values())
        self.calls = self.open = 0  # calls so far, and the one whose backward may run

    def __call__(self, *operands: Any, **named: Any) -> Any:
        if self.model.training != self.training:
            return self.replay(*operands, **named)
        self._check(operands, named)
        self.calls += 1
        self.open = self.calls
        if not self.backward:
            with torch.no_grad():
                return self.replay(*operands)
        outputs = self.replay(*operands)
        if torch.is_grad_enabled():
            node = next((each.grad_fn for each in tree_leaves(outputs) if each.grad_fn is not None), None)
            if node is not None:  # one for all outputs
                leaves = [each for each in operands if each.requires_grad and each.is_leaf]
                node.register_prehook(partial(self._before_backward, self.open, (*self.parameters, *leaves)))
        return outputs

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has its class's forward: the graphs belong to the memory of this one.
        return getattr, (self.model, "forward")

    def _check(self, operands: Sequence[Any], named: dict[str, Any]) -> None:
        if named:
            raise ArgumentTypeError(f"graphed model: takes tensors by position, got {', '.join(named)} by name")
        if len(operands) != len(self.sample):
            raise ArgumentError(f"graphed model: was captured with {len(self.sample)} tensors, got {len(operands)}")
        recording = torch.is_grad_enabled()
        for index, (value, sample, laid_out) in enumerate(zip(operands, self.sample, self.laid_out, strict=True)):
            if not isinstance(value, torch.Tensor):
                raise ArgumentTypeError(f"graphed model: argument {index} expects a tensor, got {type(value).__name__}")
            if value.layout is not torch.strided or (_as_laid_out(value) != laid_out and _like(value) != _like(sample)):
                raise ArgumentError(
                    f"graphed model: argument {index} is {_said(value)}, but the capture had {_said(sample)}"
                )
            if recording and value.requires_grad and not sample.requires_grad:
                raise ArgumentError(
                    f"graphed model: argument {index} requires a gradient, and sample[{index}] of the capture did not"
                )
        if recording and self.needs_gradient and not self.records:
            raise ArgumentError("graphed model: was captured under torch.no_grad(), so a recorded call has no backward")
        if _autocast() is not self.autocast:
            raise ArgumentError(
                f"graphed model: autocast is {_autocast() or 'off'}, and was {self.autocast or 'off'} in the capture"
            )
        state = _state(self.modules.values())
        if state != self.state:
            names = [name for name, now, then in zip(self.modules, state, self.state, strict=True) if now != then]
            raise ArgumentError(
                f"graphed model: changed since the capture, in {names[0] or 'itself'}: its mode, or a parameter or a "
                "buffer of it was replaced, moved, frozen or unfrozen. `del model.forward`, then capture it anew"
            )

    def _before_backward(self, call: int, leaves: Iterable[torch.Tensor], grads: object) -> None:
        if call != self.open:
            raise RuntimeError(
                "graphed model: a backward runs once, before the next call; the graphs hold one call's activations"
            )
        self.open = 0
        for leaf in leaves:
            # Autograd took the first gradient as it came, in the graph's memory, and would add the next one to itself.
            if leaf.grad is not None and leaf.grad.data_ptr() in self.places:
                leaf.grad = leaf.grad.clone()


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _state(modules: Iterable[nn.Module]) -> list[tuple]:
    """Per module: all that the graphs took from it for good."""
    return [
        (module.training, *[
            (each.data_ptr(), each.requires_grad)
            for each in (*module._parameters.values(), *module._buffers.values()) if each is not None
        ]) for module in modules
    ]  # fmt: skip


def _as_laid_out(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _like(tensor: torch.Tensor) -> tuple:
    """All that a call's tensor must have in common with the sample: a copy reads any strides of one memory format."""
    volumes = tensor.dim() == 5 and tensor.layout is torch.strided
    return tensor.shape, tensor.dtype, tensor.device, layout_of(tensor, tensor) if volumes else tensor.layout


def _said(tensor: torch.Tensor) -> str:
    shape, dtype, device, layout = _like(tensor)
    return f"{tuple(shape)} {dtype} on {device}, {layout}"
