"""A model of TensorFlow's best-fit-with-coalescing (BFC) allocator, to predict its peak to the byte.

The rules are those of `BFCAllocator` in TensorFlow 2.21 (tsl/framework/bfc_allocator.cc): sizes are
rounded up to 256 bytes; a request takes the smallest free chunk that fits, lowest address first; a
chunk is split only if it is at least twice the request or 128 MiB larger; neighbours that are free are
merged. Regions are asked from the system as the device does it: one region of the whole memory
(`reserved`, TensorFlow's way on a GPU) or regions that double from 2 MiB on.

Separate regions are assumed to lie at falling addresses with gaps, as Linux hands them out; that decides
between free chunks of equal size.
"""

from __future__ import annotations

import bisect

ALIGNMENT_BYTES = 256
HOLE_BYTES = 16 << 10
"""Size of the holes that `placement` leaves for small buffers, so that they cut no large chunks."""
_SPLIT_SLACK_BYTES = 128 << 20
_FIRST_REGION_BYTES = 2 << 20
_REGION_STRIDE = 1 << 48
_TOP_ADDRESS = 1 << 60


def rounded(nbytes: int) -> int:
    """Bytes as the allocator counts them."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class OutOfMemory(Exception):
    """The modelled allocator has no chunk for a request.

    Attributes:
        nbytes: The request.
        in_use_bytes: What was in use at that time.
    """

    def __init__(self, nbytes: int, in_use_bytes: int):
        super().__init__(f"no room for {nbytes} bytes beside {in_use_bytes} bytes in use")
        self.nbytes = nbytes
        self.in_use_bytes = in_use_bytes


class Allocator:
    """Mutable state of one device's allocator.

    Args:
        limit_bytes: Size of the device memory; None for no limit.
        reserved: Whether the device takes its whole memory as one region at the start.

    Attributes:
        in_use_bytes: Sum of the chunks handed out, rounding and slack included.
        peak_bytes: The most that `in_use_bytes` has been.
    """

    def __init__(self, limit_bytes: int | None = None, reserved: bool = True):
        self.in_use_bytes = 0
        self.peak_bytes = 0
        self._limit = limit_bytes if limit_bytes is not None else 1 << 46
        self._pool = 0
        self._regions = 0
        self._next_region = self._limit if reserved or limit_bytes is None else _FIRST_REGION_BYTES
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._free_at: dict[int, int] = {}  # address -> size
        self._free_end: dict[int, int] = {}  # end address -> address
        self._used: dict[int, int] = {}  # address -> size

    def allocate(self, nbytes: int) -> int:
        """Takes a chunk for `nbytes` and returns its address.

        Raises:
            OutOfMemory: If no free chunk and no new region can hold it.
        """
        wanted = rounded(max(nbytes, 1))
        found = bisect.bisect_left(self._free, (wanted, -1))
        if found == len(self._free):
            self._extend(wanted)
            found = bisect.bisect_left(self._free, (wanted, -1))
        size, address = self._free[found]
        self._take_free(size, address)
        if size >= 2 * wanted or size - wanted >= _SPLIT_SLACK_BYTES:
            self._put_free(size - wanted, address + wanted)
            size = wanted
        self._used[address] = size
        self.in_use_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.in_use_bytes)
        return address

    def free(self, address: int) -> None:
        """Gives the chunk at `address` back."""
        size = self._used.pop(address)
        self.in_use_bytes -= size
        after = self._free_at.get(address + size)
        if after is not None:
            self._take_free(after, address + size)
            size += after
        before = self._free_end.get(address)
        if before is not None:
            self._take_free(address - before, before)
            size += address - before
            address = before
        self._put_free(size, address)

    def size(self, address: int) -> int:
        """Bytes of the chunk at `address`, slack included."""
        return self._used[address]

    def layout(self) -> list[tuple[int, int, bool]]:
        """All chunks as (address, bytes, whether in use), by address."""
        used = [(address, size, True) for address, size in self._used.items()]
        return sorted(used + [(address, size, False) for size, address in self._free])

    def _extend(self, wanted: int) -> None:
        available = (self._limit - self._pool) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if wanted > available:
            raise OutOfMemory(wanted, self.in_use_bytes)
        grown = False
        while wanted > self._next_region:
            self._next_region *= 2
            grown = True
        size = min(self._next_region, available)
        if not grown:
            self._next_region *= 2
        self._pool += size
        self._regions += 1
        self._put_free(size, _TOP_ADDRESS - self._regions * _REGION_STRIDE)

    def _put_free(self, size: int, address: int) -> None:
        bisect.insort(self._free, (size, address))
        self._free_at[address] = size
        self._free_end[address + size] = address

    def _take_free(self, size: int, address: int) -> None:
        self._free.pop(bisect.bisect_left(self._free, (size, address)))
        del self._free_at[address]
        del self._free_end[address + size]
