"""The jobs that the device was given and has not ended yet. Pure.

Owns how far ahead the device is given work. While one job runs, one more may wait, so that the device goes on at once
instead of idling until this process has heard, decided and told. What waits was decided too early for anything better
that comes in the meantime, so only what would hardly be decided otherwise may wait: a backward (nothing but an inner
step goes before it), and a forward that is over so soon that a backward can wait for it. Where a forward takes long the
gap before it is small beside it.

Invariants: at most one job runs and one waits; they end in the order in which they were given; an inner step is given
to an idle device only, so that every gradient before it is accumulated or refused.
"""

from collections import deque

from orion.miner.events import Backward, Forward, InnerStep, Job

JOBS_MAX = 2
"""One that runs and one that waits."""
FORWARD_AHEAD_S_MAX = 0.2
"""Longest forward that may wait on a stage that has backwards. Between two jobs a device idles for some milliseconds,
1 to 2 % of such a pass."""
DURATION_SHARE = 0.2
"""Weight of a new duration in the mean."""


class DeviceQueue:
    """What one device has before it."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._began_s = 0.0
        """When the job that runs began, as far as is known here."""
        self._forward_s: float | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """In order; the first one runs."""
        return tuple(self._jobs)

    @property
    def has_room(self) -> bool:
        return len(self._jobs) < JOBS_MAX

    @property
    def has_inner_step(self) -> bool:
        """Whether what is accumulated is being used up."""
        return any(isinstance(job, InnerStep) for job in self._jobs)

    @property
    def forwards_are_quick(self) -> bool:
        """Whether a backward can wait for a forward. Not before one was seen."""
        return self._forward_s is not None and self._forward_s <= FORWARD_AHEAD_S_MAX

    def num_applying(self, *, is_last: bool) -> int:
        """Passes among the jobs that will accumulate a gradient, unless they are refused."""
        return sum(isinstance(job, Forward if is_last else Backward) for job in self._jobs)

    def give(self, job: Job, now_s: float) -> None:
        """The device is given a job."""
        assert self.has_room, "the device has enough to do"
        assert not self._jobs or isinstance(job, Forward | Backward), f"{job} is given to a device that is not idle"
        if not self._jobs:
            self._began_s = now_s
        self._jobs.append(job)

    def end(self, now_s: float) -> Job:
        """The job that ran has ended, and the next one runs."""
        assert self._jobs, "a job ended that was never given"
        job = self._jobs.popleft()
        if isinstance(job, Forward):
            taken_s = now_s - self._began_s
            self._forward_s = (
                taken_s if self._forward_s is None else self._forward_s + DURATION_SHARE * (taken_s - self._forward_s)
            )
        self._began_s = now_s
        return job
