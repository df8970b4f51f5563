"""`.npy` files that grow while they are written, and are mapped into memory when they are read."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike, NDArray


class ArrayWriter:
    """Writes a one-dimensional `.npy` file of any length, without holding its values."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._count = 0
        self._file = path.open("wb")
        self._write_header()
        self._begin = self._file.tell()

    def append(self, values: ArrayLike) -> None:
        """Append values.

        Raises:
            OverflowError: An integer does not fit.
        """
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self._count += array.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # numpy pads the header, so that a length with more digits fits.
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._begin
        self._file.close()

    def _write_header(self) -> None:
        npy.write_array_header_1_0(
            self._file,
            {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._count,)},
        )


def mapped(path: Path) -> NDArray[Any]:
    """Return the array of a `.npy` file, mapped into memory."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def drop_pages(array: NDArray[Any]) -> None:
    """Release the pages of a mapped array that were read; do nothing for other arrays.

    The pages stay in the operating system's cache but no longer count as this process's memory, which would
    otherwise grow to the size of the file.
    """
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


class MappedStrings(Sequence[str]):
    """Strings in two mapped arrays: the bytes of all, and the start of each, `[D + 1]`."""

    def __init__(self, text: NDArray[np.uint8], start: NDArray[np.int64]) -> None:
        self._text = text
        self._start = start

    def __len__(self) -> int:
        return len(self._start) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # slices are not needed
        i = range(len(self))[index]
        return self._text[self._start[i] : self._start[i + 1]].tobytes().decode()
