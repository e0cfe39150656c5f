"""Turns a problem into a plan: for each pass the variant, its config and the reason. Plans are cached.

``tritonconv.use`` forces variants, ``torch.use_deterministic_algorithms`` restricts the choice, and ``autotune`` makes
all other choices.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tritonconv import fallback
from tritonconv.arguments import geometry, plain, problem_of
from tritonconv.autotune import model, pins
from tritonconv.autotune.choose import Selection, ceilings_of, choose, untuned
from tritonconv.autotune.choose import forget as forget_tables
from tritonconv.bounded import remember
from tritonconv.device import current
from tritonconv.errors import VariantNotApplicable
from tritonconv.forced import forced, trained
from tritonconv.kernels.registry import variant, variants
from tritonconv.kernels.variant import Config
from tritonconv.plan import Plan
from tritonconv.private import any_autocast, operands_check
from tritonconv.private import deterministic as deterministic_algorithms
from tritonconv.problem import Problem
from tritonconv.switches import graphs, torch_only

MAX_PLANS = 4096
MOST_TORCHS = 512  # weights; a program that makes new ones for each call fills it
MOST_KINDS = 8  # of calls with one weight: sizes of images
PATIENCE = 64  # calls of other kinds, after which those of a weight are forgotten

# Rises when later calls may get other plans: a result derived from a plan is then stale.
generation = 0

_by_call: dict[tuple, Plan] = {}
_by_problem: dict[tuple, Plan] = {}
# Repeated calls, by the id of their weight (:func:`keep_call`), and those of ``up_concat`` on a CPU
# (:func:`keep_stage`).
repeated: dict[int, tuple[tuple, ...]] = {}
stages: dict[int, tuple[tuple, ...]] = {}
_of_other_kinds = itertools.count(1)


def plan(problem: Problem, device: torch.device, in_graph: bool = False) -> Plan:
    """The plan of a problem on a device, under the variants forced by :func:`tritonconv.use`.

    ``in_graph``: of a call in a CUDA graph, as inside :func:`tritonconv.for_graphs`.
    """
    return _plan(problem, device, forced.get(), deterministic_algorithms(), in_graph or graphs.get())


def _plan(problem: Problem, *where) -> Plan:
    key = (problem, *where)
    entry = _by_problem.get(key)
    if entry is None:
        device, _, deterministic, _ = where
        # A deterministic run waits for the compiler, so that its first call already has the final bits.
        standby = device.type == "cuda" and not deterministic
        made = Plan(problem, device, partial(_choose, *key), standby=standby)
        if problem.epilogue is None:
            made.plan_with = lambda epilogue: _plan_with(replace(problem, epilogue=epilogue), *where)
        entry = remember(_by_problem, key, made, MAX_PLANS)
    return entry


def _plan_with(problem: Problem, *where) -> Plan:
    """The plan of a problem with an epilogue, whose forward may have a choice of its own."""
    if (problem, *where) not in _by_problem:
        _offer_to_tuner(problem, where[0])
    return _plan(problem, *where)


def plan_for(x, weight, bias, arguments: tuple) -> Plan | None:
    """The plan of a batched call, None where no variant serves such tensors; a distinct call is checked once.

    ``arguments`` are (stride, padding, output_padding, groups, dilation). A repeated call costs one tuple and one dict
    lookup.
    """
    numbers = plain(arguments)
    try:
        key = (
            x.shape, x.stride(), x.dtype, x.device,
            weight.shape, weight.stride(), weight.dtype, weight.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            numbers, forced.get(), deterministic_algorithms(), graphs.get(),
        )  # fmt: skip
        entry = _by_call.get(key)
    except RuntimeError:  # a sparse tensor has no strides, and no variant serves it
        return _plan_anew(x, weight, bias, arguments)
    if entry is None:
        entry = _plan_anew(x, weight, bias, arguments)
        if entry is not None:
            remember(_by_call, key, entry, MAX_PLANS)
    return entry


def keep_call(direct: tuple | None, plan: Plan, x, weight, bias, arguments: tuple, recorded: bool) -> None:
    """Notes how a planned call runs: as torch's own operation with the arguments ``direct``, or else by ``plan``.

    The second call with a weight leaves an entry of ``repeated``: torch's check of the operands, our arguments, which
    live on here to be known by their identity, whether there is no bias, whether autograd must be off, whether an
    operand requires a gradient, ``direct``, ``plan``. The check is the one by which a compiled graph knows its operands
    again: their classes, sizes, strides, dtypes, devices and ``requires_grad``, and the dispatch keys that are in
    force, by which autocast, transforms, modes and tracers differ. It is one call into C: each look at a tensor in
    Python takes a tenth of a microsecond, and several times that where the data of the call before have pushed Python's
    objects out of the CPU's caches.
    """
    _keep(repeated, (x, weight, bias), arguments, recorded, direct, plan)


def keep_stage(direct: tuple | None, place, x, weight, bias, skip, arguments: tuple, recorded: bool) -> None:
    """Notes how ``up_concat`` of these operands runs on a CPU: as torch's own operation and its concatenation where
    there is ``direct``, else with y written at its ``place``. An entry of ``stages`` is as one of ``repeated``, but
    its check is of (x, skip, weight, bias)."""
    _keep(stages, (x, skip, weight, bias), arguments, recorded, direct, place)


def _keep(known_calls: dict[int, tuple[tuple, ...]], operands: tuple, arguments: tuple, recorded: bool, direct, how):
    if any_autocast() or forced.get() or graphs.get() or operands_check is None:
        return
    if direct is None and deterministic_algorithms():  # which restrict the choice
        return
    *others, weight, bias = operands
    # A checkpoint may recompute a call that had forced variants; a list may change.
    if id(weight) in trained or plain(arguments) is not arguments:
        return
    known = known_calls.get(id(weight))
    if known is None:  # a weight that is made for each call never earns the check
        remember(known_calls, id(weight), (), MOST_TORCHS)
        return
    if len(known) >= MOST_KINDS:  # ever new sizes do not earn theirs; those of a program's next part do
        if next(_of_other_kinds) % PATIENCE == 0:
            known_calls.pop(id(weight), None)
        return
    checked = (*others, weight) if bias is None else (*others, weight, bias)
    check = operands_check(*checked, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    # The gradients' variants are chosen only where they are needed; the skip's is none of theirs.
    only_without = not recorded and any(each is not None and each.requires_grad for each in (others[0], weight, bias))
    leaves = any(each is not None and each.requires_grad for each in operands)
    entry = check, *arguments, bias is None, only_without, leaves, direct, how
    remember(known_calls, id(weight), (entry, *known), MOST_TORCHS)


def _forget_repeated() -> None:
    repeated.clear()
    stages.clear()


def _plan_anew(x, weight, bias, arguments) -> Plan | None:
    if fallback.unserved(x, weight, bias) is not None:
        return None
    problem = problem_of(x, weight, bias, geometry(*arguments))
    _offer_to_tuner(problem, x.device)
    return _tried(plan(problem, x.device))


def _tried(made: Plan) -> Plan:
    """A CPU's plan whose first calls choose its formulations, where they may."""
    if made.device.type != "cpu" or forced.get() or torch_only():
        return made
    from tritonconv.autotune import online  # its rows are read where a CPU's call needs them
    from tritonconv.trial_plan import trial_of

    problem = made.problem

    def finished() -> Plan:
        drop(lambda each: each.problem.plain == problem and each.device == made.device)
        return plan(problem, made.device)

    return trial_of(made, online.trials(problem), finished) if online.wanted() else made


_tuner: Callable[[Problem, torch.device], None] | None = None


def set_tuner(offer: Callable[[Problem, torch.device], None] | None) -> None:
    """Where ``torch.backends.cudnn.benchmark`` is set, ``offer`` is called before a problem is planned on a GPU."""
    global _tuner
    _tuner = offer


def _offer_to_tuner(problem: Problem, device: torch.device) -> None:
    """The one door from a call to the tuner, whose module registers itself when this first imports it."""
    if device.type != "cuda" or not torch.backends.cudnn.benchmark or forced.get() or torch_only():
        return
    if _tuner is None:
        importlib.import_module("tritonconv.autotune.tuning.first_use")
    if _tuner is not None:
        _tuner(problem, device)


def drop(which: Callable[[Plan], bool]) -> None:
    """Drops these plans; a later call plans anew."""
    global generation
    for memory in (_by_call, _by_problem):
        for key, entry in list(memory.items()):
            if which(entry):
                memory.pop(key, None)
    _forget_repeated()
    generation += 1


def _choose(problem, device, named, deterministic, in_graph, pass_name) -> Selection:
    for name, items in named:
        record = variant(name)
        if record.pass_name == pass_name:
            why_not = record.supports(problem, device)
            if why_not is not None:
                raise VariantNotApplicable(f"{name} was forced but does not serve {problem}: {why_not}")
            config = record.default(problem.plain, device) if items is None else dict(items)
            return Selection(record, config, "forced by tritonconv.use", forced=True)
    chosen = choose(problem, device, pass_name, in_graph)
    if deterministic and not chosen.variant.deterministic and device.type != "cpu" and not torch_only():
        because = f"torch.use_deterministic_algorithms is on and {chosen.variant.name} is not deterministic"
        return next(_deterministics(problem, device, pass_name, because), chosen)
    return chosen


def _deterministics(problem, device, pass_name, because) -> Iterator[Selection]:
    """The deterministic variants that serve the problem; on a GPU in the cost model's order."""
    if device.type == "cuda" and problem.n and problem.c_out:
        for record, config, guess in model.rank(problem, device, pass_name, ceilings_of(device)):
            if record.deterministic:
                fastest = f"the cost model's fastest that is: {guess.ms * 1e3:.3g} us, bound by {guess.limit}"
                yield Selection(record, config, f"{because}; {fastest}")
    else:
        for record in variants(pass_name):
            if record.deterministic and record.supports(problem, device) is None:
                yield Selection(record, record.default(problem, device), because)


def choice_now(problem: Problem, device: torch.device, pass_name: str, in_graph: bool) -> Selection:
    """The choice that an eager call has now, or one in a CUDA graph; no plan is made for it.

    Raises VariantNotApplicable where a forced variant does not serve the problem.
    """
    with current(device):
        return _choose(problem, device, forced.get(), deterministic_algorithms(), in_graph, pass_name)


def plan_of(problem: Problem, device: torch.device, **chosen: Selection) -> Plan:
    """An uncached plan for the tuner: ``chosen`` by pass, the other passes without any stored entry; no standby."""
    return Plan(problem, device, partial(untuned, problem, device), chosen)


def forget() -> None:
    """Drops every plan and table; call it after the tuned choices have changed."""
    global generation
    _by_call.clear()
    _by_problem.clear()
    _forget_repeated()
    forget_tables()
    generation += 1


def save_choices(path: str | os.PathLike) -> int:
    """Writes the choices of this process's calls to a file for :func:`pin_choices`; returns the number of problems.

    The file holds a variant and a config by problem, kind of device and pass, those for CUDA graphs by themselves. It
    omits choices that :func:`tritonconv.use` forced, and calls from before the choices changed last (a tuning run,
    :func:`pin_choices`). It includes kernels that are still being compiled. Raises StoreError where the file cannot be
    written.
    """
    choices: dict[str, dict[str, tuple[str, Config]]] = {}
    for (problem, device, named, _, in_graph), entry in list(_by_problem.items()):
        if not named and entry.chosen:
            passes = choices.setdefault(pins.text(problem, device, in_graph), {})
            passes.update({name: (choice.variant.name, choice.config) for name, choice in entry.chosen.items()})
    pins.write(choices, Path(path))
    return len(choices)


def pin_choices(path: str | os.PathLike | None) -> None:
    """Pins later calls to the choices that :func:`save_choices` wrote, here or on another machine; None unpins them.

    A run under pinned choices repeats bit for bit: it depends on no tuned table, no model and no compiler's delay. A
    problem outside the file is chosen as usual. The variable TRITONCONV_CHOICES names a file for a whole program.
    Raises StoreError where the file cannot be read; a call raises VariantNotApplicable where a pinned variant does not
    serve it.
    """
    pins.pin(None if path is None else Path(path))
    forget()


def wait_until_compiled(seconds: float | None = None) -> bool:
    """Waits for the kernels of all calls so far; False where that takes longer than ``seconds``.

    On a GPU a layer's first calls run torch's own while its kernels are compiled in the background: a benchmark, or a
    capture of a CUDA graph, calls the model once, waits, and calls it again. Returns at once where nothing is compiled.
    """
    from tritonconv.kernels import triton_background

    return triton_background.wait(seconds)


@contextlib.contextmanager
def watch() -> Iterator[list[tuple[Problem, torch.device]]]:
    """Lists, after the block, the distinct (problem, device) of its calls, in their order."""
    global _by_call, _by_problem, generation
    problems: list[tuple[Problem, torch.device]] = []
    outer = _by_call, _by_problem
    _by_call, _by_problem = {}, {}
    _forget_repeated()
    generation += 1  # makes a compiled graph look its plans up, so that they are listed too
    try:
        yield problems
    finally:
        problems += dict.fromkeys((problem, device) for problem, device, *_ in _by_problem)
        _by_call, _by_problem = outer
        _forget_repeated()
