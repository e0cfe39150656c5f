"""Backward-data as what it is: an ordinary strided ``conv3d`` of grad_y with the same weight."""

from __future__ import annotations

from tritonconv.kernels import torch_native
from tritonconv.kernels.variant import Variant
from tritonconv.kernels.work import by_torch


def supports(problem, device):
    return None


def launch(problem, config, grad_y, weight):
    return torch_native.backward_data(problem, grad_y, weight)


VARIANT = Variant(
    name="backward_data_torch_conv",
    pass_name="backward_data",
    idea="conv3d of grad_y with the weight",
    backend="torch",
    launch=launch,
    supports=supports,
    work=lambda problem, config: by_torch(problem, "backward_data", 0.0, 2),
)
