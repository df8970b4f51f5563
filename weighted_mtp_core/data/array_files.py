"""Write `.npy` files piece by piece, and map `.npy` files into memory for reading."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike, NDArray


@contextmanager
def array_appender(path: Path, dtype: DTypeLike) -> Iterator[Callable[[ArrayLike], None]]:
    """Open a new one-dimensional `.npy` file and yield a function that appends values to it.

    Raises:
        OverflowError: An appended Python integer does not fit into `dtype`.
    """
    element = np.dtype(dtype)
    count = 0

    def append(values: ArrayLike) -> None:
        nonlocal count
        array = np.asarray(values, dtype=element)
        file.write(array.tobytes())
        count += array.size

    def write_header() -> int:
        header = {"descr": npy.dtype_to_descr(element), "fortran_order": False, "shape": (count,)}
        npy.write_array_header_1_0(file, header)
        return file.tell()

    with path.open("wb") as file:
        begin = write_header()
        yield append
        file.seek(0)
        assert write_header() == begin  # numpy pads the header, so that a larger count fits into it


def mapped(path: Path) -> NDArray[Any]:
    """Return the array of a `.npy` file, mapped into memory."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def drop_pages(array: NDArray[Any]) -> None:
    """Release the pages of a mapped array that have been read; do nothing where this is not possible.

    The pages stay in the operating system's cache but no longer count as this process's memory, which would
    otherwise grow to the size of the file.
    """
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


@frozen(eq=False)
class MappedStrings(Sequence[str]):
    """D strings in two mapped arrays: their bytes, and D + 1 offsets at which strings begin or end."""

    text: NDArray[np.uint8]
    start: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # slices are not needed
        i = range(len(self))[index]
        return self.text[self.start[i] : self.start[i + 1]].tobytes().decode()
