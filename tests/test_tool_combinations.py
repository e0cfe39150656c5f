"""Thirty of the random combinations of ``tool_combinations.py``, each tool there among them."""

from __future__ import annotations

from collections import Counter

import pytest
from tool_combinations import combinations, process_group
from tools_tried import TOOLS


@pytest.mark.filterwarnings("ignore")
def test_thirty_combinations_are_equal_or_refused_as_documented():
    found: Counter[tuple[str, str]] = Counter()
    with process_group():
        for name, layer, run in combinations(TOOLS, 30, seed=1):
            try:
                found[name, run()] += 1
            except Exception as failure:
                pytest.fail(f"{name} x {layer}: {type(failure).__name__} {failure}")
    assert {name for name, _ in found} == set(TOOLS)
    assert {name for name, said in found if said == "ours refuses"} == {"FX quantization"}
    assert sum(times for (_, said), times in found.items() if said == "equal") >= 26
