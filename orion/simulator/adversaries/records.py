"""Attackers that lie about what was done: receipts of work never done, and requests that are sent again."""

from dataclasses import dataclass

from blake3 import blake3

from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Outcome
from orion.common.protocol.codec import body_size, transfer_spec
from orion.common.protocol.messages import (
    Done,
    Lease,
    LeaseRequest,
    Message,
    MicrobatchEnd,
    Receipt,
    Refusal,
    RefusalCode,
    Report,
    Uploaded,
)
from orion.miner.cache import OUTGOING
from orion.miner.effects import Effect, RequestLease, SendTensor
from orion.miner.events import LeaseRefused
from orion.simulator.adversaries.adversary import Adversary
from orion.simulator.clients import SimulatedOrchestrator, TensorSent
from orion.simulator.host import MESSAGE_BYTES, ORCHESTRATOR, Ask, wire_bytes
from orion.simulator.network import Address, Respond

REPEAT_S = 0.5
"""Between two rounds of repeated requests."""
REPEATS_MAX = 200
"""Requests that are kept to be sent again."""
NEIGHBOUR = "neighbour"
"""Under which the accomplice of the next stage is known to the plot."""


class _Scribe(SimulatedOrchestrator):
    """Numbers all reports of a process, so that made-up ones can go between those of the core."""

    def __init__(self, forger: "Forger") -> None:
        self._forger = forger
        self._num_reports = 0

    async def report(self, report: Report) -> Done:
        return await super().report(self.numbered(self._forger.rewritten(report)))

    async def uploaded(self, uploaded: Uploaded) -> Done:
        self._forger.note(uploaded)
        return await super().uploaded(uploaded)

    def numbered(self, report: Report) -> Report:
        """The report under the next number."""
        self._num_reports += 1
        return report.model_copy(update={"sequence": self._num_reports - 1})


class Forger(Adversary):
    """Base of all that send other reports than their core wants."""

    def make_orchestrator(self) -> SimulatedOrchestrator:
        self.scribe = _Scribe(self)
        return self.scribe

    def rewritten(self, report: Report) -> Report:
        """What goes out in place of the core's report."""
        return report

    def note(self, message: Message) -> None:
        """Sees what the core says beside reports."""

    def say(self, report: Report) -> None:
        """Sends a made-up report; whether it is taken does not matter."""
        numbered = self.scribe.numbered(report)
        self.spawn(self._tell(numbered))

    async def _tell(self, message: Message) -> None:
        await Ask(ORCHESTRATOR, message, wire_bytes(message))


@dataclass(frozen=True, slots=True)
class _Claim:
    """A trip that somebody pretends to have worked on."""

    microbatch_id: MicrobatchId
    outer_step: int

    @property
    def digest(self) -> Digest:
        """Of what is said to have been sent; accomplices make up the same."""
        return Digest(blake3(f"made up {self.microbatch_id}".encode()).hexdigest())


class ReceiptForger(Forger):
    """Takes no work, and reports receipts for what it was offered."""

    _claimed: set[MicrobatchId]

    def claim(self, claim: _Claim, lower: Hotkey, upper: Hotkey, to_stage: int) -> tuple[Receipt, ...]:
        """Receipts of a trip's whole exchange between two stages: `lower` runs stage `to_stage`, `upper` the next."""
        spec = self.world.spec
        activation, gradient = Direction.ACTIVATION, Direction.GRADIENT

        def receipt(direction: Direction, sender: Hotkey, receiver: Hotkey, stage_index: int) -> Receipt:
            return Receipt(
                direction=direction,
                microbatch_id=claim.microbatch_id,
                outer_step=claim.outer_step,
                sender=sender,
                receiver=receiver,
                to_stage=stage_index,
                digest=claim.digest,
                size_bytes=body_size(transfer_spec(spec, direction, stage_index)),
            )

        return (receipt(activation, lower, upper, to_stage + 1), receipt(gradient, upper, lower, to_stage))

    def start(self) -> None:
        self._claimed = set()
        super().start()

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        if not isinstance(request, TensorSent):
            super().serve(source, request, respond)
            return
        respond(Refusal(code=RefusalCode.BUSY, message="no credits", retry_after_s=1.0), MESSAGE_BYTES)
        transfer = request.transfer
        if transfer.direction is Direction.ACTIVATION and transfer.microbatch_id not in self._claimed:
            self.pretend(
                _Claim(transfer.microbatch_id, transfer.outer_step), Hotkey(source), self.hotkey, transfer.to_stage - 1
            )

    def pretend(self, claim: _Claim, lower: Hotkey, upper: Hotkey, to_stage: int) -> None:
        """Reports its end of an exchange that never happened."""
        self.attacked()
        self.plot.num_claimed += 2
        self._claimed.add(claim.microbatch_id)
        self.say(Report(sequence=0, receipts=self.claim(claim, lower, upper, to_stage)))

    def rewritten(self, report: Report) -> Report:
        """The core's log is empty: a commitment over a made-up one goes out in its place."""
        commitment = report.commitment
        if commitment is None or not self._claimed:
            return report
        root = Digest(blake3(f"made up {self.hotkey} {commitment.outer_step}".encode()).hexdigest())
        num_entries = 2 * len(self._claimed)
        made_up = {
            "num_entries": num_entries,
            "num_kept": num_entries,
            "num_applied": len(self._claimed),
            "root": root,
        }
        self._claimed.clear()
        return report.model_copy(update={"commitment": commitment.model_copy(update=made_up)})


class UpperAccomplice(ReceiptForger):
    """Confirms whatever its accomplice of the stage before says that it sent, and takes no work."""

    def start(self) -> None:
        self.plot.told.setdefault(NEIGHBOUR, self)
        super().start()

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        if isinstance(request, TensorSent):
            respond(Refusal(code=RefusalCode.BUSY, message="no credits", retry_after_s=1.0), MESSAGE_BYTES)
        else:
            super().serve(source, request, respond)


class LowerAccomplice(ReceiptForger):
    """Leases microbatches on the first stage, and reports at once that they went through its accomplice."""

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, RequestLease):
            self.spawn(self._pretend_leases(effect.request))
        else:
            super()._carry_out(effect)

    async def _pretend_leases(self, request: LeaseRequest) -> None:
        lease = await Ask(ORCHESTRATOR, request)
        view, accomplice = self.core.view, self.plot.told.get(NEIGHBOUR)
        if isinstance(lease, Lease) and view is not None and isinstance(accomplice, ReceiptForger):
            last = [view.active(stage_index)[0] for stage_index in range(2, self.world.spec.num_stages)]
            path = (self.hotkey, accomplice.hotkey, *last)
            for leased in lease.microbatches:
                claim = _Claim(leased.microbatch_id, lease.outer_step)
                self.pretend(claim, self.hotkey, accomplice.hotkey, 0)
                accomplice.pretend(claim, self.hotkey, accomplice.hotkey, 0)
                end = MicrobatchEnd(
                    microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, loss=1.0, path=tuple(path)
                )
                self.say(Report(sequence=0, ends=(end,)))
        self.handle(LeaseRefused(None))


class Repeater(Forger):
    """Works honestly in its first outer step; from then on it takes no work and sends its old requests again."""

    def start(self) -> None:
        self._reports: list[Report] = []
        self._others: list[Message] = []
        self._tensors: list[tuple[Hotkey, TensorSent]] = []
        self._first_step: int | None = None
        super().start()
        self.after(REPEAT_S, self._repeat)

    @property
    def is_idle(self) -> bool:
        """Whether its honest outer step is over."""
        view = self.core.view
        return self._first_step is not None and view is not None and view.stage.outer_step > self._first_step

    def rewritten(self, report: Report) -> Report:
        if self._first_step is None and self.core.view is not None:
            self._first_step = self.core.view.stage.outer_step
        if not self.is_idle and len(self._reports) < REPEATS_MAX:
            self._reports.append(report)
        return report

    def note(self, message: Message) -> None:
        if not self.is_idle:
            self._others.append(message)

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        if isinstance(request, TensorSent) and self.is_idle:
            self.plot.num_claimed += 2
            respond(Refusal(code=RefusalCode.BUSY, message="no credits", retry_after_s=1.0), MESSAGE_BYTES)
        else:
            super().serve(source, request, respond)

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, SendTensor) and not self.is_idle and len(self._tensors) < REPEATS_MAX:
            parcel = self.cache.get(effect.transfer.microbatch_id, OUTGOING[effect.transfer.direction])
            if parcel is not None:
                self._tensors.append((effect.peer, TensorSent(effect.transfer, parcel.body.tobytes())))
        super()._carry_out(effect)

    def _repeat(self) -> None:
        if self.core.run_is_over:
            return
        if self.is_idle:
            self.attacked()
            for report in self._reports:
                self.spawn(self._tell(report))  # under its old number
                self.say(report)  # and under a new one
            for message in self._others:
                self.spawn(self._tell(message))
            for peer, sent in self._tensors:
                self.spawn(self._send_again(peer, sent))
        self.after(REPEAT_S, self._repeat)

    async def _send_again(self, peer: Hotkey, sent: TensorSent) -> None:
        await Ask(peer, sent, MESSAGE_BYTES + len(sent.body))
