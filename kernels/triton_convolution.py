"""The launches of the forward and of the backward-data kernels that take their operands by pointers and strides."""

from __future__ import annotations

from tritonconv.kernels import triton_epilogue
from tritonconv.kernels.triton_buffers import Buffer
from tritonconv.kernels.triton_launch import geometry, launch, precision, wide
from tritonconv.kernels.triton_weights import oriented, packed
from tritonconv.kernels.variant import Config
from tritonconv.problem import Problem


def forward(
    kernel, grid: int, problem: Problem, config: Config, x, weight, bias, y, y_strides=None,
    epilogue=None, residual=None, slopes=None, **more,
) -> Buffer:  # fmt: skip
    """Has a forward kernel write y, unless it is empty -> y; ``more`` are arguments of this kernel alone.

    ``epilogue``, ``residual``, ``slopes``: of a variant that takes them, by the contract of ``tritonconv.epilogue``.
    """
    if y.numel() > 0:
        if "residual_ptr" in kernel.arg_names:
            more |= triton_epilogue.arguments(problem, y, epilogue, residual, slopes)
        more |= {"x_ptr": x, "bias_ptr": bias, "y_ptr": y}
        _convolve(kernel, grid, problem, config, weight, "forward", x, y, y_strides, more)
    return y


def backward_data(
    kernel, grid: int, problem: Problem, config: Config, grad_y, weight, grad_x, grad_x_strides=None, **more
) -> Buffer:
    """Has a backward-data kernel write grad_x, unless it is empty -> grad_x; ``more`` as in :func:`forward`."""
    if grad_x.numel() > 0:
        more |= {"grad_y_ptr": grad_y, "grad_x_ptr": grad_x}
        _convolve(kernel, grid, problem, config, weight, "backward_data", grad_y, grad_x, grad_x_strides, more)
    return grad_x


def _convolve(kernel, grid, problem, config, weight, pass_name, source, result, result_strides, arguments) -> None:
    """The launch of both. A kernel whose configs have no WEIGHT reads the weight in torch's order, without strides."""
    strides = [source.stride(), result_strides or result.stride()]
    if "WEIGHT" in config:
        config = dict(config)
        weight = packed(weight, config.pop("WEIGHT"))
        strides.insert(1, oriented(weight, pass_name))
    arguments["strides"] = tuple(strides)
    if "PRECISION" in kernel.arg_names:
        arguments["PRECISION"] = precision(problem.dtype)
    far = wide(source, weight, result, of=problem)
    launch(kernel, grid, config, (result,), w_ptr=weight, WIDE=far, **geometry(problem, kernel), **arguments)
