"""What follows from the public ledger: receipts of both ends matched, credit, commitments, merges, verdicts.

The one place that says so. The orchestrator folds each entry as it makes it; validators and auditors fold the same
entries as they read them, and so come to the same. Pure: an entry in, what it changed out.

Trusts no single miner: a microbatch earns only what sender and receiver of a transfer both report with the same digest
and size. Invariants: a (microbatch, stage) pair is credited once at most; credit needs a matched transfer (with one
stage: the trip's end); records of one miner never remove another's; memory is bounded by the work of the outer steps
that are kept; a report of which nothing was taken and that contradicts nothing leaves the book as it was.
"""

from dataclasses import dataclass, field

from orion.common.errors import DataError
from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Outcome
from orion.common.ledger.contradictions import Contradiction, ContradictionKind
from orion.common.ledger.evidence import Claim, Claims, Credit, Hop, StepLedger, Taken, TripEvidence
from orion.common.protocol.entries import (
    CheckpointKept,
    Fact,
    MergeSettled,
    OuterStepOpened,
    RecordsClosed,
    ReductionVote,
    Said,
    TripsDied,
    TripsLeased,
)
from orion.common.protocol.fields import COMMITMENTS_MAX
from orion.common.protocol.log import continues
from orion.common.protocol.messages import (
    Commitment,
    MicrobatchEnd,
    Receipt,
    Report,
    RunCheckpoint,
)
from orion.common.protocol.records import (
    CommitmentRecord,
    Ledger,
    MergeShare,
    ScoreSheet,
    Verdict,
    VerdictRecord,
    WorkRecord,
)

RECEIPTS_PER_TRIP_MAX = 8
"""Receipts taken from one miner for each trip of an outer step, on average: four without detours, and as many again."""


@dataclass(slots=True)
class LedgerBook:
    """The record of all outer steps that are kept."""

    num_stages: int
    first_outer_step: int = 0
    """Of the run."""
    is_overlapped: bool = False
    """Outer steps begin ahead of the merge before them."""
    steps: dict[int, StepLedger] = field(default_factory=dict)
    outer_step: int = field(init=False)
    """The newest."""
    trips_from: int = field(init=False)
    """Records about trips of older outer steps no longer count."""
    checkpoint: RunCheckpoint | None = None
    """The newest of the whole model."""
    num_checks: int = 0
    num_verdicts_failed: int = 0
    sheets: dict[Hotkey, tuple[int, ScoreSheet]] = field(default_factory=dict)
    """Every validator's newest, and the entry that holds it."""

    def __post_init__(self) -> None:
        self.outer_step = self.trips_from = self.first_outer_step

    # --- the fold ---

    def take(self, sequence: int, fact: Fact) -> Taken:
        """Does what follows from an entry. Raises DataError for one that cannot come here in any true ledger."""
        match fact:
            case OuterStepOpened():
                self._open(sequence, fact.outer_step)
            case TripsLeased():
                trips = self._step(fact.outer_step).trips
                for trip in fact.trips:
                    if trip.microbatch_id in trips:
                        raise DataError(f"entry {sequence}: trip {trip.microbatch_id} was leased before")
                    trips[trip.microbatch_id] = TripEvidence(fact.outer_step, fact.lessee)
            case TripsDied():
                trips = self._step(fact.outer_step).trips
                for microbatch_id in fact.microbatch_ids:
                    trip_left = trips.get(microbatch_id)
                    if trip_left is None or trip_left.outcome is not None:
                        raise DataError(f"entry {sequence}: trip {microbatch_id} is not under way")
                    trip_left.outcome = Outcome.CANCELLED
            case RecordsClosed():
                self._forget_before(fact.trips_before, fact.work_before)
            case MergeSettled():
                merges = self._step(fact.outer_step).merges
                if fact.stage_index in merges:
                    raise DataError(f"entry {sequence}: this merge was settled before")
                merges[fact.stage_index] = fact
            case CheckpointKept():
                self._keep(sequence, fact.checkpoint)
            case Said():
                return self._hear(sequence, fact)
        return Taken(num_taken=1)

    def _open(self, sequence: int, outer_step: int) -> None:
        if outer_step != (self.outer_step + 1 if self.steps else self.first_outer_step):
            raise DataError(f"entry {sequence}: outer step {outer_step} cannot be opened now")
        self.steps[outer_step] = StepLedger()
        self.outer_step = max(self.outer_step, outer_step)

    def _keep(self, sequence: int, checkpoint: RunCheckpoint) -> None:
        """A newer checkpoint of the whole model takes the place of the one before."""
        places = [(ref.stage_index, ref.outer_step) for ref in checkpoint.stages]
        is_whole = places == [(stage_index, checkpoint.outer_step) for stage_index in range(self.num_stages)]
        is_newer = self.checkpoint is None or checkpoint.outer_step > self.checkpoint.outer_step
        if not is_whole or not is_newer or checkpoint.outer_step > self.outer_step:
            raise DataError(f"entry {sequence}: no checkpoint of outer step {checkpoint.outer_step} can be kept now")
        self.checkpoint = checkpoint

    def _step(self, outer_step: int) -> StepLedger:
        step = self.steps.get(outer_step)
        if step is None:
            raise DataError(f"outer step {outer_step} is not in the book")
        return step

    def _hear(self, sequence: int, said: Said) -> Taken:
        match said.message:
            case Report() as report:
                return self._take_report(sequence, said, report)
            case Verdict() as verdict:
                return self._judge(said.hotkey, verdict)
            case ScoreSheet() as sheet:
                self.sheets[said.hotkey] = (sequence, sheet)
                newest = self._step(self.outer_step)
                newest.num_sheets[said.hotkey] = newest.num_sheets.get(said.hotkey, 0) + 1
        return Taken(num_taken=1)

    # --- reports ---

    def _take_report(self, sequence: int, said: Said, report: Report) -> Taken:
        if said.stage_index is None:
            raise DataError(f"entry {sequence}: a report of {said.hotkey}, which is of no stage")
        taken = Taken()
        for receipt in report.receipts:
            _count(taken, self._add_receipt(taken, sequence, said.hotkey, said.stage_index, receipt))
        for end in report.ends:
            _count(taken, self._end(taken, said.hotkey, end))
        if report.commitment is not None:
            _count(taken, self._commit(said.hotkey, said.stage_index, report.commitment, said.commitment_in_time))
        return taken

    def _add_receipt(
        self, taken: Taken, sequence: int, reporter: Hotkey, reporter_stage: int, receipt: Receipt
    ) -> bool | None:
        """Takes one end's record of a transfer: True; None when it says what it said before; False when it can't be
        true, contradicts what it said before, or is one too many."""
        step = self.steps.get(receipt.outer_step)
        trip = step.trips.get(receipt.microbatch_id) if step is not None else None
        if step is None or trip is None or not self._may_say(reporter, reporter_stage, receipt):
            return False
        hop = Hop(receipt.direction, receipt.to_stage, receipt.sender, receipt.receiver)
        claims = trip.hops.get(hop, Claims())
        claim = Claim(receipt.digest, receipt.size_bytes, sequence)
        is_sender = reporter == receipt.sender
        earlier = claims.by_sender if is_sender else claims.by_receiver
        if earlier is not None:
            if earlier.says_the_same(claim):
                return None
            _contradict(taken, step, receipt, (reporter,), (earlier, claim))
            return False
        if step.num_receipts.get(reporter, 0) >= RECEIPTS_PER_TRIP_MAX * len(step.trips):
            return False
        step.num_receipts[reporter] = step.num_receipts.get(reporter, 0) + 1
        other = claims.by_receiver if is_sender else claims.by_sender
        if is_sender:
            claims.by_sender = claim
        else:
            claims.by_receiver = claim
        trip.hops[hop] = claims
        if other is not None and not other.says_the_same(claim):
            _contradict(taken, step, receipt, (receipt.sender, receipt.receiver), (other, claim))
        elif other is not None:
            for end in (receipt.sender, receipt.receiver):
                step.num_matched[end] = step.num_matched.get(end, 0) + 1
            self._credit(taken, step, trip)
        return True

    def _may_say(self, reporter: Hotkey, reporter_stage: int, receipt: Receipt) -> bool:
        """Whether a miner of that stage can be the end of the transfer that it claims to be."""
        back = 1 if receipt.direction is Direction.GRADIENT else -1
        from_stage = receipt.to_stage + back
        own_stage = {receipt.sender: from_stage, receipt.receiver: receipt.to_stage}.get(reporter)
        if own_stage != reporter_stage or receipt.sender == receipt.receiver:
            return False
        return 0 <= from_stage < self.num_stages and receipt.to_stage < self.num_stages

    def _end(self, taken: Taken, hotkey: Hotkey, end: MicrobatchEnd) -> bool | None:
        """Ends a trip by its lessee's word: True; None for one that ended just so; False for anything else."""
        trip = self._trip(end.microbatch_id)
        if trip is None:
            return False
        if trip.lessee != hotkey or trip.outcome is not None:
            return None if trip.lessee == hotkey and trip.outcome is end.outcome else False
        trip.outcome = end.outcome
        taken.ends.append(end)
        if end.outcome is Outcome.APPLIED:
            self._credit(taken, self.steps[trip.outer_step], trip)
        return True

    def _trip(self, microbatch_id: MicrobatchId) -> TripEvidence | None:
        for outer_step in range(self.outer_step, self.trips_from - 1, -1):
            trip = self._step(outer_step).trips.get(microbatch_id)
            if trip is not None:
                return trip
        return None

    def _credit(self, taken: Taken, step: StepLedger, trip: TripEvidence) -> None:
        """Credits every stage of a trip whose work is shown by now and that was not credited before."""
        for credit in self._shown(trip):
            if credit.stage_index in trip.credited:
                continue  # two replicas show the same stage's work: the first one named is paid
            trip.credited[credit.stage_index] = credit.hotkey
            key = (credit.hotkey, credit.stage_index)
            step.num_credited[key] = step.num_credited.get(key, 0) + 1
            taken.credits.append(credit)

    def _shown(self, trip: TripEvidence) -> list[Credit]:
        agreed = [hop for hop, claims in trip.hops.items() if claims.agree]
        shown = [Credit(hop.sender, hop.to_stage + 1) for hop in agreed if hop.direction is Direction.GRADIENT]
        applied = trip.outcome is Outcome.APPLIED
        sent = any(hop.direction is Direction.ACTIVATION and hop.sender == trip.lessee for hop in agreed)
        returned = any(
            hop.direction is Direction.GRADIENT and hop.to_stage == 0 and hop.receiver == trip.lessee for hop in agreed
        )
        if applied and (self.num_stages == 1 or (sent and returned)):
            shown.append(Credit(trip.lessee, 0))
        return shown

    def _commit(self, hotkey: Hotkey, stage_index: int, commitment: Commitment, in_time: bool) -> bool | None:
        """Keeps a miner's commitment to its log; None when it was made before; False when it is late, or does not
        continue those before it.

        Whether the logs are really prefixes of each other is for validators to see; here nothing may shrink. Of very
        many the oldest are dropped: the later ones say all that they did.
        """
        step = self.steps.get(commitment.outer_step)
        known = step.commitments.get(hotkey) if step is not None else None
        if known is not None and (commitment == known.commitment or commitment in known.earlier):
            return None
        if not in_time:
            return False
        if known is None:
            record = CommitmentRecord(hotkey=hotkey, stage_index=stage_index, commitment=commitment)
        elif known.stage_index != stage_index or not continues(known.commitment, commitment):
            return False
        else:
            earlier = (*known.earlier, known.commitment)[-COMMITMENTS_MAX:]
            record = known.model_copy(update={"commitment": commitment, "earlier": earlier})
        self._step(commitment.outer_step).commitments[hotkey] = record
        return True

    # --- verdicts ---

    def _judge(self, validator: Hotkey, verdict: Verdict) -> Taken:
        """Keeps a verdict, unless this validator gave another one on the same subject of a miner's outer step."""
        step = self._step(verdict.outer_step)
        key = (validator, verdict.miner, verdict.subject)
        earlier = step.verdicts.get(key)
        if earlier is not None:
            return Taken(is_conflict=earlier != verdict)
        step.verdicts[key] = verdict
        self.num_checks += 1
        self.num_verdicts_failed += not verdict.passed
        return Taken(num_taken=1)

    # --- what it shows ---

    def num_credited(self, outer_step: int, hotkey: Hotkey, stage_index: int) -> int:
        """Microbatches credited to a miner in an outer step."""
        step = self.steps.get(outer_step)
        return step.num_credited.get((hotkey, stage_index), 0) if step is not None else 0

    def commitment(self, outer_step: int, hotkey: Hotkey) -> Commitment | None:
        """A miner's newest commitment to an outer step's log."""
        step = self.steps.get(outer_step)
        record = step.commitments.get(hotkey) if step is not None else None
        return record.commitment if record is not None else None

    def num_sheets(self, validator: Hotkey) -> int:
        """Score sheets of a validator since the newest outer step was opened."""
        return self._step(self.outer_step).num_sheets.get(validator, 0)

    def has_told(self, outer_step: int, hotkey: Hotkey) -> bool:
        """Whether a miner reported any transfer in an outer step."""
        step = self.steps.get(outer_step)
        return step is not None and hotkey in step.num_receipts

    def agreed_transfers(self, outer_step: int, hotkey: Hotkey) -> tuple[Receipt, ...]:
        """Transfers of an outer step to or from a miner that both ends report alike; none once they are forgotten."""
        step = self.steps.get(outer_step)
        trips = {} if step is None else step.trips
        return tuple(
            Receipt(
                direction=hop.direction,
                microbatch_id=microbatch_id,
                outer_step=outer_step,
                sender=hop.sender,
                receiver=hop.receiver,
                to_stage=hop.to_stage,
                digest=claims.by_sender.digest,
                size_bytes=claims.by_sender.size_bytes,
            )
            for microbatch_id, trip in trips.items()
            for hop, claims in trip.hops.items()
            if hotkey in (hop.sender, hop.receiver) and claims.agree and claims.by_sender is not None
        )

    def work(self, from_outer_step: int, microbatch_flops: tuple[float, ...]) -> list[WorkRecord]:
        """All credited work from an outer step on, ordered by outer step, stage and hotkey."""
        return [
            self._work_record(outer_step, step, hotkey, stage_index, num * microbatch_flops[stage_index])
            for outer_step, step in sorted(self.steps.items())
            if outer_step >= from_outer_step
            for (hotkey, stage_index), num in sorted(step.num_credited.items(), key=lambda item: (item[0][1], item[0]))
        ]

    def _work_record(
        self, outer_step: int, step: StepLedger, hotkey: Hotkey, stage_index: int, flops: float
    ) -> WorkRecord:
        return WorkRecord(
            hotkey=hotkey,
            stage_index=stage_index,
            outer_step=outer_step,
            num_microbatches=step.num_credited[(hotkey, stage_index)],
            num_committed=self.num_checkable(outer_step, stage_index, hotkey),
            merge=self.merge_share(outer_step, stage_index, hotkey),
            flops=flops,
        )

    def num_checkable(self, outer_step: int, stage_index: int, hotkey: Hotkey) -> int:
        """How many passes a miner's newest commitment lets anybody check: those since its log was last begun anew, and
        none where the log begins at something that was never shown."""
        committed = self._step(outer_step).commitments.get(hotkey)
        if committed is None or committed.stage_index != stage_index:
            return 0
        return committed.commitment.num_contributed if self._has_beginning(outer_step, stage_index, hotkey) else 0

    def _has_beginning(self, outer_step: int, stage_index: int, hotkey: Hotkey) -> bool:
        """Whether anybody can tell where a miner's outer step began.

        In overlapped runs that is where its upload of the outer step before leads. If that is in no merge, neither in
        time nor late, nobody has it; then the orchestrator takes no contribution that follows from it either, so one
        that was taken shows that its miner had begun anew.
        """
        before, at = self.steps.get(outer_step - 1), self._step(outer_step).merges.get(stage_index)
        merged_before = before.merges.get(stage_index) if before is not None else None
        if not self.is_overlapped or before is None or merged_before is None or at is None:
            return True
        following = self.steps.get(outer_step + 1)
        later = following.merges.get(stage_index) if following is not None else None
        return (
            not merged_before.num_settled
            or (hotkey, stage_index) not in before.num_credited
            or _num_merged(merged_before, hotkey, age=0) is not None
            or any(each.hotkey == hotkey for each in at.contributions)
            or (later is not None and _num_merged(later, hotkey, age=1) is not None)
        )

    def merge_share(self, outer_step: int, stage_index: int, hotkey: Hotkey) -> MergeShare | None:
        """What a miner did for the merge of its stage's outer step; None while that is not settled.

        Who came too late for it did as much for the next one, if it is in that. A merge without any mean needs nobody.
        """
        merge = self._step(outer_step).merges.get(stage_index)
        if merge is None:
            return None
        share = merge_share(merge, hotkey)
        following = self.steps.get(outer_step + 1)
        later = following.merges.get(stage_index) if following is not None else None
        in_time = any((each.hotkey, each.age) == (hotkey, 0) for each in merge.contributions)
        if in_time or not merge.num_settled or later is None:
            return share
        num_merged = _num_merged(later, hotkey, age=1)
        if num_merged is None:
            return share
        return share.model_copy(update={"num_merged": num_merged, "num_settled": later.num_settled, "age": 1})

    def verdicts(self, from_outer_step: int) -> list[VerdictRecord]:
        """All verdicts on outer steps from one on, ordered by outer step, validator, miner and subject."""
        return [
            VerdictRecord(validator=validator, verdict=verdict)
            for outer_step, step in sorted(self.steps.items())
            if outer_step >= from_outer_step
            for (validator, _, _), verdict in sorted(step.verdicts.items(), key=lambda item: item[0])
        ]

    def summary(
        self, from_outer_step: int, num_entries: int, digest: Digest, microbatch_flops: tuple[float, ...]
    ) -> Ledger:
        """Credited work and verdicts from an outer step on, of a ledger with so many entries and that digest."""
        return Ledger(
            num_entries=num_entries,
            digest=digest,
            outer_step=self.outer_step,
            work=tuple(self.work(from_outer_step, microbatch_flops)),
            verdicts=tuple(self.verdicts(from_outer_step)),
        )

    def _forget_before(self, trips_outer_step: int, work_outer_step: int) -> None:
        """Drops the evidence of trips, and the records of work, of older outer steps."""
        self.trips_from = trips_outer_step
        for outer_step in [step for step in self.steps if step < trips_outer_step]:
            self.steps[outer_step].trips.clear()
        for outer_step in [step for step in self.steps if step < work_outer_step]:
            del self.steps[outer_step]


def merge_share(merge: MergeSettled, hotkey: Hotkey) -> MergeShare:
    """What a miner did in time for a merge."""
    votes = [outcome.vote for outcome in merge.reductions if outcome.hotkey == hotkey]
    return MergeShare(
        num_settled=merge.num_settled,
        num_merged=_num_merged(merge, hotkey, age=0) or 0,
        num_asked=sum(vote is not ReductionVote.UNDECIDED for vote in votes),
        num_agreed=sum(vote is ReductionVote.AGREED for vote in votes),
    )


def _num_merged(merge: MergeSettled, hotkey: Hotkey, age: int) -> int | None:
    """Partitions whose mean holds a miner's contribution of that age; None where it has none."""
    return next((each.num_merged for each in merge.contributions if (each.hotkey, each.age) == (hotkey, age)), None)


def _contradict(
    taken: Taken, step: StepLedger, receipt: Receipt, hotkeys: tuple[Hotkey, ...], claims: tuple[Claim, Claim]
) -> None:
    """Notes that two claims about a transfer cannot both be true: of its two ends, or of one."""
    found = Contradiction(
        kind=ContradictionKind.TWO_WORDS if len(hotkeys) == 1 else ContradictionKind.ENDS_DIFFER,
        hotkeys=hotkeys,
        outer_step=receipt.outer_step,
        microbatch_id=receipt.microbatch_id,
        direction=receipt.direction,
        to_stage=receipt.to_stage,
        sequences=(claims[0].sequence, claims[1].sequence),
    )
    if step.contradictions.add(found):
        taken.contradictions.append(found)


def _count(taken: Taken, result: bool | None) -> None:
    """True: it counts; False: it is ignored; None: it was there already, and nothing is wrong."""
    taken.num_taken += result is True
    taken.num_ignored += result is False
