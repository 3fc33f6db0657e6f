"""Who did which work: receipts of both ends matched, credit, commitments, verdicts.

Owns the public record of work. Trusts no single miner: a microbatch earns only what sender and receiver of a transfer
both report with the same digest and size. Invariants: a (microbatch, stage) pair is credited once at most; credit needs
a matched transfer (with one stage: the trip's end); records of one miner never remove another's; memory is bounded by
the work of the outer steps that are kept.
"""

from dataclasses import dataclass, field

from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Outcome, Subject
from orion.common.protocol.messages import (
    Commitment,
    Receipt,
)
from orion.common.protocol.records import (
    CommitmentRecord,
    Verdict,
    WorkRecord,
)
from orion.orchestrator.leases import Trip

RECEIPTS_PER_TRIP_MAX = 8
"""Receipts taken from one miner for each trip of an outer step, on average: four without detours, and as many again."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A transfer as both its ends must name it."""

    direction: Direction
    to_stage: int
    sender: Hotkey
    receiver: Hotkey


@dataclass(slots=True)
class Claims:
    """What each end says it sent or accepted; None = has not said."""

    by_sender: tuple[Digest, int] | None = None
    by_receiver: tuple[Digest, int] | None = None

    @property
    def agree(self) -> bool:
        return self.by_sender is not None and self.by_sender == self.by_receiver


@dataclass(slots=True)
class TripEvidence:
    """What is known of one trip's transfers, and which stages were credited for it."""

    hops: dict[Hop, Claims] = field(default_factory=dict)
    credited: dict[int, Hotkey] = field(default_factory=dict)


@dataclass(slots=True)
class StepLedger:
    """The record of one outer step."""

    trips: dict[MicrobatchId, TripEvidence] = field(default_factory=dict)
    """Dropped earlier than the rest."""
    num_receipts: dict[Hotkey, int] = field(default_factory=dict)
    num_credited: dict[tuple[Hotkey, int], int] = field(default_factory=dict)
    """By hotkey and stage."""
    commitments: dict[Hotkey, CommitmentRecord] = field(default_factory=dict)
    verdicts: dict[tuple[Hotkey, Hotkey, Subject], Verdict] = field(default_factory=dict)
    """By validator, miner and what was checked."""


@dataclass(frozen=True, slots=True)
class Credit:
    """A miner has just earned one microbatch."""

    hotkey: Hotkey
    stage_index: int


@dataclass(slots=True)
class LedgerBook:
    """The record of all outer steps that are kept."""

    num_stages: int
    steps: dict[int, StepLedger] = field(default_factory=dict)
    num_checks: int = 0
    num_verdicts_failed: int = 0

    def open(self, outer_step: int) -> None:
        """Starts the record of an outer step."""
        self.steps[outer_step] = StepLedger()

    def add_receipt(self, reporter: Hotkey, reporter_stage: int, receipt: Receipt, trip: Trip, num_trips: int) -> bool:
        """Takes one end's record of a transfer of `trip`; False when it can't be true or is one too many.

        `num_trips` is how many the outer step has had so far. A claim that was made before stands.
        """
        back = 1 if receipt.direction is Direction.GRADIENT else -1
        from_stage = receipt.to_stage + back
        own_stage = {receipt.sender: from_stage, receipt.receiver: receipt.to_stage}.get(reporter)
        if own_stage != reporter_stage or receipt.sender == receipt.receiver:
            return False
        if not (0 <= from_stage < self.num_stages and receipt.to_stage < self.num_stages):
            return False
        step = self.steps[trip.outer_step]
        evidence = step.trips.setdefault(trip.microbatch_id, TripEvidence())
        hop = Hop(receipt.direction, receipt.to_stage, receipt.sender, receipt.receiver)
        claims = evidence.hops.get(hop, Claims())
        claim = (receipt.digest, receipt.size_bytes)
        earlier = claims.by_sender if reporter == receipt.sender else claims.by_receiver
        if earlier is not None:
            return earlier == claim
        if step.num_receipts.get(reporter, 0) >= RECEIPTS_PER_TRIP_MAX * num_trips:
            return False
        step.num_receipts[reporter] = step.num_receipts.get(reporter, 0) + 1
        if reporter == receipt.sender:
            claims.by_sender = claim
        else:
            claims.by_receiver = claim
        evidence.hops[hop] = claims
        return True

    def credit(self, trip: Trip) -> list[Credit]:
        """Credits every stage of a trip whose work is shown by now and that was not credited before."""
        step = self.steps[trip.outer_step]
        evidence = step.trips.setdefault(trip.microbatch_id, TripEvidence())
        earned = [credit for credit in self._shown(trip, evidence) if credit.stage_index not in evidence.credited]
        credits: list[Credit] = []
        for credit in earned:
            if credit.stage_index in evidence.credited:
                continue  # two replicas show the same stage's work: the first one named is paid
            evidence.credited[credit.stage_index] = credit.hotkey
            key = (credit.hotkey, credit.stage_index)
            step.num_credited[key] = step.num_credited.get(key, 0) + 1
            credits.append(credit)
        return credits

    def num_credited(self, outer_step: int, hotkey: Hotkey, stage_index: int) -> int:
        """Microbatches credited to a miner in an outer step."""
        step = self.steps.get(outer_step)
        return step.num_credited.get((hotkey, stage_index), 0) if step is not None else 0

    def commit(self, hotkey: Hotkey, stage_index: int, commitment: Commitment) -> bool:
        """Keeps a miner's commitment to its log; False when it made another one before."""
        step = self.steps[commitment.outer_step]
        record = CommitmentRecord(hotkey=hotkey, stage_index=stage_index, commitment=commitment)
        return step.commitments.setdefault(hotkey, record) == record

    def commitment(self, outer_step: int, hotkey: Hotkey) -> Commitment | None:
        step = self.steps.get(outer_step)
        record = step.commitments.get(hotkey) if step is not None else None
        return record.commitment if record is not None else None

    def has_told(self, outer_step: int, hotkey: Hotkey) -> bool:
        """Whether a miner reported any transfer in an outer step."""
        step = self.steps.get(outer_step)
        return step is not None and hotkey in step.num_receipts

    def judge(self, validator: Hotkey, verdict: Verdict) -> bool:
        """Keeps a verdict; False when this validator gave another one on the same subject of a miner's outer step."""
        step = self.steps[verdict.outer_step]
        key = (validator, verdict.miner, verdict.subject)
        earlier = step.verdicts.get(key)
        if earlier is not None:
            return earlier == verdict
        step.verdicts[key] = verdict
        self.num_checks += 1
        self.num_verdicts_failed += not verdict.passed
        return True

    def work(self, from_outer_step: int, microbatch_flops: tuple[float, ...]) -> list[WorkRecord]:
        """All credited work from an outer step on, ordered by outer step, stage and hotkey."""
        return [
            WorkRecord(
                hotkey=hotkey,
                stage_index=stage_index,
                outer_step=outer_step,
                num_microbatches=num,
                flops=num * microbatch_flops[stage_index],
            )
            for outer_step, step in sorted(self.steps.items())
            if outer_step >= from_outer_step
            for (hotkey, stage_index), num in sorted(step.num_credited.items(), key=lambda item: (item[0][1], item[0]))
        ]

    def forget_before(self, trips_outer_step: int, work_outer_step: int) -> None:
        """Drops the evidence of trips, and the records of work, of older outer steps."""
        for outer_step in [step for step in self.steps if step < trips_outer_step]:
            self.steps[outer_step].trips.clear()
            self.steps[outer_step].num_receipts.clear()
        for outer_step in [step for step in self.steps if step < work_outer_step]:
            del self.steps[outer_step]

    def _shown(self, trip: Trip, evidence: TripEvidence) -> list[Credit]:
        agreed = [hop for hop, claims in evidence.hops.items() if claims.agree]
        shown = [Credit(hop.sender, hop.to_stage + 1) for hop in agreed if hop.direction is Direction.GRADIENT]
        applied = trip.outcome is Outcome.APPLIED
        sent = any(hop.direction is Direction.ACTIVATION and hop.sender == trip.lessee for hop in agreed)
        returned = any(
            hop.direction is Direction.GRADIENT and hop.to_stage == 0 and hop.receiver == trip.lessee for hop in agreed
        )
        if applied and (self.num_stages == 1 or (sent and returned)):
            shown.append(Credit(trip.lessee, 0))
        return shown
