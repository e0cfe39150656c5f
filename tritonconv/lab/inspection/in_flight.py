"""Registers that an sm_90 kernel writes while a matrix product may still read them.

An asynchronous product (``HGMMA``) may read its operand A from registers until a wait for its group has passed. PTX
calls a write before that undefined (``wgmma.wait_group``); Triton up to 3.8 compiles some (triton #9433). All ways
through the machine code are followed; a product is in flight from its instruction to a wait that leaves fewer groups
than were committed since. Where a call or a jump by register leads is not seen; no kernel here has one.
"""

from __future__ import annotations

import re

from tritonconv.lab.inspection.listing import Instruction, instructions

_PRODUCT = re.compile(r"R\d+, (?:R(\d+)|gdesc)")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_RESULT = re.compile(r"(?:U?P(?:T|\d+),\s*)?R(\d+)\b")
_READS = ("HGMMA", "BAR", "BRX", "JMX", "RET", "CALL", "WARPSYNC")  # a register in front is no result, or a sum's
_FOUR = re.compile(r"\.128\b|\.MT?88\.4\b|^HMMA\b")
_TWO = re.compile(r"\.64\b|\.MT?88\.2\b|\.WIDE\b|^CS2R(?!\.32)")
A_REGISTERS = 4  # of a thread, for the 64 x 16 (two bytes an element) or 64 x 8 (four) of one instruction
OPEN = -1  # the age of a product whose group is not committed

State = dict[int, int]  # by the product's place: how many groups were committed after its own


def early_writes(code: str) -> tuple[str, ...]:
    """Of nvdisasm's listing the instructions that write a register of a product in flight, in the order of the text."""
    listing = instructions(code)
    read = {place: _operand_a(line) for place, line in enumerate(listing) if line.name.startswith("HGMMA")}
    if not any(read.values()):
        return ()
    before: dict[int, State] = {0: {}}
    waiting = [0]
    while waiting:
        place = waiting.pop()
        line = listing[place]
        after = _after(before[place], place, line, place in read)
        for follower in _followers(place, line, len(listing)):
            known = before.get(follower)
            joined = dict(after) if known is None else _joined(known, after)
            if joined != known:
                before[follower] = joined
                waiting.append(follower)
    return tuple(
        f"{line.name} {line.text}"
        for place, line in enumerate(listing)
        if (mine := _written(line)) and any(mine & read[product] for product in before.get(place, ()))
    )


def _after(state: State, place: int, line: Instruction, product: bool) -> State:
    if product:
        state = {**state, place: OPEN}
        return {where: age + 1 for where, age in state.items()} if "gsb0" in line.text else state
    left = _WAIT.search(line.text) if line.name.startswith("WARPGROUP.DEPBAR") else None
    if left is None:
        return state
    return {where: age for where, age in state.items() if age < int(left[1], 16)}


def _joined(one: State, other: State) -> State:
    """All that may be in flight on either way; ages only fall, so that the search ends."""
    return {place: min(state[place] for state in (one, other) if place in state) for place in {*one, *other}}


def _followers(place: int, line: Instruction, end: int) -> list[int]:
    """The places that may come next."""
    followers = []
    leaves = line.name.startswith(("BRA", "EXIT", "RET"))
    # A branch may name its condition behind its name.
    if place + 1 < end and (not leaves or line.guard or "UP" in line.text.split("`")[0]):
        followers.append(place + 1)
    if line.name.startswith("BRA") and line.target is not None and line.target < end:
        followers.append(line.target)
    return followers


def _operand_a(line: Instruction) -> set[int]:
    product = _PRODUCT.match(line.text)
    return _registers(product[1], A_REGISTERS) if product and product[1] else set()


def _written(line: Instruction) -> set[int]:
    result = None if line.name.startswith(_READS) else _RESULT.match(line.text)
    width = 4 if _FOUR.search(line.name) else 2 if _TWO.search(line.name) else 1
    return _registers(result[1], width) if result else set()


def _registers(first: str, count: int) -> set[int]:
    return set(range(int(first), int(first) + count))
