"""Sums the gradients of several processes in buckets, while the last backward pass of a step still runs.

torch's DistributedDataParallel cannot be used, because it expects one backward pass through one module, and a
gradient from autograd for each parameter. In stage 2, each head has a backward pass of its own, and the loss
writes the gradient of the unembedding without autograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from attrs import define, field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.runtime.distributed import Distributed


@define(eq=False)
class _Bucket:
    """Parameters whose gradients are sent together.

    Attributes:
        parameters: The parameters.
        waiting: Parameters without a final gradient.
        unused: Parameters without a gradient in this process when the bucket was sent.
    """

    parameters: list[nn.Parameter]
    waiting: set[nn.Parameter] = field(init=False)
    unused: set[nn.Parameter] = field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        self.waiting = set(self.parameters)

    def launch(self) -> dist.Work:
        """Start the sum; the gradients become views of the bucket, so the sums need not be copied back."""
        self.unused = {p for p in self.parameters if p.grad is None}
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = gradients[0].reshape(-1)
        if len(gradients) > 1:
            flat = torch.cat([each.reshape(-1) for each in gradients])
        work: dist.Work = dist.all_reduce(flat, async_op=True)
        sizes = [each.numel() for each in gradients]
        for parameter, part in zip(self.parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        return work


class GradientReduction:
    """The sum of one step's gradients over the processes; use it as a context around all backward passes.

    At the end of the block, every gradient is the sum over the processes. A parameter without a gradient in
    any process has none afterwards, so that the optimiser leaves it as it is, as with one process. After a
    call of `begin`, a bucket is sent as soon as its gradients are final. All processes send the same buckets
    in the same order, even if a parameter gets no gradient in some processes. FSDP2 sums the gradients of
    sharded parameters itself. If there are sharded parameters, all other sums start at the end of the block,
    so that all processes execute collective operations in the same order.

    Args:
        parameters: The parameters; frozen and sharded parameters are left out.
        last: The parameters that get a gradient after `begin`, in the order of the forward pass.
        distributed: The processes that train together; a single process sums nothing.
        bucket_bytes: Maximum size in bytes of a bucket of several parameters.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        last: Iterable[nn.Parameter],
        distributed: Distributed,
        bucket_bytes: int,
    ) -> None:
        trained = [] if distributed.is_single_process else [p for p in parameters if p.requires_grad]
        whole = {p: None for p in trained if not isinstance(p, DTensor)}
        self._overlaps = len(whole) == len(trained)
        self._last = [p for p in last if p in whole][::-1]  # in the order of the backward pass
        late = set(self._last)
        self._early = [p for p in whole if p not in late]
        self._buckets = [*_filled(self._early, bucket_bytes), *_filled(self._last, bucket_bytes)]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._works: list[dist.Work] = []
        self._hooks: list[RemovableHandle] = []

    def begin_at(self, tensor: Tensor) -> None:
        """Call `begin` when a backward pass reaches `tensor`, which depends on all parameters in `last`."""
        if tensor.requires_grad and self._buckets:
            tensor.register_hook(lambda _: self.begin())  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Start to send buckets; call this when the last backward pass begins.

        With several processes and without sharded parameters, the last backward pass must add at most one
        gradient to each parameter in `last`; a second gradient raises `RunFailedError`.
        """
        if not self._overlaps:
            return
        for parameter in self._last:
            hook = parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        for bucket in self._buckets:
            bucket.waiting.difference_update(self._early)
        self._launch_ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            for bucket in self._buckets:
                bucket.waiting.clear()
            self._launch_ready()
            for work in self._works:
                work.wait()
            self._drop_unused()

    def _note(self, parameter: Tensor) -> None:
        """Record that a parameter's gradient is final."""
        assert isinstance(parameter, nn.Parameter)
        waiting = self._bucket_of[parameter].waiting
        if parameter not in waiting:
            raise RunFailedError(
                "a backward pass added a gradient to the same parameter twice, after it was sent to the "
                "other processes",
                hint="set `model.activation_checkpointing = false`, or train with one process",
            )
        waiting.remove(parameter)
        self._launch_ready()

    def _launch_ready(self) -> None:
        """Send the next buckets, in order, up to the first bucket that waits for a gradient."""
        while len(self._works) < len(self._buckets) and not self._buckets[len(self._works)].waiting:
            self._works.append(self._buckets[len(self._works)].launch())

    def _drop_unused(self) -> None:
        """Remove the gradients of parameters that got none in any process; `launch` created them as zeros.

        Only a process with unused parameters reads the counts, because a read makes the host wait for a GPU.
        """
        parameters = [p for bucket in self._buckets for p in bucket.parameters]
        if not parameters:
            return
        unused: set[nn.Parameter] = set().union(*(bucket.unused for bucket in self._buckets))
        users = torch.ones(len(parameters), device=parameters[0].device)
        for index, parameter in enumerate(parameters):
            if parameter in unused:
                users[index] = 0
        dist.all_reduce(users)
        if unused:
            for parameter, count in zip(parameters, users.tolist(), strict=True):
                if count == 0:
                    parameter.grad = None


def _filled(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Return consecutive parameters of one dtype and device in buckets of at most `bucket_bytes`.

    A parameter of more than `bucket_bytes` has a bucket of its own.
    """
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        same = groups and (groups[-1][0].dtype, groups[-1][0].device) == (parameter.dtype, parameter.device)
        if not same or size + parameter.nbytes > bucket_bytes:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.nbytes
    return [_Bucket(group) for group in groups]
