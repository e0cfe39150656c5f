"""One layer in one dtype, as it is measured: its problem per layout, its tensors, its float64 reference."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from tritonconv.lab.bench import float64, gate, spent
from tritonconv.lab.bench.calls import TensorCall, Tensors, make_tensors, torch_call
from tritonconv.lab.bench.workloads import Workload
from tritonconv.problem import Problem


@dataclass
class Subject:
    """Tensors and references are made when first asked for and kept; ``outputs`` are those the run will compare."""

    layer: Workload
    duplicates: tuple[str, ...]
    dtype: torch.dtype
    scale: str
    device: torch.device
    seed: int
    outputs: frozenset[str]
    _tensors: dict[Problem, Tensors] = field(default_factory=dict)
    _exact: dict[tuple, dict[str, torch.Tensor]] = field(default_factory=dict)

    def problem(self, layout: str) -> Problem:
        """The problem that is timed."""
        return self.layer.problem(self.dtype, layout, self.scale)

    def original(self, layout: str) -> Problem:
        """The problem at the sizes of the model."""
        return self.layer.problem(self.dtype, layout)

    def tensors(self, problem: Problem) -> Tensors:
        """The values follow from the layer's name and the seed alone, not from the layout or from what ran before."""
        if problem not in self._tensors:
            seed = self.seed + zlib.crc32(self.layer.name.encode())
            if problem.layout == "ncdhw":
                with spent.on(spent.TENSORS):
                    self._tensors[problem] = make_tensors(problem, self.device, seed)
            else:
                self._tensors[problem] = self.tensors(replace(problem, layout="ncdhw")).in_layout(problem.layout)
        return self._tensors[problem]

    def exact(self, problem: Problem, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
        """The float64 outputs; one reference serves all layouts and passes."""
        return self._in_float64(problem, outputs, float64.reference)

    def cut(self, problem: Problem, outputs: Iterable[str]) -> dict[str, torch.Tensor]:
        """The same of operands as TF32 has them; none where torch's switch does not permit it."""
        if not gate.in_tf32(problem, self.device):
            return {}
        return self._in_float64(problem, outputs, float64.reference_in_tf32)

    def baseline(self, problem: Problem, pass_name: str) -> TensorCall:
        """torch's own call."""
        return torch_call(problem, self.tensors(problem), pass_name)

    def _in_float64(self, problem: Problem, outputs: Iterable[str], reference) -> dict[str, torch.Tensor]:
        plain = replace(problem, layout="ncdhw")
        key = plain, reference
        if key not in self._exact:
            t = self.tensors(plain)
            self._exact[key] = reference(plain, t.x, t.weight, t.bias, t.grad_y, self.outputs)
        return {name: self._exact[key][name] for name in outputs if name in self._exact[key]}
