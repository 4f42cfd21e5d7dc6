"""src/processes/heap.py: what a process holds shrinks when the holes have grown."""

import torch

from src.processes import heap
from src.processes.heap import GROWTH, HeapTrimmer


def test_freed_memory_goes_back_when_holes_have_grown() -> None:
    heap.keep_large_blocks()
    heap.release_memory()  # holes that earlier tests of this process left would take some of the blocks
    trimmer = HeapTrimmer()
    for _ in range(3):
        trimmer.after_step()
    before = heap.resident_memory()
    blocks = [torch.ones(1 << 20) for _ in range(int((GROWTH - 0.9) * before) // 2**22)]  # 4 MiB each
    fence = torch.ones(1 << 18)  # at the end of the heap: what lies below it is not handed back by itself
    held = heap.resident_memory()
    del blocks
    assert heap.resident_memory() > 0.99 * held > GROWTH * before
    trimmer.after_step()
    assert heap.resident_memory() < 1.1 * before and fence.sum() == 1 << 18
