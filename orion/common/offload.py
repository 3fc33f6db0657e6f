"""Where work goes that would hold up whoever waits: another thread in production, the same place in the simulator.

Coroutines that compute take an `Offload` instead of calling asyncio themselves, so that they also run where there is
no event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

ResultT = TypeVar("ResultT")


class Offload(Protocol):
    """Computes a function of no arguments and gives its result; what it raises is raised."""

    async def __call__(self, function: Callable[[], ResultT]) -> ResultT: ...


async def in_thread(function: Callable[[], ResultT]) -> ResultT:
    """In one of the event loop's threads."""
    return await asyncio.to_thread(function)


async def in_place(function: Callable[[], ResultT]) -> ResultT:
    """At once, by the caller."""
    return function()


class OwnThread:
    """In a thread of its own, one function after the other: for a device. Close it in the end."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def __call__(self, function: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        """Ends the thread once what it computes is through; what still waits is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)
