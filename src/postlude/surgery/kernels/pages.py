"""Give back the memory of codes that lie in another order now.

The weights of a loaded checkpoint are pages of its file, all in one mapping. A buffer that is given up stays resident
as long as any other tensor of the file is used, so its pages are handed back by name. They are clean copies of what is
on disk: nothing is lost, and were they read again they would be fetched again.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys

from torch import Tensor

__all__ = ["FilePages"]

# MADV_PAGEOUT of Linux 5.4: reclaims pages without a change of what they hold, so a mistake costs time only.
_PAGEOUT = 21


class FilePages:
    """The addresses at which this process has mapped files, as they are now; none but on Linux."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if sys.platform != "linux":
            return
        with open("/proc/self/maps", encoding="utf-8") as lines:
            for line in lines:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/"):
                    start, stop = fields[0].split("-")
                    self._ranges.append((int(start, 16), int(stop, 16)))
        self._libc = ctypes.CDLL(None)

    def release(self, tensor: Tensor) -> bool:
        """Hand back the whole pages of a tensor; False where it is no part of a file."""
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        place = bisect.bisect_right(self._ranges, start, key=lambda one: one[0]) - 1
        if tensor.device.type != "cpu" or place < 0 or stop > self._ranges[place][1]:
            return False
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            # Older kernels refuse, and pages that others hold stay: either way memory is all that differs.
            self._libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _PAGEOUT)
        return True
