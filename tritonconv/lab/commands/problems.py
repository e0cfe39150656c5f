"""The flags that say which problems a command is about: layers of suites, of a model, or one problem."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from tritonconv.arguments import geometry, problem_of
from tritonconv.autotune.tuning.api import problems_of
from tritonconv.autotune.tuning.session import tasks_of
from tritonconv.autotune.tuning.tasks import Task
from tritonconv.errors import ArgumentError
from tritonconv.lab import flags
from tritonconv.lab.bench.failures import one_line
from tritonconv.lab.bench.layer_sizes import left_out
from tritonconv.lab.bench.stages import with_epilogue, without_concat
from tritonconv.lab.bench.workloads import ALL, distinct, in_order, workloads
from tritonconv.lab.commands.common import add_flags, dtypes_of, epilogue_of, layouts_of, model_suites
from tritonconv.problem import LAYOUTS, Problem


def add_problems(parser: argparse.ArgumentParser, scale: str, dtype: str = "float32", of_models: bool = False) -> None:
    """Adds the flags. ``scale`` describes the default of --scale in the help, and ``dtype`` is the default of --dtype.

    With ``of_models`` the default of --suite is the suites of models alone.
    """
    parser.set_defaults(default_dtype=dtype, default_suites=model_suites() if of_models else (ALL,))
    add_flags(parser, "only", suite="those of models" if of_models else "all", scale=scale)
    parser.add_argument(
        "--model", metavar="MODULE:FACTORY", help="your model: a function without arguments that returns it"
    )
    parser.add_argument(
        "--input",
        type=flags.shape,
        action="append",
        metavar="SIZES",
        help="the shape of an input of the model, such as 1x1x96x96x96; may be repeated",
    )
    parser.add_argument("--x", type=flags.shape, metavar="NxCxDxHxW", help="one problem, by the shape of its input")
    parser.add_argument("--weight", type=flags.shape, metavar="CIxCO/GxKxKxK", help="with --x: the shape of the weight")
    for name, default in (("stride", (1,)), ("padding", (0,)), ("output-padding", (0,)), ("dilation", (1,))):
        parser.add_argument(
            f"--{name}",
            type=flags.shape,
            default=default,
            metavar="A[xBxC]",
            help="with --x: as of torch (default: " + str(default[0]) + ")",
        )
    parser.add_argument("--groups", type=int, default=1, metavar="G", help="with --x: as of torch (default: 1)")
    parser.add_argument("--bias", action="store_true", help="with --x: the problem has a bias")
    add_flags(parser, "activation", "residual", "rounding")
    add_flags(parser, dtype=f"{dtype}; a model: its own", layout="both; a model: its own")


def tasks_asked_for(options: argparse.Namespace, device: torch.device, scale: str) -> tuple[list[Task], str]:
    """The tasks, and at which scale their layers are: ``scale``, or ``given`` for a model's and for one problem.

    A model runs on the device. Raises ArgumentError for flags that do not go together and for a model that does not
    run.
    """
    sources = [name for name in ("suite", "model", "x") if getattr(options, name) is not None]
    if len(sources) > 1:
        raise ArgumentError(f"arguments {' and '.join('--' + name for name in sources)}: choose one")
    for name, needs in (("input", "model"), ("weight", "x")):
        if (getattr(options, name) is None) != (getattr(options, needs) is None):
            raise ArgumentError(f"arguments --{needs} and --{name} go together")
    epilogue = epilogue_of(options)
    if options.model is not None:
        if epilogue is not None:
            raise ArgumentError("argument --model: its layers have the epilogues of the model alone")
        return tasks_of(_of_model(options, device)), "given"
    if options.x is not None:
        return tasks_of(replace(each, epilogue=epilogue) for each in _given(options)), "given"
    layers = [
        without_concat(layer)
        for layer in with_epilogue(workloads(options.suite or options.default_suites, options.only), epilogue)
        if left_out(layer, scale) is None
    ]
    tasks = [
        Task(layer.problem(dtype, layout, scale), layer.name, layer.suite)
        for layer in in_order(layer for layer, _ in distinct(layers, scale))
        for dtype in dtypes_of(options, options.default_dtype)
        for layout in layouts_of(options)
    ]
    return tasks, scale


def _given(options: argparse.Namespace) -> Iterator[Problem]:
    geo = geometry(options.stride, options.padding, options.output_padding, options.groups, options.dilation)
    for dtype in dtypes_of(options, options.default_dtype):
        x = torch.empty(options.x, dtype=dtype, device="meta")
        weight = torch.empty(options.weight, dtype=dtype, device="meta")
        bias = (
            weight.new_empty(options.weight[1] * options.groups) if options.bias and len(options.weight) > 1 else None
        )
        problem = problem_of(x, weight, bias, geo)
        for layout in layouts_of(options):
            yield replace(problem, layout=layout)


def _of_model(options: argparse.Namespace, device: torch.device) -> list[Problem]:
    model = _model(options.model).to(device)
    problems: dict[Problem, None] = {}
    for dtype in dtypes_of(options, options.default_dtype) if options.dtype else [None]:
        typed = model if dtype is None else model.to(dtype)
        own = next((tensor.dtype for tensor in typed.parameters() if tensor.is_floating_point()), torch.float32)
        for layout in flags.once(options.layout, ("ncdhw",)):
            inputs = [torch.randn(shape, device=device).to(own) for shape in options.input]
            laid = [tensor.to(memory_format=LAYOUTS[layout]) if tensor.dim() == 5 else tensor for tensor in inputs]
            try:
                seen = problems_of(typed, *laid)
            except Exception as error:
                shapes = ", ".join("x".join(map(str, shape)) for shape in options.input)
                raise ArgumentError(f"argument --model: {options.model} does not run on --input {shapes}: "
                                    f"{one_line(error)}") from error  # fmt: skip
            problems |= dict.fromkeys(problem for problem, _ in seen)
    if not problems:
        raise ArgumentError(
            f"argument --model: {options.model} ran no 3-D transposed convolution that tritonconv serves"
        )
    return list(problems)


def _model(named: str) -> torch.nn.Module:
    """The model that MODULE:FACTORY names. Raises ArgumentError that says which of the two is not as expected."""
    module, _, factory = named.partition(":")
    expected = "expected MODULE:FACTORY, a function without arguments that returns a torch.nn.Module"
    if not module or not factory:
        raise ArgumentError(f"argument --model: got {named!r}, {expected}")
    with _working_folder_first():
        try:
            holder = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise ArgumentError(f"argument --model: module {module!r} cannot be imported: {one_line(error)}") from error
    if not hasattr(holder, factory):
        raise ArgumentError(f"argument --model: module {module!r} has no attribute {factory!r}; {expected}")
    make = getattr(holder, factory)
    if isinstance(make, torch.nn.Module) or not callable(make):
        kind = type(make).__name__
        raise ArgumentError(f"argument --model: attribute {factory!r} of module {module!r} is a {kind}; {expected}")
    try:
        model = make()
    except Exception as error:
        raise ArgumentError(f"argument --model: {named} raised {one_line(error)}; {expected}") from error
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"argument --model: {named} returned a {type(model).__name__}; {expected}")
    return model


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
