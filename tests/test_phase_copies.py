"""Copies between y and the order of the products: by an index of voxels or by torch's copies, the same values."""

from __future__ import annotations

import itertools

import pytest
import torch
from variant_cases import Case

from tritonconv.kernels import torch_phase_copies
from tritonconv.kernels.torch_phase_copies import INDEXED_ROWS, interleave, unshuffle
from tritonconv.problem import LAYOUTS

CASES = list(itertools.product((1, 2), (1, 3), ((2, 3, 4), (1, 1, 2), (3, 1, 1)), ((2, 2, 2), (1, 2, 2), (3, 1, 4))))


@pytest.fixture
def selected(monkeypatch):
    """The calls that took the index."""
    calls, original = [], torch_phase_copies._select
    monkeypatch.setattr(torch_phase_copies, "_select", lambda *of: calls.append(of) or original(*of))
    return calls


def both_ways(monkeypatch, selected, call) -> list[torch.Tensor]:
    """The answers by the index and without it."""
    answers = []
    for rows in (1000, 0):
        monkeypatch.setattr(torch_phase_copies, "INDEXED_ROWS", dict.fromkeys(INDEXED_ROWS, rows))
        selected.clear()
        answers.append(call())
        assert len(selected) == (rows > 0)
    return answers


def test_y_and_its_slices_are_filled_as_by_copies(monkeypatch, selected):
    for n, c_out, size, kernel in CASES:
        out = [s * k for s, k in zip(size, kernel, strict=True)]
        values = torch.randn(n, c_out, *kernel, *size)
        values[0, 0, 0, 0, 0, 0, 0, 0] = float("nan")

        def filled(first, n=n, c_out=c_out, out=out, values=values):
            buffer = torch.full((n, c_out + 2, *out), 7.0)
            interleave(buffer[:, first : first + c_out], values)
            assert int((buffer == 7.0).sum()) == buffer.numel() - values.numel()
            return buffer

        for first in (0, 2):
            by_index, copied = both_ways(monkeypatch, selected, lambda first=first, filled=filled: filled(first))
            torch.testing.assert_close(by_index, copied, rtol=0, atol=0, equal_nan=True)
            place = by_index[:, first : first + c_out].unflatten(2, (size[0], -1)).unflatten(4, (size[1], -1))
            place = place.unflatten(6, (size[2], -1)).permute(0, 1, 3, 5, 7, 2, 4, 6)
            torch.testing.assert_close(place, values, rtol=0, atol=0, equal_nan=True)


def test_the_gradient_is_unshuffled_as_by_copies(monkeypatch, selected):
    for n, c_out, size, kernel in CASES:
        problem = Case(n=n, channels=(2, c_out), size=size, kernel=kernel, stride=kernel).problem(torch.float32)
        whole = torch.randn(n, c_out + 1, *problem.out_size)
        for grad_y in (whole[:, 1:], whole[:, 1:].contiguous()):
            by_index, copied = both_ways(monkeypatch, selected, lambda p=problem, g=grad_y: unshuffle(p, g))
            assert torch.equal(by_index, copied) and by_index.is_contiguous()


def test_where_the_index_serves(monkeypatch, selected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def taken(w, c_out=1, dtype=torch.float32, kernel=(2, 2, 2), layout="ncdhw"):
        selected.clear()
        values = torch.zeros(1, c_out, *kernel, 2, 2, w, dtype=dtype)
        y = torch.empty(1, c_out, 2 * kernel[0], 2 * kernel[1], w * kernel[2], dtype=dtype)
        interleave(y.contiguous(memory_format=LAYOUTS[layout]), values)
        return bool(selected)

    assert taken(24) and not taken(25), "one thread"
    assert taken(12, 1000) and not taken(13, 1000), "torch's copies have two"
    assert not taken(4, dtype=torch.float64) and not taken(4, dtype=torch.bfloat16)
    assert not taken(4, kernel=(2, 2, 1)) and not taken(4, 3, layout="ndhwc")
    assert not taken(4, kernel=(64, 64, 4)), "an index as large as that"
