"""MATLAB's learning-rate and L2 factors as layer properties, and the optimizer groups that honour them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from tritonconv.errors import ArgumentError
from tritonconv.matlab.arguments import factor, learnable, non_negative

if TYPE_CHECKING:
    from typing_extensions import Self


class Factors(nn.Module):
    """The four factors of a layer with a ``weight`` and a ``bias``; each a non-negative number, checked when set."""

    weight_learn_rate_factor = factor("weight_learn_rate_factor")
    bias_learn_rate_factor = factor("bias_learn_rate_factor")
    weight_l2_factor = factor("weight_l2_factor")
    bias_l2_factor = factor("bias_l2_factor")

    def get_learn_rate_factor(self, parameter_name: str) -> float:
        """MATLAB's ``getLearnRateFactor``; ``parameter_name`` is ``"Weights"`` or ``"Bias"``."""
        return getattr(self, f"{learnable(parameter_name)}_learn_rate_factor")

    def set_learn_rate_factor(self, parameter_name: str, value: float) -> Self:
        """MATLAB's ``setLearnRateFactor``; changes this layer and returns it."""
        setattr(self, f"{learnable(parameter_name)}_learn_rate_factor", value)
        return self

    def get_l2_factor(self, parameter_name: str) -> float:
        """MATLAB's ``getL2Factor``; ``parameter_name`` is ``"Weights"`` or ``"Bias"``."""
        return getattr(self, f"{learnable(parameter_name)}_l2_factor")

    def set_l2_factor(self, parameter_name: str, value: float) -> Self:
        """MATLAB's ``setL2Factor``; changes this layer and returns it."""
        setattr(self, f"{learnable(parameter_name)}_l2_factor", value)
        return self

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of this layer alone; see :func:`tritonconv.param_groups`."""
        return param_groups(self, lr, weight_decay)


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups for all of ``model``, with MATLAB's learning-rate and L2 factors where they exist.

    The weight and bias of each :class:`tritonconv.TransposedConv3dLayer` get ``lr * learn rate factor`` and
    ``weight_decay * L2 factor``; every other parameter gets ``lr`` and ``weight_decay``. As in MATLAB, the biases of
    those layers have an L2 factor of 0 unless told otherwise: they do not decay. MATLAB adds the penalty to the
    gradient, which is the coupled decay of ``torch.optim.SGD`` and ``Adam``, not the decoupled one of ``AdamW``.

    A parameter reached twice is kept once, and one that such a layer shares with another module follows the layer.
    Parameters with equal rates share a group; groups and parameters are in the order of ``model.named_parameters()``.
    Raises ArgumentError where a parameter has no values yet (run one forward first), or belongs to two layers whose
    factors differ.
    """
    lr, weight_decay = non_negative("param_groups: lr", lr), non_negative("param_groups: weight_decay", weight_decay)
    owners: dict[nn.Parameter, tuple[str, float, float]] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, Factors):
            continue
        for name, parameter in layer.named_parameters():
            # A parametrized weight is held by parameters "parametrizations.weight.*".
            kind = "Bias" if name.removeprefix("parametrizations.").startswith("bias") else "Weights"
            factors = layer.get_learn_rate_factor(kind), layer.get_l2_factor(kind)
            first, *others = owners.setdefault(parameter, (path, *factors))
            if tuple(others) != factors:
                raise ArgumentError(
                    f"param_groups: {first!r} and {path!r} share a parameter but ask for different factors "
                    f"(learn rate, L2): {tuple(others)} and {factors}"
                )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ArgumentError(f"param_groups: {name} has no values yet; run one forward of the model first")
        _, rate, penalty = owners.get(parameter, ("", 1, 1))
        groups.setdefault((lr * rate, weight_decay * penalty), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
