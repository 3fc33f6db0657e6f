"""Trying again: only what may pass, within bounds."""

from collections.abc import Callable
from random import Random

import pytest

from orion.common.errors import ConfigError, OrionError, TransportError
from orion.common.net.retry import RetryPolicy, retrying
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError, refused

POLICY = RetryPolicy(attempts_max=4, pause_s=1.0, pause_s_max=3.0, total_s_max=100.0)


class Stage:
    """Time that sleeps make pass, and an operation that fails with the given errors before it succeeds."""

    def __init__(self, errors: list[OrionError]) -> None:
        self.errors = errors
        self.pauses_s: list[float] = []
        self.num_attempts = 0

    def now_s(self) -> float:
        return self.monotonic_s()

    def monotonic_s(self) -> float:
        return sum(self.pauses_s)

    async def sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)

    async def attempt(self) -> str:
        self.num_attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def run(self, policy: RetryPolicy = POLICY) -> str:
        return await retrying(self.attempt, rng=Random(1), clock=self, policy=policy, sleep=self.sleep)


def busy(retry_after_s: float | None) -> RefusedError:
    return refused(RefusalCode.BUSY, "later", retry_after_s)


async def test_goes_on_until_it_succeeds() -> None:
    stage = Stage([TransportError("a"), busy(2.0), TransportError("b")])
    assert await stage.run() == "done"
    assert stage.num_attempts == 4


async def test_pauses_are_random_within_doubling_bounds_and_keep_what_was_asked() -> None:
    stage = Stage([TransportError("a"), TransportError("b"), busy(5.0)])
    await stage.run()
    first, second, third = stage.pauses_s
    assert 0 <= first <= 1
    assert 0 <= second <= 2
    assert 5 <= third <= 5 + 3
    assert first != second


@pytest.mark.parametrize(
    ("error", "num_attempts"),
    [
        (lambda: TransportError("gone"), 4),
        (lambda: busy(0.0), 4),
        (lambda: busy(None), 1),
        (lambda: busy(1000.0), 1),
        (lambda: ConfigError("wrong"), 1),
    ],
    ids=["transport", "retry_after", "refused for good", "longer than the policy", "not ours to repeat"],
)
async def test_gives_up_with_the_last_error(error: Callable[[], OrionError], num_attempts: int) -> None:
    stage = Stage([error() for _ in range(10)])
    with pytest.raises(OrionError) as caught:
        await stage.run()
    assert type(caught.value) is type(error())
    assert stage.num_attempts == num_attempts


async def test_no_attempt_starts_after_the_whole_time() -> None:
    stage = Stage([busy(10.0) for _ in range(100)])
    with pytest.raises(RefusedError):
        await stage.run(RetryPolicy(attempts_max=100, pause_s=0.1, pause_s_max=0.1, total_s_max=35.0))
    assert stage.num_attempts == 4
    assert stage.monotonic_s() <= 35.0
