"""BufferPool: memory comes back when the last view of it goes, and not before."""

import threading

import numpy as np
import torch

from orion.common.net.buffer_pool import KEPT_BYTES_MAX, KEPT_PER_SIZE_MAX, BufferPool

SIZE = 1 << 20


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def test_memory_is_used_again_once_it_is_let_go() -> None:
    pool = BufferPool()
    view = pool.take(SIZE)
    assert (len(view), view.readonly, pool.kept_bytes) == (SIZE, False, 0)
    first = address(view)
    del view
    assert pool.kept_bytes == SIZE
    assert address(pool.take(SIZE)) == first
    assert pool.kept_bytes == SIZE, "nobody held it"


def test_a_tensor_that_looks_at_a_part_keeps_all_of_it() -> None:
    pool = BufferPool()
    view = pool.take(SIZE)
    tensor = torch.frombuffer(view[8:24], dtype=torch.uint8).view(torch.float32)[1:]
    tensor.fill_(1.0)
    del view
    other = pool.take(SIZE)
    other[:] = bytes(SIZE)
    assert tensor.tolist() == [1.0] * 3
    del tensor
    assert pool.kept_bytes == SIZE


def test_another_thread_may_let_go_last() -> None:
    pool = BufferPool()
    held = [pool.take(SIZE)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert pool.kept_bytes == SIZE


def test_few_are_kept_and_none_that_are_large() -> None:
    pool = BufferPool()
    held = [pool.take(SIZE) for _ in range(2 * KEPT_PER_SIZE_MAX)]
    held.clear()
    assert pool.kept_bytes == KEPT_PER_SIZE_MAX * SIZE
    large = pool.take(KEPT_BYTES_MAX + 1)
    del large
    assert pool.kept_bytes == KEPT_PER_SIZE_MAX * SIZE
    held = [pool.take(KEPT_BYTES_MAX // 4 + number) for number in range(8)]
    held.clear()
    assert KEPT_BYTES_MAX / 2 < pool.kept_bytes <= KEPT_BYTES_MAX
