"""Products of float32 matrices on a CPU, with oneDNN.

For float32 matrices on x86 CPUs, torch calls MKL. On the processor that was measured, a Zen 5, oneDNN takes
about half the time; see docs/performance.md. torch has no public function for a product with oneDNN, so this
module calls the operation with which `torch.compile` computes linear layers.

oneDNN keeps a kernel of about 0.6 MB for each number of rows, so factors get more rows, up to a multiple of
`ROWS`, whose products are not used.

Shape letters: N, M rows of the factors, I their common number of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 16
"""oneDNN multiplies a multiple of this number of rows."""


def product(left_NI: Tensor, right_MI: Tensor) -> Tensor:
    """Return `left_NI @ right_MI.T`, `[N, M]`; with oneDNN, autograd is not supported."""
    if _calls_onednn(left_NI):
        longer = _with_more_rows(left_NI)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(longer, right_MI, None, "none", [], "")  # noqa: SLF001
        return found[: len(left_NI)]
    return left_NI @ right_MI.T


def write_product(left_NI: Tensor, right_MI: Tensor, *, out_NM: Tensor) -> None:
    """Write `left_NI @ right_MI.T` to an existing tensor; oneDNN needs another tensor of this size."""
    if _calls_onednn(left_NI):
        out_NM.copy_(product(left_NI, right_MI))
    else:
        torch.mm(left_NI, right_MI.T, out=out_NM)


def _calls_onednn(factor: Tensor) -> bool:
    on_cpu = factor.device.type == "cpu" and factor.dtype == torch.float32
    return on_cpu and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _with_more_rows(factor: Tensor) -> Tensor:
    """Add the rows that follow in the same storage or, if there are none, a copy with rows of zeros."""
    more = -len(factor) % ROWS
    rows, columns = len(factor) + more, factor.shape[1]
    stored = factor.untyped_storage().nbytes() // factor.itemsize - factor.storage_offset()
    if more and factor.is_contiguous() and rows * columns <= stored:
        return factor.as_strided((rows, columns), (columns, 1))
    return nn.functional.pad(factor, (0, 0, 0, more)) if more else factor
