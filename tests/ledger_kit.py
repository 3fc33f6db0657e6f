"""A public ledger that is made up, but signed by real keys and true to the rules."""

from collections.abc import Sequence

from blake3 import blake3

from orion.common.config import RunSpec
from orion.common.ids import PROTOCOL_VERSION, DataId, Digest, Direction, Hotkey, MicrobatchId, Outcome
from orion.common.ledger.reading import LedgerReading
from orion.common.protocol import routes
from orion.common.protocol.entries import (
    ContributionOutcome,
    Fact,
    LedgerEntry,
    LedgerPage,
    MergeSettled,
    OuterStepOpened,
    Proof,
    ReductionOutcome,
    ReductionVote,
    Said,
    TripsLeased,
    entry_to_json,
)
from orion.common.protocol.messages import (
    Commitment,
    LeasedMicrobatch,
    MicrobatchEnd,
    Receipt,
    Reduced,
    Report,
    Uploaded,
)
from orion.common.protocol.records import Ledger, ScoreSheet, Verdict
from orion.common.protocol.signing import Keypair, hotkey_of, keypair_from_uri, proof_of, sign_request

ORCHESTRATOR_KEY = keypair_from_uri("//orchestrator")
TIME_S = 1_800_000_000.0
ROUTES = {
    Report: routes.REPORT,
    Uploaded: routes.UPLOADED,
    Reduced: routes.REDUCED,
    Verdict: routes.VERDICT,
    ScoreSheet: routes.SCORES,
}
Statement = Report | Uploaded | Reduced | Verdict | ScoreSheet


def miner_keys(spec: RunSpec) -> list[list[Keypair]]:
    """Keys of every stage's replicas."""
    return [
        [keypair_from_uri(f"//stage/{stage}/{replica}") for replica in range(spec.replicas)]
        for stage in range(spec.num_stages)
    ]


def receipts_of(microbatch_id: MicrobatchId, outer_step: int, path: Sequence[Hotkey]) -> list[Receipt]:
    """Of a trip that went all the way and back."""
    receipts = []
    for stage in range(len(path) - 1):
        for direction in Direction:
            ends = (path[stage], path[stage + 1])
            sender, receiver = ends if direction is Direction.ACTIVATION else ends[::-1]
            receipts.append(
                Receipt(
                    direction=direction,
                    microbatch_id=microbatch_id,
                    outer_step=outer_step,
                    sender=sender,
                    receiver=receiver,
                    to_stage=stage + 1 if direction is Direction.ACTIVATION else stage,
                    digest=Digest(blake3(f"{microbatch_id} {direction} {stage}".encode()).hexdigest()),
                    size_bytes=64,
                )
            )
    return receipts


class SignedLedger:
    """Grows fact by fact; every fact must be one from which something follows."""

    def __init__(self, spec: RunSpec, *, first_microbatch_id: int = 0) -> None:
        self.spec = spec
        self.keys = miner_keys(spec)
        self.entries: list[LedgerEntry] = []
        self.reading = LedgerReading(spec)
        self._sequences: dict[Hotkey, int] = {}
        self._next_microbatch_id = first_microbatch_id
        self._nonce_ns = int(TIME_S * 1e9)
        self.fact(OuterStepOpened(outer_step=0))

    @property
    def orchestrator(self) -> Hotkey:
        return hotkey_of(ORCHESTRATOR_KEY)

    def fact(self, fact: Fact) -> None:
        sequence = len(self.entries)
        entry = LedgerEntry(sequence=sequence, time_s=TIME_S + sequence, fact=fact)
        self.reading.take(entry)
        self.entries.append(entry)

    def proof(self, key: Keypair, message: Statement) -> Proof:
        self._nonce_ns += 1
        target = f"{ROUTES[type(message)]}?protocol={PROTOCOL_VERSION}&run={self.spec.digest}"
        body = message.model_dump_json().encode()
        headers = sign_request(key, "POST", target, body, self.orchestrator, nonce_ns=self._nonce_ns)
        return proof_of(headers, target)

    def says(self, key: Keypair, stage_index: int | None, message: Statement) -> None:
        proof = self.proof(key, message)
        self.fact(Said(hotkey=hotkey_of(key), stage_index=stage_index, message=message, proof=proof))

    def report(self, key: Keypair, stage_index: int, **records: object) -> None:
        sequence = self._sequences.get(hotkey_of(key), 0)
        self._sequences[hotkey_of(key)] = sequence + 1
        self.says(key, stage_index, Report.model_validate({"sequence": sequence, **records}))

    def train(self, num_trips: int, replica: int = 0, *, commits: bool = True) -> list[MicrobatchId]:
        """Trips through the given replica of every stage, all applied, reported and committed to."""
        outer_step = self.reading.book.outer_step
        path = [keys[replica] for keys in self.keys]
        hotkeys = tuple(hotkey_of(key) for key in path)
        first = self._next_microbatch_id
        self._next_microbatch_id += num_trips
        ids = [MicrobatchId(number) for number in range(first, first + num_trips)]
        trips = tuple(LeasedMicrobatch(microbatch_id=number, data_id=DataId(number)) for number in ids)
        self.fact(TripsLeased(outer_step=outer_step, lessee=hotkeys[0], trips=trips))
        receipts = [receipt for number in ids for receipt in receipts_of(number, outer_step, hotkeys)]
        for stage_index, key in enumerate(path):
            own = [receipt for receipt in receipts if hotkeys[stage_index] in (receipt.sender, receipt.receiver)]
            ends = [MicrobatchEnd(microbatch_id=number, outcome=Outcome.APPLIED, path=hotkeys) for number in ids]
            if own or not stage_index:
                self.report(key, stage_index, receipts=tuple(own), ends=tuple(ends) if stage_index == 0 else ())
        if commits:
            self.commit(num_trips, replica)
        return ids

    def commit(self, num_applied: int, replica: int = 0) -> None:
        outer_step = self.reading.book.outer_step
        commitment = Commitment(
            outer_step=outer_step,
            num_entries=2 * num_applied,
            num_applied=num_applied,
            num_contributed=num_applied,
            num_kept=2 * num_applied,
            root=Digest("c" * 64),
            is_final=True,
        )
        for stage_index, keys in enumerate(self.keys):
            self.report(keys[replica], stage_index, commitment=commitment)

    def merge(self, absent: Sequence[Hotkey] = (), differing: Sequence[Hotkey] = ()) -> None:
        """Every stage's merge of the newest outer step settles, and the next one opens."""
        outer_step = self.reading.book.outer_step
        num_partitions = self.spec.num_partitions
        for stage_index, keys in enumerate(self.keys):
            hotkeys = [hotkey_of(key) for key in keys]
            self.fact(
                MergeSettled(
                    stage_index=stage_index,
                    outer_step=outer_step,
                    num_partitions=num_partitions,
                    num_settled=num_partitions,
                    contributions=tuple(
                        ContributionOutcome(hotkey=hotkey, num_microbatches=1, num_merged=num_partitions)
                        for hotkey in hotkeys
                        if hotkey not in absent
                    ),
                    reductions=tuple(
                        ReductionOutcome(
                            partition_index=partition,
                            hotkey=hotkey,
                            vote=ReductionVote.DIFFERED if hotkey in differing else ReductionVote.AGREED,
                        )
                        for partition in range(num_partitions)
                        for hotkey in hotkeys
                    ),
                )
            )
        self.fact(OuterStepOpened(outer_step=outer_step + 1))

    def summary(self) -> Ledger:
        return self.reading.summary()

    def page(self, from_sequence: int, num_entries: int = 512) -> LedgerPage:
        """As the orchestrator gives it."""
        before = LedgerReading(self.spec)
        for entry in self.entries[:from_sequence]:
            before.take(entry)
        return LedgerPage(
            from_sequence=from_sequence,
            previous=before.digest,
            entries=tuple(self.entries[from_sequence : from_sequence + num_entries]),
            num_entries=len(self.entries),
            head=self.reading.digest,
        )

    def json_lines(self) -> list[bytes]:
        return [entry_to_json(entry) for entry in self.entries]
