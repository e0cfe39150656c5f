"""A plan: the choice for each of the three passes of one problem, and its launch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from tritonconv.autotune import rules
from tritonconv.autotune.choose import Selection
from tritonconv.bounded import remember
from tritonconv.device import current
from tritonconv.kernels.torch_layout import filled, to_layout
from tritonconv.kernels.torch_native import native_gradients
from tritonconv.kernels.weight_orders import AS_GIVEN
from tritonconv.problem import PASSES, Problem

if TYPE_CHECKING:
    from tritonconv.epilogue import Epilogue
    from tritonconv.kernels.triton_program import Program
    from tritonconv.kernels.triton_replay import Replay

# Of a packed weight that is kept from a forward to its backward. To pack it anew moves twice as much: 16 us at the
# 4 TB/s of an H200's memory, and such a layer's products take far longer.
MOST_KEPT_BYTES = 32 << 20
AUTOGRAD_S = 120e-6  # of a training step, between other calls
MOST_EPILOGUES = 16  # of one problem; a slope that a program computes makes ever new ones
# The passes that the function of a name runs: see :attr:`Plan.replays`.
REPLAYED = {name: (name,) for name in PASSES} | {"forward_and_pack": PASSES[:1], "backward": PASSES[1:]}


class Plan:
    """The choices of one problem, each made when its pass is first needed. The methods return dense tensors in the
    problem's layout.

    A torch formulation gets its operands dense in that layout. A Triton kernel takes any strides. ``chosen`` holds
    choices by pass; ``choose`` makes the others. Where ``standby`` is set, torch's own runs until a chosen kernel is
    compiled, and for good where it cannot be compiled or launched.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        choose: Callable[[str], Selection],
        chosen: Mapping[str, Selection] = MappingProxyType({}),
        standby: bool = False,
    ) -> None:
        self.problem, self.device, self.standby = problem, device, standby
        self._choose, self.chosen = choose, dict(chosen)
        self.replays: dict[str, Replay] = {}  # of Triton choices, by the names of the functions below
        self._with: dict[tuple[Epilogue, bool], Callable[..., Any]] = {}
        # Makes that of the same call with an epilogue, which may have a choice of its own; None: it has this plan's.
        self.plan_with: Callable[[Epilogue], Plan] | None = None

    def choice(self, pass_name: str) -> Selection:
        """Raises VariantNotApplicable where a forced variant does not serve the problem."""
        selection = self.chosen.get(pass_name)
        if selection is None:
            with current(self.device):
                selection = self.chosen[pass_name] = self._choose(pass_name)
        return selection

    @cached_property
    def torch_alone(self) -> tuple | None:
        """torch's arguments where every pass is torch's own and torch can express the crops, else None.

        Such a call goes straight to torch and its autograd. So does a call whose forward alone is another, where that
        saved less than the road through our autograd takes.
        """
        own = [self._torchs(name) for name in PASSES]  # a list, so that any forced variant that does not serve raises
        if all(own):
            return self.torch_forward
        saved = self.choice("forward").saved_s
        little = all(own[1:]) and saved is not None and saved < AUTOGRAD_S
        return self.problem.shortest_arguments if little and self.problem.torch_crop.exact else None

    @cached_property
    def torch_forward(self) -> tuple | None:
        """As ``torch_alone``, where only the forward must be torch's own: for a call that needs no gradient."""
        if not self.problem.torch_crop.exact or not self._torchs("forward"):
            return None
        return self.problem.shortest_arguments

    @cached_property
    def writes_out(self) -> bool:
        """The forward writes a tensor that is given for y itself; else the result is copied there."""
        variant = self.choice("forward").variant
        return variant.launches is not None or variant.strided

    @cached_property
    def takes_room(self) -> bool:
        """The forward that writes a given tensor takes ``room=`` beside it: memory for its products."""
        return self.choice("forward").variant.takes_room is not None

    @cached_property
    def kept_order(self) -> int | None:
        """The order of the weight's packed copy that the forward keeps for backward-data; None where it keeps none.

        Both are Triton kernels that read the same copy, and it is not too large to be held from one to the other.
        """
        forward, data = self.choice("forward"), self.choice("backward_data")
        if forward.variant.launches is None or data.variant.launches is None:
            return None
        order = forward.config.get("WEIGHT", AS_GIVEN)
        nbytes = math.prod(self.problem.weight_shape) * self.problem.dtype.itemsize
        same = order != AS_GIVEN and order == data.config.get("WEIGHT", AS_GIVEN)
        return order if same and nbytes <= MOST_KEPT_BYTES else None

    def lasting(self, recorded: bool) -> Plan | None:
        """The plan of later calls too; None where the first ones choose it. ``recorded``: the call needs gradients."""
        return self

    def stage(self, run: Callable[[Plan], Any], beside: int) -> Any:
        """``run``, a decoder's stage with ``beside`` channels of the skip; of an open trial's plan, a contestant's."""
        return run(self)

    # The passes as functions of the operands. A Triton kernel's takes operands of any strides, and works out its
    # launches once for each kind of them; a torch formulation's takes them dense in the problem's layout.

    @cached_property
    def forward(self) -> Callable[..., torch.Tensor]:
        """x (n, c_in, d, h, w), weight, bias (c_out,) or None, and a tensor for y or None -> y (n, c_out, od, oh, ow).

        The tensor for y may have any strides that do not overlap.
        """
        choice = self.choice("forward")
        if choice.variant.launches is not None:
            return self.replay(partial(choice.variant.launches, self.problem, choice.config), "forward")
        return self._as_it_likes(choice)

    @cached_property
    def forward_and_pack(self) -> Callable[..., tuple]:
        """As ``forward`` -> (y, the packed weight for :attr:`backward_data`, or None).

        It is for a plan that has a ``kept_order``.
        """
        launches = self.choice("forward").variant.launches
        assert launches is not None  # kept_order looked
        both = self.packing(partial(launches, self.problem, self.choice("forward").config))
        return self.replay(both, "forward_and_pack")

    def packing(self, launches: Callable[..., Any]) -> Callable[..., tuple]:
        """``launches``, and the copy that it reads of its second operand, the weight."""
        from tritonconv.kernels.triton_weights import packed  # needs Triton

        order = self.kept_order
        assert order is not None  # the caller looked

        def both(x, weight, *rest):
            copy = packed(weight, order)
            y = launches(x, weight, *rest)
            return y, None if copy is weight else copy

        return both

    def forward_with(self, epilogue: Epilogue, pack: bool = False) -> Callable[..., Any]:
        """As ``forward``, then the epilogue: x, weight, bias, residual, slopes, and a tensor for y or None -> y; with
        ``pack`` also the packed weight or None, as ``forward_and_pack``. See :mod:`tritonconv.epilogue`.

        The chosen variant computes it where it says that it can, else torch's operations do in y's own memory.
        """
        function = self._with.get((epilogue, pack))
        if function is None:
            from tritonconv import epilogue_forward  # a plain call has none

            own = self if self.plan_with is None else self.plan_with(epilogue.kind)
            function = epilogue_forward.forward_with(own, epilogue, pack)
            remember(self._with, (epilogue, pack), function, MOST_EPILOGUES)
        return function

    def takes(self, epilogue: Epilogue) -> bool:
        """The chosen forward variant computes the epilogue itself."""
        choice = self.choice("forward")
        return choice.variant.finishes(self.problem, choice.config, epilogue)

    @cached_property
    def backward_data(self) -> Callable[..., torch.Tensor]:
        """grad_y (n, c_out, od, oh, ow), weight, and a packed weight or None -> grad_x (n, c_in, d, h, w)."""
        choice = self.choice("backward_data")
        if choice.variant.launches is not None:
            return self.replay(self._data_launches, "backward_data")
        return self._as_it_likes(choice)

    @cached_property
    def backward_weight(self) -> Callable[..., tuple]:
        """x, grad_y, need_bias -> (grad_weight, grad_bias or None)."""
        choice = self.choice("backward_weight")
        if choice.variant.launches is not None:
            return self.replay(partial(choice.variant.launches, self.problem, choice.config), "backward_weight")
        return self._as_it_likes(choice)

    @cached_property
    def backward(self) -> Callable[..., tuple]:
        """x, weight, grad_y, need_bias, and a packed weight or None -> (grad_x, grad_weight, grad_bias or None).

        The two passes share their copies of operands, and are one kernel where both are halves of one.
        """
        data, weight = (self.choice(name).variant for name in PASSES[1:])
        if data.launches is not None and weight.launches is not None:
            return self.replay(self._backward_launches, "backward")
        if all(self._torchs(name) for name in PASSES[1:]):
            return self._torchs_backward
        prepare = data.prepare if data.prepare is weight.prepare else None

        def in_two_calls(x, weight, grad_y, need_bias, packed=None):
            grad_y = self._operand(self.choice("backward_data"), grad_y)
            if prepare is None:
                return self.backward_data(grad_y, weight, packed), *self.backward_weight(x, grad_y, need_bias)
            with _no_autocast(grad_y):
                prepared = prepare(self.problem, grad_y)
            grad_x = self.backward_data(grad_y, weight, packed, prepared)
            return grad_x, *self.backward_weight(x, grad_y, need_bias, prepared)

        return in_two_calls

    def _torchs_backward(self, x, weight, grad_y, need_bias, packed=None):
        """torch's two gradients by one operation, which shares its copies of the operands."""
        choice = self.choice("backward_data")
        with _no_autocast(grad_y):
            grad_x, *rest = native_gradients(
                self.problem, self._operand(choice, grad_y), self._operand(choice, x), weight, (True, True, need_bias)
            )
        return to_layout(grad_x, self.problem.memory_format), *rest

    def _keep_packed(self, weight, packed) -> None:
        from tritonconv.kernels.triton_weights import keep_packed  # needs Triton

        if packed is not None:
            keep_packed(weight, self.choice("backward_data").config["WEIGHT"], packed)

    def _data_launches(self, grad_y, weight, packed=None):
        choice = self.choice("backward_data")
        assert choice.variant.launches is not None  # the caller looked
        self._keep_packed(weight, packed)
        return choice.variant.launches(self.problem, choice.config, grad_y, weight)

    def _backward_launches(self, x, weight, grad_y, need_bias, packed=None):
        data, own = self.choice("backward_data").variant, self.choice("backward_weight")
        if data.joint is not None and data.joint is own.variant.joint:
            self._keep_packed(weight, packed)
            return data.joint(self.problem, own.config, x, weight, grad_y, need_bias)
        assert own.variant.launches is not None  # the caller looked
        grad_x = self._data_launches(grad_y, weight, packed)
        return grad_x, *own.variant.launches(self.problem, own.config, x, grad_y, need_bias)

    def replay(self, launches: Callable[..., Any], name: str, standby: Callable[..., Any] | None = None) -> Replay:
        from tritonconv.kernels.triton_replay import Replay  # needs Triton

        self.replays[name] = Replay(launches, standby or self.stand_in(name))
        return self.replays[name]

    def _as_it_likes(self, choice: Selection) -> Callable[..., Any]:
        """A variant's ``launch`` as the function of a pass.

        A torch formulation gets its operands in the problem's layout, and the answer is brought into it.
        """
        launch, problem, config = choice.variant.launch, self.problem, choice.config
        assert launch is not None  # the caller looked
        layout, of = problem.memory_format, partial(self._operand, choice)
        strides = torch.empty(problem.y_shape, device="meta", memory_format=layout).stride()

        def forward(
            x, weight, bias, out=None, **more
        ):  # the operands of an epilogue and the room, of a variant that takes them
            with _no_autocast(x):
                if out is None:
                    y = to_layout(launch(problem, config, of(x), weight, bias, **more), layout)
                    # A view may have another stride along an axis of one element than torch's answer.
                    return y if y.stride() == strides else y.as_strided(y.shape, strides)
                if choice.variant.strided:
                    return launch(problem, config, of(x), weight, bias, out=out, **more)
                return filled(out, launch(problem, config, of(x), weight, bias, **more))

        def backward_data(grad_y, weight, packed=None, *prepared):
            # A backward pass that runs inside an autocast region must not be lowered a second time.
            with _no_autocast(grad_y):
                return to_layout(launch(problem, config, of(grad_y), weight, *prepared), layout)

        def backward_weight(x, grad_y, need_bias, *prepared):
            with _no_autocast(x):
                return launch(problem, config, of(x), of(grad_y), need_bias, *prepared)

        functions: tuple[Callable[..., Any], ...] = forward, backward_data, backward_weight
        return functions[PASSES.index(choice.variant.pass_name)]

    def _operand(self, choice: Selection, tensor: torch.Tensor) -> torch.Tensor:
        strided = choice.variant.strided and choice.variant.pass_name != "forward"
        if choice.variant.backend == "triton" or strided:
            return tensor
        return to_layout(tensor, self.problem.memory_format)

    def compile(self, pass_name: str) -> bool:
        """Compiles the Triton kernels of a pass's choice for dense operands in the problem's layout; runs nothing.
        Returns whether the kernels are ready."""
        if self.choice(pass_name).variant.launches is None:
            return False
        try:
            with current(self.device):
                self._program(pass_name).compile()
        except Exception:
            return False
        return True

    def launched(self, pass_name: str) -> tuple[tuple[str, ...], int]:
        """(the names of the kernels of a pass's Triton choice, the bytes of their workspace) for operands as in
        :meth:`compile`."""
        with current(self.device):
            program = self._program(pass_name)
        return tuple(kernel.name for kernel in program.kernels), program.workspace_bytes

    def _program(self, pass_name: str) -> Program:
        choice = self.choice(pass_name)
        return choice.variant.program(self.problem, choice.config)

    def stand_in(self, name: str) -> Callable[..., Any] | None:
        """torch's own in the place of a function's Triton launches; None where calls wait for the compiler."""
        passes = REPLAYED.get(name, ())  # none of a forward with an epilogue, whose stand-in is made apart
        if not self.standby or not passes or any(self.choice(each).forced for each in passes):
            return None
        own = [self._torchs_own(each) for each in passes]
        if name == "forward_and_pack":
            return lambda *operands: (own[0](*operands), None)
        if len(own) == 1:
            return own[0]
        return lambda x, weight, grad_y, need_bias, packed=None: (
            own[0](grad_y, weight, packed), *own[1](x, grad_y, need_bias),
        )  # fmt: skip

    def _torchs_own(self, pass_name: str) -> Callable[..., Any]:
        """torch's own operation as a function of the operands of the pass's Triton launches."""
        record, _ = rules.choose(self.problem, self.device, pass_name)
        return self._as_it_likes(Selection(record, record.default(self.problem, self.device), "torch's own"))

    def _torchs(self, pass_name: str) -> bool:
        return self.choice(pass_name).variant.name == rules.FALLBACK[pass_name]


_NOTHING = contextlib.nullcontext()


def _no_autocast(tensor):
    # A backward pass that runs inside an autocast region must not be lowered a second time.
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
