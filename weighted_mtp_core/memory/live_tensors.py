"""Runs torch code on tensors without values, and counts the bytes of the tensors that exist at each moment.

Torch's fake tensors have a shape, a dtype and a storage of a known size, but no memory. So a training step of
a model of any size can be simulated in seconds, and the peak of its memory follows from the code itself
instead of a formula. Buffers inside a kernel are not counted.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BACKWARD, GRADIENTS, LOGITS, CAST = "backward pass", "gradients", "logits of a chunk", "cast parameters"
_READ, _EQUAL, _NONZERO, _UNIQUE = (
    getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "equal", "nonzero", "_unique2")
)
_ADD = torch.ops.aten.add_.Tensor
_TO = torch.ops.aten._to_copy.default  # noqa: SLF001 - torch's name of the operation
_Mode: Any = TorchDispatchMode  # torch has no types for this class
_FakeMode: Any = FakeTensorMode


class _WithoutValues(_FakeMode):  # type: ignore[misc]
    """Makes tensors without values; modules of such tensors can be copied."""

    def __deepcopy__(self, _: Mapping[int, Any]) -> _WithoutValues:
        return self


class LiveTensors(_Mode):  # type: ignore[misc]
    """Counts the bytes of live tensors by part; use it through `without_values`.

    Attributes:
        part: The part to which new tensors belong, except logits, cast parameters and tensors of the
            backward pass.
        chunk: Maximum number of rows and exact number of columns of a matrix that is counted as logits.
        live: Bytes of the tensors that exist now.
        peak: The largest value of `live` since the last call of `restart`.
        at_peak: Bytes by part at the moment of the peak.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self.part = "other"
        self.chunk = (0, 0)
        self.live = self.peak = 0
        self.at_peak: Mapping[str, int] = {}
        self._by_part: dict[str, int] = {}
        self._storages: dict[int, tuple[str, int]] = {}
        self._without_gradient: list[nn.Parameter] = []

    def restart(self) -> None:
        """Begin a new search for the peak."""
        self.peak, self.at_peak = self.live, dict(self._by_part)

    @contextmanager
    def labelled(self, part: str) -> Iterator[None]:
        """Inside this context, new tensors belong to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Make existing tensors belong to `part` from now on."""
        for tensor in tensors:
            key = _identity(tensor.untyped_storage())
            if key in self._storages:
                was, size = self._storages[key]
                self._storages[key] = part, size
                self._by_part[was] -= size
                self._by_part[part] = self._by_part.get(part, 0) + size

    def watch(self, parameters: Iterable[nn.Parameter], *, written: Iterable[nn.Parameter]) -> None:
        """Make the gradients of parameters belong to the part `GRADIENTS` as soon as they exist.

        Args:
            parameters: Parameters whose gradients are written by autograd.
            written: Parameters whose gradients may be written first by other code than autograd.
        """
        for parameter in parameters:
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                register(self._has_gradient)
        self._without_gradient = [each for each in written if each.requires_grad]

    def _has_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.assign(GRADIENTS, [parameter.grad])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the bytes of its result.

        Because tensors have no values, a value that is read is 0, no two tensors are equal, and `nonzero`
        and `unique` return all elements. A sparse tensor is not really added to another tensor, because fake
        tensors do not support this operation.
        """
        del types
        if func is _READ:
            return 0.0 if args[0].dtype.is_floating_point else False if args[0].dtype == torch.bool else 0
        if func is _EQUAL:
            return False
        if func is _NONZERO:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func is _UNIQUE:
            return args[0].flatten().clone(), torch.zeros_like(args[0]), args[0].new_zeros(args[0].numel())
        if func is _ADD and isinstance(args[1], Tensor) and args[1].is_sparse:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is _TO and isinstance(args[0], nn.Parameter):  # autocast keeps the result
            self._count(result, CAST)
        self._mode.fake_tensor_converter.tensor_memo.clear()  # with its references, `module.to` would fail
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and not each.is_sparse:  # parts of a sparse tensor have been counted
                self._count(each)
        for parameter in [each for each in self._without_gradient if each.grad is not None]:
            self._has_gradient(parameter)
            self._without_gradient.remove(parameter)
        return result

    def _count(self, tensor: Tensor, part: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = _identity(storage)
        if key in self._storages:
            return
        size, part = storage.nbytes(), part or self._part_of(tensor)
        self._storages[key] = part, size
        self._by_part[part] = self._by_part.get(part, 0) + size
        self.live += size
        weakref.finalize(storage, self._forget, key)
        if self.live > self.peak:
            self.restart()

    def _part_of(self, tensor: Tensor) -> str:
        most, columns = self.chunk
        if tensor.ndim == 2 and tensor.shape[1] == columns and tensor.shape[0] <= most:
            return LOGITS
        return BACKWARD if _in_backward() else self.part

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self._by_part[part] -= size
        self.live -= size


def _identity(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001 - torch has no other name for it


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001


@contextmanager
def without_values() -> Iterator[LiveTensors]:
    """Make all new tensors inside this context tensors without values; yield the counter of their bytes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        mode = _WithoutValues(allow_non_fake_inputs=True)
        with mode, LiveTensors(mode) as live:
            yield live
