"""A model's state before its first step, to put it back there.

Some models change themselves in a forward: the codebook of a VQ-VAE, the statistics of a batch norm, a counter. The
first calls of a converted model, by which it chooses, are more steps than its neighbours make.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from typing import Any

import torch
from torch import nn

SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.Generator, random.Random)
LISTS = (list, tuple, set, frozenset, deque)
# torch's own: the mode of training, the hooks, and what the tensors and the modules are kept in
OF_EACH_MODULE = frozenset(nn.Module().__dict__)


class FirstState:
    """Parameters, buffers and simple attributes (numbers, text, tensors, generators and containers of those) of each
    module of a model, as they are now. Tensors that equal those of ``beside``, the state of its twin, are not kept
    twice."""

    def __init__(self, model: nn.Module, beside: FirstState | None = None) -> None:
        self._model = model
        self._tensors: dict[tuple[str, str], torch.Tensor | None] = {}
        for name, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    place = name, key
                    self._tensors[place] = _kept(tensor, None if beside is None else beside._tensors.get(place))
        # In one copy, so that what two modules share stays shared.
        self._attributes = copy.deepcopy({name: _attributes(module) for name, module in model.named_modules()})

    def put_back(self) -> None:
        """Puts the model back to this state."""
        self.put_tensors_back()
        attributes = copy.deepcopy(self._attributes)
        for name, module in self._model.named_modules():
            for key, value in attributes[name].items():
                # torch.compile would look at an equal one anew.
                if not _same(module.__dict__.get(key), value):
                    setattr(module, key, value)

    def put_tensors_back(self) -> None:
        """The parameters and buffers alone, written where they lie: a captured CUDA graph reads them there."""
        for name, module in self._model.named_modules():
            for held in (module._parameters, module._buffers):
                for key in list(held):
                    _put(held, key, self._tensors.get((name, key)))


def _kept(tensor: torch.Tensor | None, twin: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    same = twin is not None and twin.dtype is tensor.dtype and torch.equal(twin, tensor)
    return twin if same else tensor.detach().clone()


def _put(held: dict[str, Any], key: str, first: torch.Tensor | None) -> None:
    here = held[key]
    if here is None or first is None or here.shape != first.shape:
        held[key] = None if first is None else first.clone()
        return
    with torch.no_grad():
        here.copy_(first)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: each for key, each in vars(module).items() if key not in OF_EACH_MODULE and _is_simple(each)}


def _is_simple(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_simple, (*value, *value.values())))
    return all(map(_is_simple, value)) if isinstance(value, LISTS) else isinstance(value, SIMPLE)


def _same(here: object, first: object) -> bool:
    try:
        return type(here) is type(first) and bool(here == first)
    except (RuntimeError, ValueError):  # tensors of several values
        return False


def seed_all(seed: int) -> None:
    """Seeds the generators that a forward may draw from: torch's, Python's, and NumPy's where it is loaded."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
