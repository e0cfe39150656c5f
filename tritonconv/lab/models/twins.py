"""The models of a measurement: one with torch's layers, its converted copies, and one in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from tritonconv.convert import ConversionReport, convert
from tritonconv.errors import ArgumentError
from tritonconv.lab.bench.failures import context_is_lost, one_line
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, OURS_COMPILED
from tritonconv.lab.models import steps
from tritonconv.lab.models.factories import Network, shown
from tritonconv.lab.models.recorded import recorded, transposed
from tritonconv.problem import LAYOUTS

DECODER = "tritonconv_decoder"


@dataclass(frozen=True)
class Wanted:
    """How networks are measured: ``seconds`` for each of them; ``compiled`` adds torch.compile."""

    device: torch.device
    dtype: torch.dtype
    layout: str
    seconds: float
    seed: int = 0
    compiled: bool = False


@dataclass
class Twins:
    """By contestant: the model with torch's layers, a copy of it (the null contestant) and its converted copies; those
    that torch.compile will have, where they are wanted; and a copy in float64, until it has answered."""

    models: dict[str, nn.Module]
    compiled: dict[str, nn.Module]
    exact: nn.Module | None
    inputs: list[torch.Tensor]


def twins(network: Network, wanted: Wanted) -> Twins:
    """The models and their inputs. Raises ArgumentError where the network cannot be built, copied or run, or has no
    transposed convolution of torch's class or no loss to train."""
    kept = torch.float32 if wanted.dtype in steps.HALVES else wanted.dtype
    try:
        torch.manual_seed(wanted.seed)
        model = network.build().to(wanted.device, kept).train()
        for parameter in model.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[wanted.layout])
    except (Exception, SystemExit) as error:  # a factory that parses the command line exits
        raise ArgumentError(f"argument --model: {network.name} cannot be built: {one_line(error)}") from None
    if not transposed(model):
        raise ArgumentError(f"argument --model: {network.name} has no torch.nn.ConvTranspose3d")
    try:
        inputs = steps.inputs_of(network.inputs, wanted.dtype, wanted.layout, wanted.device, wanted.seed)
        with recorded(model) as calls:
            steps.training_step(model, model, inputs, wanted.dtype)()
    except steps.UntrainableError as error:
        raise ArgumentError(f"argument --model: {network.name} has no training step: {error}") from None
    except Exception as error:
        if context_is_lost(error):
            raise
        given = f"{network.name} does not take {shown(network.inputs)}"
        raise ArgumentError(f"argument --input: {given}: {one_line(error)}") from None
    if not calls:
        raise ArgumentError(f"argument --model: the forward of {network.name} calls none of its ConvTranspose3d")
    model.zero_grad(set_to_none=True)
    try:
        copied = [copy.deepcopy(model) for _ in range(4)]
        # torch.compile's answers are those of models in their first state too.
        compiled = {name: copy.deepcopy(model) for name in (COMPILED, OURS_COMPILED) if wanted.compiled}
    except Exception as error:
        raise ArgumentError(f"argument --model: {network.name} cannot be copied: {one_line(error)}") from None
    models = {BASELINE: model, AGAIN: copied[3], OURS: copied[0], DECODER: copied[1]}
    report, of_blocks = convert(models[OURS]), convert(models[DECODER], decoder=True)
    if len(of_blocks.replaced) == len(report.replaced):  # no block concatenates
        del models[DECODER]
    if not report.replaced:
        raise ArgumentError(f"argument --model: convert leaves every layer of {network.name}: {_reasons(report)}")
    if compiled:
        convert(compiled[OURS_COMPILED])
    return Twins(models, compiled, copied[2].double(), inputs)


def _reasons(report: ConversionReport) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in report.left[:3])
