"""Trying again, with a bound on everything: tries, pauses and the whole."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from orion.common.clock import Clock
from orion.common.errors import TransportError
from orion.common.protocol.refusals import RefusedError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long."""

    attempts_max: int = 6
    pause_s: float = 0.1
    """Upper end of the pause after the first failure; doubles with each further one."""
    pause_s_max: float = 5.0
    total_s_max: float = 60.0
    """No new attempt starts after this long."""


async def retrying(
    attempt: Callable[[], Awaitable[ResultT]],
    *,
    rng: Random,
    clock: Clock,
    policy: RetryPolicy | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> ResultT:
    """The result of the first attempt that succeeds.

    Goes on after TransportError, and after a RefusedError that says when to come again; every other error, and the
    last one when the policy is exhausted, is raised. Pauses are drawn between zero and their upper end, so that many
    who failed at the same time don't return at the same time; a refusal's `retry_after_s` is waited for in full, and
    when that is longer than the policy allows, it is raised.
    """
    policy = policy if policy is not None else RetryPolicy()
    end_s = clock.monotonic_s() + policy.total_s_max
    for failures in range(1, policy.attempts_max + 1):
        pause_s = rng.uniform(0.0, min(policy.pause_s * 2 ** (failures - 1), policy.pause_s_max))
        try:
            return await attempt()
        except TransportError:
            if failures == policy.attempts_max or clock.monotonic_s() + pause_s > end_s:
                raise
        except RefusedError as error:
            if error.retry_after_s is None or failures == policy.attempts_max:
                raise
            pause_s += error.retry_after_s
            if clock.monotonic_s() + pause_s > end_s:
                raise
        await sleep(pause_s)
    raise ValueError("attempts_max must be at least 1")
