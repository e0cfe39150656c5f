"""Watches the passes of plans, whose functions are made when a plan first needs them."""

from __future__ import annotations

from collections.abc import Callable

from tritonconv import dispatch


def watch_pass(monkeypatch, name: str, note: Callable) -> None:
    """Calls ``note(plan, *operands)`` before each call of the function of this name of any plan."""
    made = vars(dispatch.Plan)[name]

    def watched(plan):
        run = made.__get__(plan, dispatch.Plan)

        def call(*operands, **more):
            note(plan, *operands)
            return run(*operands, **more)

        return call

    monkeypatch.setattr(dispatch.Plan, name, property(watched))


def in_one_program(plan) -> bool:
    """Both gradients are one program, so that the functions of the two passes are not called."""
    return all(plan.choice(name).variant.launches is not None for name in ("backward_data", "backward_weight"))
