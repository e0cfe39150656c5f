"""The exchange of halos, point to point, and the sum over a group; neither records anything for autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from tritonconv.arguments import layout_of
from tritonconv.distributed.slabs import Exchange, Share, Transfer
from tritonconv.problem import LAYOUTS


class Halo:
    """One rank's end of an exchange: x (n, c, ...) is its slab along ``axis``.

    Planes travel dense in NCDHW, one message for a pair of ranks and a direction. Every sum is made in the order of
    the ranks, so the same slabs give the same bits.
    """

    def __init__(self, plan: Exchange, rank: int, axis: int, group: dist.ProcessGroup) -> None:
        self.plan, self.axis, self.group = plan, axis, group
        self.share: Share = plan.shares[rank]
        self.sent = [each for each in plan.transfers if each.source == rank]
        self.read = [each for each in plan.transfers if each.target == rank]

    def receive(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The planes of x that other ranks own and this rank's planes of y need, by owner."""
        return self.start(x)()

    def start(self, x: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        """Starts to receive; the function waits for the planes of :meth:`receive` and returns them."""
        begin = self.share.x[0]
        parts = [(each.target, self._cut(x, each, begin)) for each in self.sent]
        received = [(each.source, self._empty(x, each)) for each in self.read]
        wait = self._swap(parts, received)

        def pieces() -> list[torch.Tensor]:
            wait()
            return [piece for _, piece in received]

        return pieces

    def join(self, x: torch.Tensor, pieces: Sequence[torch.Tensor], share: Share | None = None) -> torch.Tensor:
        """All planes of x that a share reads, the plane of zeros before them; ``pieces`` are those received.

        ``share`` is this rank's, or that of some of its planes of y.
        """
        share = self.share if share is None else share
        like, parts = LAYOUTS[layout_of(x, x)], []
        if share.zeros:
            parts.append(x.new_zeros(self._shape(x, 1)))
        owned = [(each.begin, each.end, piece) for each, piece in zip(self.read, pieces, strict=True)]
        for begin, end, planes in sorted([*owned, (*share.x, x)], key=lambda part: part[:2]):
            first, last = max(begin, share.reads[0]), min(end, share.reads[1])
            if first < last:
                whole = (first, last) == (begin, end)
                part = planes if whole else planes.narrow(self.axis, first - begin, last - first)
                parts.append(part if planes is x else part.contiguous(memory_format=like))
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def give_back(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of this rank's slab, from the one of all planes that it read (:meth:`join`), which it takes."""
        (begin, end), (low, high) = self.share.x, self.share.reads
        start = low - self.share.zeros
        parts = [(each.source, self._cut(grad, each, start)) for each in self.read]
        received = [(each.target, self._empty(grad, each)) for each in self.sent]
        self._swap(parts, received)()
        first, last = max(begin, low), min(end, high)
        if (first, last) == (begin, end):
            grad_x = grad.narrow(self.axis, first - start, last - first)
        else:
            grad_x = grad.new_zeros(self._shape(grad, end - begin))
            if first < last:
                own = grad.narrow(self.axis, first - start, last - first)
                grad_x.narrow(self.axis, first - begin, last - first).copy_(own)
        for each, (_, piece) in zip(self.sent, received, strict=True):  # by target
            grad_x.narrow(self.axis, each.begin - begin, each.planes).add_(piece)
        return grad_x

    def _shape(self, like: torch.Tensor, planes: int) -> tuple[int, ...]:
        return (*like.shape[: self.axis], planes, *like.shape[self.axis + 1 :])

    def _cut(self, tensor: torch.Tensor, planes: Transfer, begin: int) -> torch.Tensor:
        return tensor.narrow(self.axis, planes.begin - begin, planes.planes).contiguous()

    def _empty(self, like: torch.Tensor, planes: Transfer) -> torch.Tensor:
        return like.new_empty(self._shape(like, planes.planes))

    def _swap(
        self, parts: list[tuple[int, torch.Tensor]], received: list[tuple[int, torch.Tensor]]
    ) -> Callable[[], None]:
        """Sends the parts and fills the tensors for the received ones, each given with the other rank, until the
        function that it returns does."""
        ends = [(dist.irecv, received), (dist.isend, parts)]
        operations = [
            dist.P2POp(send, tensor, group=self.group, group_peer=peer)
            for send, messages in ends
            for peer, tensor in messages
            if tensor.numel()  # an empty batch sends nothing
        ]
        works = dist.batch_isend_irecv(operations) if operations else ()

        def wait() -> None:
            for work in works:
                work.wait()
            operations.clear()  # until here they hold the tensors that are sent

        return wait


def total(group: dist.ProcessGroup, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of the tensors, all of one dtype, over the group: one all-reduce, of half types in float32."""
    dtype = tensors[0].dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    sums = flat.to(dtype).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(sums, tensors, strict=True)]
