"""When phases began, what each miner did when within them, and what happened with its reason: kept for the page.

Watches what the core has handled, so a restart's replay of the journal gives the same of the events it still has. Pure;
decides nothing, and nothing is decided by it. Bounded: the newest outer steps of each stage, the newest lines of the
log.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from orion.common.ids import Digest, Hotkey
from orion.common.protocol.messages import Applied, CheckpointUploaded, Join, Reduced, Uploaded
from orion.common.protocol.records import ScoreSheet, Verdict
from orion.orchestrator.events import Announce, Answer, Effect, Event, RequestArrived
from orion.orchestrator.stages import Applying, Ended, Finishing, Reducing, StageProgress, Training, Uploading
from orion.orchestrator.state import NOTICES_MAX, RunState

STEPS_KEPT = 16
"""Newest outer steps of a stage."""
LINES_KEPT = 300
LINE_CHARS_MAX = 300


class Part(StrEnum):
    """Phases as people tell them apart: MERGE is reducing, then applying."""

    WAIT = "wait"
    """Not every stage has members yet, or has reached this outer step."""
    TRAIN = "train"
    UPLOAD = "upload"
    REDUCE = "reduce"
    APPLY = "apply"
    FINISH = "finish"
    DONE = "done"


class Level(StrEnum):
    """How much a line of the log matters."""

    INFO = "info"
    WARNING = "warning"
    BAD = "bad"
    """A miner did, or is said to have done, what it should not."""


@dataclass(frozen=True, slots=True)
class Line:
    """Something that happened."""

    number: int
    time_s: float
    level: Level
    text: str
    hotkey: Hotkey | None


@dataclass(slots=True)
class MinerTimes:
    """When a miner had done its part of an outer step, as the orchestrator took it in."""

    announced_s: float | None = None
    """Its pseudo-gradient was encoded, and its digests told."""
    stored_s: float | None = None
    """It said that all of it was in the store."""
    reduced_s: float | None = None
    """Its last mean."""
    applied_s: float | None = None
    digest: Digest | None = None
    """Of the anchor that it stood on then."""


@dataclass(slots=True)
class StepTimes:
    """One outer step of a stage."""

    outer_step: int
    began_s: dict[Part, float] = field(default_factory=dict)
    ended_s: float | None = None
    """When the stage stood at the next anchor."""
    miners: dict[Hotkey, MinerTimes] = field(default_factory=dict)

    def of(self, hotkey: Hotkey) -> MinerTimes:
        return self.miners.setdefault(hotkey, MinerTimes())


def _note(times: MinerTimes, message: Uploaded | Reduced | Applied, now_s: float) -> None:
    """What a miner has done with its part of an outer step."""
    match message:
        case Uploaded(is_stored=is_stored):
            times.announced_s = now_s if times.announced_s is None else times.announced_s
            if is_stored and times.stored_s is None:
                times.stored_s = now_s
        case Reduced():
            times.reduced_s = now_s
        case Applied(state_digest=digest):
            if times.applied_s is None:
                times.applied_s, times.digest = now_s, digest


def _has_worked(state: RunState, outer_step: int, hotkey: Hotkey) -> bool:
    """Whether there is a record of its work in an outer step, so that something of it is to be merged."""
    memory = state.memory
    return memory.ledger.has_told(outer_step, hotkey) or memory.leases.has_leased(outer_step, hotkey)


def part_of(state: RunState, stage: StageProgress) -> Part:
    """What the stage's `outer_step` is in."""
    match stage.activity:
        case Training():
            is_open = state.memory.train.is_open and state.memory.train.outer_step == stage.outer_step
            return Part.TRAIN if is_open else Part.WAIT
        case Uploading():
            return Part.UPLOAD
        case Reducing():
            return Part.REDUCE
        case Applying():
            return Part.APPLY
        case Finishing():
            return Part.FINISH
        case Ended():
            return Part.DONE


class Chronicle:
    """The newest outer steps of each stage, and the newest lines."""

    def __init__(self, num_stages: int) -> None:
        self.steps: list[deque[StepTimes]] = [deque(maxlen=STEPS_KEPT) for _ in range(num_stages)]
        self.lines: deque[Line] = deque(maxlen=LINES_KEPT)
        self.num_lines = 0
        """Ever written."""
        self._num_notices = 0
        self._outer_step = -1

    def handled(self, state: RunState, event: Event, effects: Sequence[Effect]) -> None:
        """The core has handled an event; `state` is what came of it."""
        if isinstance(event, RequestArrived) and any(
            isinstance(effect, Answer) and effect.request_id == event.request_id for effect in effects
        ):
            is_news = any(isinstance(effect, Announce) for effect in effects)
            self._accepted(state, event, is_news)
        if state.memory.num_notices != self._num_notices:
            num_new = min(NOTICES_MAX, state.memory.num_notices - self._num_notices)
            for text in list(state.memory.notices)[-num_new:]:
                self._write(state, Level.WARNING, text, None)
            self._num_notices = state.memory.num_notices
        if any(isinstance(effect, Announce) for effect in effects):
            self._look(state)

    def step(self, stage_index: int, outer_step: int) -> StepTimes | None:
        """An outer step of a stage, if it is kept."""
        return next((step for step in reversed(self.steps[stage_index]) if step.outer_step == outer_step), None)

    # --- what somebody said ---

    def _accepted(self, state: RunState, event: RequestArrived, is_news: bool) -> None:
        message, hotkey = event.message, event.hotkey
        match message:
            case Uploaded() | Reduced() | Applied():
                if (times := self._times(state, hotkey, message.outer_step)) is not None:
                    _note(times, message, state.memory.now_s)
            case Join():
                if is_news:
                    stage_index = state.memory.membership.members[hotkey].stage_index
                    self._write(state, Level.INFO, f"{hotkey} joins stage {stage_index}", hotkey)
            case Verdict():
                self._verdict(state, hotkey, message)
            case ScoreSheet():
                scored = f"scores of {len(message.shares)} miners, outer step {message.outer_step}"
                self._write(state, Level.INFO, f"validator {hotkey}: {scored}", hotkey)
            case CheckpointUploaded():
                text = f"{hotkey} has written the anchor of outer step {message.outer_step}"
                self._write(state, Level.INFO, text, hotkey)
            case _:
                pass

    def _times(self, state: RunState, hotkey: Hotkey, outer_step: int) -> MinerTimes | None:
        """Of a member in an outer step that has not ended; None for what comes late."""
        member = state.memory.membership.members.get(hotkey)
        step = None if member is None else self.step(member.stage_index, outer_step)
        return None if step is None or step.ended_s is not None else step.of(hotkey)

    def _verdict(self, state: RunState, validator: Hotkey, verdict: Verdict) -> None:
        found = "passed" if verdict.passed else f"FAILED: {verdict.reason}"
        text = f"{verdict.miner}: check of its {verdict.subject}, outer step {verdict.outer_step}, {found}"
        level = Level.INFO if verdict.passed else Level.BAD
        self._write(state, level, f"{text} (validator {validator})", verdict.miner)

    # --- where the stages are ---

    def _look(self, state: RunState) -> None:
        now_s, train = state.memory.now_s, state.memory.train
        for stage, steps in zip(state.memory.stages, self.steps, strict=True):
            part = part_of(state, stage)
            for step in steps:
                if step.outer_step < stage.outer_step and step.ended_s is None:
                    step.ended_s = now_s
            current = self._opened(stage.stage_index, stage.outer_step)
            current.began_s.setdefault(part, now_s)
            if isinstance(stage.activity, Uploading):
                for hotkey in stage.activity.awaited:
                    if _has_worked(state, stage.outer_step, hotkey):
                        current.of(hotkey)
            if train.is_open and train.outer_step > stage.outer_step:  # it trains the next one beside this
                self._opened(stage.stage_index, train.outer_step).began_s.setdefault(Part.TRAIN, now_s)
        newest = min(stage.outer_step for stage in state.memory.stages)
        if newest > self._outer_step >= 0:
            self._write(state, Level.INFO, f"every stage stands at the anchor of outer step {newest}", None)
        self._outer_step = newest

    def _opened(self, stage_index: int, outer_step: int) -> StepTimes:
        step = self.step(stage_index, outer_step)
        if step is None:
            step = StepTimes(outer_step)
            self.steps[stage_index].append(step)
        return step

    def _write(self, state: RunState, level: Level, text: str, hotkey: Hotkey | None) -> None:
        self.lines.append(Line(self.num_lines, state.memory.now_s, level, text[:LINE_CHARS_MAX], hotkey))
        self.num_lines += 1
