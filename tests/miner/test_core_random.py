"""MinerCore against a world that does everything in any order: whatever happens, the invariants hold, every admitted
microbatch is freed exactly once, and in the end nothing is held."""

from collections import Counter
from random import Random

import pytest
from miner_kit import STATE_DIGEST, Driver, digest_of, hotkey_of, object_of

from orion.common.ids import Direction, MemberState, MicrobatchId, Phase
from orion.common.protocol.messages import (
    Cancel,
    HoldsQuery,
    Lease,
    LeasedMicrobatch,
    Manifest,
    MergedPartition,
    Refusal,
    RefusalCode,
)
from orion.miner.effects import (
    Accept,
    AnswerHolds,
    ApplyManifest,
    AskHolds,
    Compute,
    DropGraph,
    Effect,
    FreeAllButGradient,
    FreeTensors,
    LoadAnchor,
    ReadBody,
    ReducePartition,
    Refuse,
    RequestJoin,
    RequestLease,
    SendCancel,
    SendNotice,
    SendReport,
    SendTensor,
    UploadCheckpoint,
    UploadPseudoGradient,
)
from orion.miner.events import (
    AnchorFailed,
    AnchorLoaded,
    ApplyEnded,
    ApplyFailed,
    Backward,
    BackwardDone,
    BackwardOffered,
    BodyEnded,
    BodyRef,
    CancelArrived,
    CheckpointEnded,
    ComputeEnded,
    ComputeRefused,
    EncodePseudoGradient,
    Event,
    FeedArrived,
    Forward,
    ForwardDone,
    ForwardOffered,
    HoldsAsked,
    HoldsEnded,
    InnerStep,
    InnerStepDone,
    Job,
    JobResult,
    JoinEnded,
    LeaseGranted,
    LeaseRefused,
    NoticeEnded,
    PseudoGradientEncoded,
    ReduceEnded,
    ReportEnded,
    SendEnded,
    SendOutcome,
    Ticked,
    UploadEnded,
)

BROKEN = Refusal(code=RefusalCode.DIGEST_MISMATCH, message="broken")


class Chaos:
    """Ends effects in any order and any way, and does whatever peers and the orchestrator may do."""

    def __init__(self, stage_index: int, seed: int) -> None:
        self.rng = Random(seed)
        self.driver = Driver(stage_index, seed=seed, flow={"in_flight_max": 4, "staleness_max": 2})
        self.pending: list[Effect] = []
        self.next_number = 0
        self.next_request = 0
        self.admitted: set[MicrobatchId] = set()
        self.freed: Counter[MicrobatchId] = Counter()
        self.answered: Counter[int] = Counter()
        self.asked: set[int] = set()
        self.offered: list[ForwardOffered | BackwardOffered] = []
        self.numbers: dict[int, MicrobatchId] = {}
        self.sent: list[SendTensor] = []
        self.leased: set[MicrobatchId] = set()
        self.outer_step = 0

    def take(self, event: Event) -> None:
        for effect in self.driver.handle(event, after_s=self.rng.choice([0.0, 0.01, 0.1])):
            match effect:
                case FreeTensors(microbatch_id):
                    self.freed[microbatch_id] += 1
                case Accept(request_id) | Refuse(request_id):
                    self.answered[request_id] += 1
                case AnswerHolds(request_id):
                    self.answered[request_id] += 1
                case SendCancel() | DropGraph() | FreeAllButGradient():
                    pass
                case ReadBody(request_id):
                    self.admitted.add(self.numbers[request_id])
                    self.pending.append(effect)
                case SendTensor():
                    self.sent.append(effect)
                    self.pending.append(effect)
                case _:
                    self.pending.append(effect)

    # --- effects end --------------------------------------------------------------------------------------------------

    def end_one(self) -> None:
        effect = self.rng.choice(self.pending)
        if isinstance(effect, Compute):  # a device ends its jobs in order
            effect = next(other for other in self.pending if isinstance(other, Compute))
        self.pending.remove(effect)
        self.take(self.ending(effect))

    def ending(self, effect: Effect) -> Event:
        good = self.rng.random() < 0.85
        match effect:
            case ReadBody(request_id):
                return BodyEnded(request_id, None if good else BROKEN)
            case Compute(job):
                return ComputeEnded(self.result(job, good))
            case SendTensor(peer, _, transfer):
                outcome = SendOutcome.ACCEPTED if good else self.rng.choice(list(SendOutcome))
                code = self.rng.choice([RefusalCode.BAD_TENSOR, RefusalCode.WRONG_PHASE, RefusalCode.CONFLICT])
                return SendEnded(
                    transfer.microbatch_id, transfer.direction, peer, outcome, 0.1, code=code, retry_after_s=0.1
                )
            case AskHolds(peer, _, query):
                held = tuple(number for number in query.microbatch_ids if self.rng.random() < 0.7)
                outcome = SendOutcome.ACCEPTED if good else SendOutcome.UNREACHABLE
                return HoldsEnded(peer, query, outcome, 0.1, held if good else ())
            case SendReport(report):
                return ReportEnded(report.sequence, good)
            case SendNotice(notice):
                return NoticeEnded(notice, self.rng.choice(list(SendOutcome)))
            case _:
                return self.ending_of_outer_step(effect, good)

    def ending_of_outer_step(self, effect: Effect, good: bool) -> Event:
        match effect:
            case RequestJoin():
                return JoinEnded(None)
            case RequestLease(request):
                return self.lease(request.outer_step) if good else LeaseRefused(0.1)
            case LoadAnchor(stage_index, outer_step):
                return AnchorLoaded(stage_index, outer_step, STATE_DIGEST) if good else AnchorFailed("broken")
            case ApplyManifest(manifest) if good:
                return ApplyEnded(manifest.outer_step, STATE_DIGEST)
            case ApplyManifest(manifest):
                return ApplyFailed(manifest.outer_step, "broken")
            case UploadPseudoGradient(outer_step):
                return UploadEnded(outer_step, good)
            case ReducePartition(_, outer_step, index):
                return ReduceEnded(outer_step, index, object_of("mean"), ())
            case UploadCheckpoint(_, outer_step):
                return CheckpointEnded(outer_step, object_of("c") if good else None)
            case _:
                raise AssertionError(f"{effect} has no ending")

    def result(self, job: Job, good: bool) -> JobResult:
        is_last = self.driver.stage_index == self.driver.spec.num_stages - 1
        match job:
            case Forward(microbatch_id):
                if not good:
                    return ComputeRefused(microbatch_id, "not finite")
                return ForwardDone(microbatch_id, self.body(microbatch_id), 1.0 if is_last else None)
            case Backward(microbatch_id):
                if not good:
                    return ComputeRefused(microbatch_id, "not finite")
                return BackwardDone(microbatch_id, self.body(microbatch_id) if self.driver.stage_index else None)
            case InnerStep(_, share):
                num_microbatches = round(share * self.driver.spec.microbatches_per_step)
                return InnerStepDone(num_microbatches, None if good else "not finite")
            case EncodePseudoGradient(outer_step):
                return PseudoGradientEncoded(outer_step, tuple(object_of(f"p{index}") for index in range(3)))

    def body(self, microbatch_id: MicrobatchId) -> BodyRef:
        return BodyRef(digest_of(("out", microbatch_id)), 10)

    def lease(self, outer_step: int) -> LeaseGranted:
        numbers = [MicrobatchId(self.next_number + place) for place in range(self.rng.randint(1, 4))]
        self.next_number += len(numbers)
        self.leased.update(numbers)
        microbatches = tuple(LeasedMicrobatch(microbatch_id=number, data_id=number + 100) for number in numbers)
        return LeaseGranted(
            Lease(
                outer_step=outer_step, microbatches=microbatches, deadline_s=self.driver.now_s + self.rng.choice([1, 9])
            )
        )

    # --- the world acts -----------------------------------------------------------------------------------------------

    def act(self) -> None:
        choices = [self.offer_forward, self.offer_backward, self.repeat, self.cancel, self.tick, self.orphan]
        choices += [self.replace] * (self.driver.stage_index >= 2)
        if self.rng.random() < 0.05:
            choices = [self.change_feed]
        self.rng.choice(choices)()

    def ask(self, event: ForwardOffered | BackwardOffered) -> None:
        self.numbers[event.request_id] = event.transfer.microbatch_id
        self.asked.add(event.request_id)
        self.offered.append(event)
        self.take(event)

    def request_id(self) -> int:
        self.next_request += 1
        return self.next_request

    def offer_forward(self) -> None:
        if self.driver.stage_index == 0:
            return
        self.next_number += 1
        transfer = self.driver.activation(
            self.next_number,
            replica=self.rng.randrange(2),
            outer_step=self.outer_step,
            deadline_s=self.driver.now_s + self.rng.choice([1, 9]),
        )
        self.ask(ForwardOffered(self.request_id(), transfer.path[-1], transfer))

    def offer_backward(self) -> None:
        forward = [send for send in self.sent if send.transfer.direction is Direction.ACTIVATION]
        if not forward or self.driver.stage_index == self.driver.spec.num_stages - 1:
            return
        send = self.rng.choice(forward[-6:])
        transfer = self.driver.transfer(
            Direction.GRADIENT,
            send.transfer.microbatch_id,
            path=(*send.transfer.path, send.peer, *self.behind()),
            loss=1.0,
            outer_step=send.transfer.outer_step,
            data_id=send.transfer.data_id,
        )
        self.ask(BackwardOffered(self.request_id(), send.peer, transfer))

    def behind(self) -> tuple[str, ...]:
        return tuple(hotkey_of(stage, 0) for stage in range(self.driver.stage_index + 2, self.driver.spec.num_stages))

    def repeat(self) -> None:
        if self.offered:
            event = self.rng.choice(self.offered[-8:])
            self.ask(type(event)(self.request_id(), event.sender, event.transfer))

    def cancel(self) -> None:
        if self.offered or self.sent:
            known = [(event.sender, event.transfer) for event in self.offered[-6:]]
            known += [(send.peer, send.transfer) for send in self.sent[-6:]]
            sender, transfer = self.rng.choice(known)
            cancel = Cancel(microbatch_id=transfer.microbatch_id, outer_step=transfer.outer_step, reason="chaos")
            self.take(CancelArrived(sender, cancel))

    def orphan(self) -> None:
        """The miner before, or the one before that, asks what is held."""
        if not self.offered:
            return
        transfer = self.rng.choice(self.offered[-8:]).transfer
        lost = self.rng.choice([None, transfer.path[-1]])
        sender = transfer.path[-1] if lost is None else transfer.path[-2:][0]
        request_id = self.request_id()
        self.asked.add(request_id)
        query = HoldsQuery(
            outer_step=transfer.outer_step, microbatch_ids=(transfer.microbatch_id, MicrobatchId(0)), lost=lost
        )
        self.take(HoldsAsked(request_id, sender, query))

    def replace(self) -> None:
        """A replacement for the miner before offers its own output."""
        offered = [event.transfer for event in self.offered if event.transfer.direction is Direction.ACTIVATION]
        if not offered:
            return
        transfer = self.rng.choice(offered[-8:])
        other = hotkey_of(self.driver.stage_index - 1, self.rng.randrange(2))
        digest = digest_of(("replaced", transfer.microbatch_id))
        replaced = transfer.model_copy(update={"path": (*transfer.path[:-1], other), "digest": digest})
        self.ask(ForwardOffered(self.request_id(), other, replaced))

    def tick(self) -> None:
        self.take(Ticked())

    def change_feed(self) -> None:
        world, rng = self.driver.world, self.rng
        kind = rng.choice(["phase", "phase", "gone", "state", "state"])
        if kind == "gone":
            everybody = [hotkey_of(stage, replica) for stage in range(3) for replica in range(2)]
            world.gone = {hotkey for hotkey in everybody if rng.random() < 0.15 and hotkey != self.driver.me}
        elif kind == "state":
            world.state = rng.choice([MemberState.ACTIVE] * 4 + [MemberState.JOINING, None])
        else:
            phase = world.phases[self.driver.stage_index]
            following = {Phase.TRAIN: Phase.UPLOAD, Phase.UPLOAD: Phase.MERGE, Phase.MERGE: Phase.TRAIN}[phase]
            if phase is Phase.MERGE:
                world.manifest = self.manifest()
                self.outer_step += 1
            world.set_phase(following, self.outer_step)
            world.checkpoint_by = rng.choice([None, self.driver.me])
        self.take(FeedArrived(world.feed()))

    def manifest(self) -> Manifest:
        partition = MergedPartition(partition_index=0, object=object_of("mean0"), reducers=())
        return Manifest(
            stage_index=self.driver.stage_index,
            outer_step=self.outer_step,
            partitions=(partition,),
            contributors=(),
            total_microbatches=1,
        )

    def settle(self) -> None:
        """Training ends for good; every effect that is under way ends too."""
        self.driver.world.state = None
        self.take(FeedArrived(self.driver.world.feed()))
        for _ in range(500):
            ending = [
                effect for effect in self.pending if not isinstance(effect, RequestJoin | SendReport | SendNotice)
            ]
            if not ending:
                return
            self.pending.remove(ending[0])
            self.take(self.ending(ending[0]))
        raise AssertionError(f"the core goes on and on: {self.pending}")


def run(stage_index: int, seed: int) -> Chaos:
    chaos = Chaos(stage_index, seed)
    chaos.take(FeedArrived(chaos.driver.world.feed()))
    for _ in range(800):
        if chaos.pending and chaos.rng.random() < 0.6:
            chaos.end_one()
        else:
            chaos.act()
    chaos.settle()
    return chaos


@pytest.mark.parametrize("stage_index", [0, 1, 2])
def test_nothing_is_lost_or_kept_whatever_happens(stage_index: int) -> None:
    num_applied = num_cancelled = 0
    for seed in range(12):
        chaos = run(stage_index, seed)

        where = f"stage {stage_index}, seed {seed}"
        assert chaos.driver.core.heartbeat(0, 0).in_flight == 0, where
        assert set(chaos.freed.values()) <= {1}, f"{where}: freed twice"
        assert chaos.admitted <= set(chaos.freed), f"{where}: admitted and never freed"
        assert chaos.asked == set(chaos.answered), f"{where}: asked and never answered"
        assert set(chaos.answered.values()) <= {1}, f"{where}: answered twice"
        if stage_index == 0:
            ends = Counter(end.microbatch_id for end in chaos.driver.ends())
            assert set(ends) == chaos.leased and set(ends.values()) <= {1}, f"{where}: a lease did not end once"
        num_applied += chaos.driver.core.num_applied
        num_cancelled += len(chaos.freed) - chaos.driver.core.num_applied

    assert num_applied > 25 and num_cancelled > 25, "the world was too cruel or too kind to test much"
