"""``tritonconv tune``: finds and stores the fastest variants for layers, for a model, or for one problem."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tritonconv import flags
from tritonconv.arguments import geometry, problem_of
from tritonconv.bench import results
from tritonconv.bench.environment import environment
from tritonconv.bench.failures import disqualifies, told
from tritonconv.bench.progress import progress
from tritonconv.bench.workloads import ALL, SCALES, distinct, in_order, left_out, suites, workloads
from tritonconv.commands import common
from tritonconv.commands.common import DTYPES, OK, RESULTS, WRONG, add_device, add_variant_files, load_variant_files
from tritonconv.commands.common import device as device_of
from tritonconv.errors import ArgumentError
from tritonconv.problem import LAYOUTS, Problem
from tritonconv.tuning.api import problems_of
from tritonconv.tuning.session import Session, tasks_of
from tritonconv.tuning.tuned import Task

HELP = "find the fastest variants on this machine and store them"
DESCRIPTION = """\
Times the variants beside torch's own on this machine and stores the fastest per kind of problem; calls use it from then
on. torch's own is a candidate, so a tuned layer is not slower than torch. A killed run goes on where it was: each
timing is stored at once, and so is each decision. A layer that fails, as where the memory is too small for it, is told,
and the others are tuned; the exit code is then 1.

What is tuned: a suite's layers (--suite), the layers of your model (--model module:factory --input 1x1x96x96x96), or
one problem (--x 1x64x16x16x16 --weight 64x32x2x2x2 --stride 2).

The store is TRITONCONV_CACHE, else the XDG cache directory; tables that come with tritonconv stand behind it.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.epilog = "example: tritonconv tune --suite unet --seconds 120"
    flags.add_choice(parser, "--suite", suites(), "suites to tune (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only layers whose name contains TEXT")
    parser.add_argument("--scale", choices=tuple(SCALES), help="sizes of the layers (default: cpu on a CPU, else full)")
    parser.add_argument("--model", metavar="MODULE:FACTORY", help="a function without arguments that makes your model")
    parser.add_argument(
        "--input", type=flags.shape, action="append", metavar="SIZES", help="an input of the model, as 1x1x96x96x96"
    )
    parser.add_argument("--x", type=flags.shape, metavar="NxCxDxHxW", help="one problem: the shape of its input")
    parser.add_argument("--weight", type=flags.shape, metavar="CIxCO/GxKxKxK", help="and of its weight")
    for name, default in (("stride", (1,)), ("padding", (0,)), ("output-padding", (0,)), ("dilation", (1,))):
        parser.add_argument(f"--{name}", type=flags.shape, default=default, metavar="A[xBxC]")
    parser.add_argument("--groups", type=int, default=1, metavar="G")
    parser.add_argument("--bias", action="store_true", help="the one problem has a bias")
    flags.add_choice(parser, "--dtype", DTYPES, f"{', '.join(DTYPES)} (default: float32; a model: its own)")
    flags.add_choice(parser, "--layout", LAYOUTS, f"{', '.join(LAYOUTS)} (default: both; a model: its own)")
    parser.add_argument(
        "--seconds", type=flags.seconds, metavar="S",
        help="budget: it ends there with everything stored, and the same command goes on (default: 4 s a problem)",
    )  # fmt: skip
    add_device(parser)
    add_variant_files(parser)
    parser.add_argument("--store", type=Path, metavar="DIR", help="folder of the store (default: see above)")
    parser.add_argument("--again", action="store_true", help="also measure what is stored already")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the results file (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    device = device_of(options.device)
    tasks, scale = _tasks(options, device)
    shown = progress(options.quiet, unit="problems", first="looking at what is stored")
    with results.Writer(options.output, "tune-") as writer:
        header = environment(device, ("tritonconv", *options.given), 0)
        writer.write("environment", {"schema": results.SCHEMA, "run": writer.run, **header, "scale": scale,
                                     "scale_rule": SCALES.get(scale, "the sizes that were given")})  # fmt: skip

        def write(kind: str, row: dict[str, object]) -> None:
            writer.write(kind, row)
            if kind == "error" and row["variant"] == ALL:  # the whole problem
                failed[f"{row['layer']} {row['layout']} {row['dtype']}"] = row["message"]

        failed: dict[str, object] = {}
        session = Session(device, options.store, options.seconds, options.again, write, goes_on=len(tasks) > 1)
        end = {"reason": "interrupted"}
        try:
            report = session.run(tasks, shown)
            end = {"reason": report.reason}
        except Exception as error:
            end = {"reason": "error", "message": told(error)}
            if not disqualifies(error):
                raise
            report = session.report
        finally:
            shown.close()
            writer.write("end", end)
    print(report)
    for name, message in failed.items():
        print(f"failed: {name}: {message}")
    print(f"results: {writer.path}")
    return WRONG if failed else OK


def _tasks(options: argparse.Namespace, device: torch.device) -> tuple[list[Task], str]:
    asked = [name for name in ("suite", "model", "x") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise ArgumentError(f"arguments {' and '.join('--' + name for name in asked)}: choose one")
    for name, needs in (("input", "model"), ("weight", "x")):
        if (getattr(options, name) is None) != (getattr(options, needs) is None):
            raise ArgumentError(f"arguments --{needs} and --{name} go together")
    if options.model is not None:
        return tasks_of(_of_model(options, device)), "given"
    if options.x is not None:
        return tasks_of(_given(options)), "given"
    scale = common.scale_for(options.scale, device)
    layers = [each for each in workloads(options.suite or ALL, options.only) if left_out(each, scale) is None]
    tasks = [
        Task(layer.problem(dtype, layout, scale), layer.name, layer.suite)
        for layer in in_order(layer for layer, _ in distinct(layers, scale))
        for dtype in _dtypes(options)
        for layout in flags.once(options.layout, tuple(LAYOUTS))
    ]
    return tasks, scale


def _dtypes(options: argparse.Namespace) -> list[torch.dtype]:
    return [getattr(torch, name) for name in flags.once(options.dtype, ("float32",))]


def _given(options: argparse.Namespace) -> Iterator[Problem]:
    geo = geometry(options.stride, options.padding, options.output_padding, options.groups, options.dilation)
    for dtype in _dtypes(options):
        x = torch.empty(options.x, dtype=dtype, device="meta")
        weight = torch.empty(options.weight, dtype=dtype, device="meta")
        bias = (
            weight.new_empty(options.weight[1] * options.groups) if options.bias and len(options.weight) > 1 else None
        )
        problem = problem_of(x, weight, bias, geo)
        for layout in flags.once(options.layout, tuple(LAYOUTS)):
            yield replace(problem, layout=layout)


def _of_model(options: argparse.Namespace, device: torch.device) -> list[Problem]:
    module, _, factory = options.model.partition(":")
    with _working_folder_first():
        try:
            make = getattr(importlib.import_module(module), factory)
        except (ImportError, AttributeError, ValueError) as error:
            raise ArgumentError(f"argument --model: {options.model!r}: {error}") from None
    model = make().to(device)
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"argument --model: {options.model} returned {type(model).__name__}, not a torch.nn.Module")
    found: dict[Problem, None] = {}
    for dtype in _dtypes(options) if options.dtype else [None]:
        typed = model if dtype is None else model.to(dtype)
        own = next((each.dtype for each in typed.parameters() if each.is_floating_point()), torch.float32)
        for layout in flags.once(options.layout, ("ncdhw",)):
            inputs = [torch.randn(shape, device=device).to(own) for shape in options.input]
            laid = [each.to(memory_format=LAYOUTS[layout]) if each.dim() == 5 else each for each in inputs]
            found |= dict.fromkeys(problem for problem, _ in problems_of(typed, *laid))
    if not found:
        raise ArgumentError(
            f"argument --model: {options.model} ran no 3-D transposed convolution that tritonconv serves"
        )
    return list(found)


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
