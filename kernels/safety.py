"""Configs that must not run where they would be compiled, though they would compile: ``Variant.hazard``.

A hazard is of a config and a compiler, not of a problem's numbers: what is wrong once may be right a thousand times. A
variant with a hazard is guarded where it is registered, so dispatch, tuner, benchmark and ``use`` meet safe configs
alone; :func:`unsafe` judges stored configs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tritonconv.kernels.variant import COPY, Config, Toolchain, Variant
from tritonconv.problem import Problem


def toolchain_of(device: torch.device) -> Toolchain:
    """The target and the compiler of a launch on the device now."""
    from tritonconv.kernels.triton_target import compute_capability, triton_version

    return Toolchain(compute_capability() if device.type == "cuda" else 0, triton_version())


def unsafe(record: Variant, problem: Problem, config: Config, device: torch.device) -> str | None:
    """Why the config must not run on the device with the Triton that is here; None where it may."""
    return None if record.hazard is None else record.hazard(problem, config, toolchain_of(device))


def without_hazards(record: Variant) -> Variant:
    """The variant without unsafe configs: another one is its default, and ``supports`` says where all are unsafe."""
    if record.hazard is None:
        return record

    def space(problem: Problem, device: torch.device) -> tuple[Config, ...]:
        return tuple(each for each in record.space(problem, device) if unsafe(record, problem, each, device) is None)

    def default(problem: Problem, device: torch.device) -> Config:
        usual = record.default(problem, device)
        if unsafe(record, problem, usual, device) is None:
            return usual
        return next(iter(space(problem, device)), usual)

    def copied(problem: Problem, device: torch.device) -> Config | None:
        usual = record.copied(problem, device) if record.copied is not None else None
        if usual is None or unsafe(record, problem, usual, device) is None:
            return usual
        return next((each for each in space(problem, device) if each.get(COPY)), None)

    def supports(problem: Problem, device: torch.device) -> str | None:
        why_not = record.supports(problem, device)
        if why_not is not None:
            return why_not
        reason = unsafe(record, problem, default(problem, device), device)
        return None if reason is None else f"no config of it is safe here: {reason}"

    return replace(record, space=space, default=default, copied=copied, supports=supports)
