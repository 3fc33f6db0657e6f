"""A core with a store, a clock and honest miners around it, in memory and without waiting."""

import random
from collections.abc import Callable, Iterable

from blake3 import blake3

from orion.common.config import RunSpec
from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Outcome, Phase
from orion.common.protocol.keys import checkpoint_key, pseudo_gradient_key, reduced_key
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Commitment,
    Contribution,
    Exclusion,
    Feed,
    Heartbeat,
    Join,
    Lease,
    LeasedMicrobatch,
    LeaseRequest,
    MergePlan,
    MicrobatchEnd,
    ObjectRef,
    Receipt,
    Reduced,
    Refusal,
    RefusalCode,
    Report,
    StageState,
    Uploaded,
)
from orion.common.protocol.records import RunStatus
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import (
    Announce,
    Answer,
    CheckObject,
    DeleteObjects,
    Effect,
    Event,
    MetagraphUpdated,
    Neuron,
    ObjectChecked,
    Recorded,
    Refuse,
    Request,
    RequestArrived,
    Response,
    Ticked,
)

START_S = 1_000_000.0
VALIDATOR = Hotkey("5Checker".ljust(48, "z"))
STRANGER = Hotkey("5Stranger".ljust(48, "z"))


def hotkey_of(stage_index: int, replica: int) -> Hotkey:
    """A well-formed name; the core does not care whether a key belongs to it."""
    return Hotkey(f"5Stage{stage_index + 1}Rep{replica + 1}".replace("0", "o").ljust(48, "z"))


def digest_of(*names: object) -> Digest:
    return Digest(blake3(repr(names).encode()).hexdigest())


def make_spec(**changes: object) -> RunSpec:
    """Two stages of two replicas, four microbatches a replica and outer step."""
    tree: dict[str, object] = {
        "run_id": "test",
        "seed": 1,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 16, "sequences_per_microbatch": 2},
        "num_stages": 2,
        "replicas": 2,
        "outer_steps": 3,
        "inner_steps": 2,
        "microbatches_per_step": 2,
        "num_partitions": 2,
        "time_limits": {"transfer_grace_s": 10.0, "train_s": 100.0, "microbatch_s": 30.0, "member_s": 10.0},
    }
    return RunSpec.parse({**tree, **changes}, "test")


class World:
    """One core. Every event goes through `handle`, which checks the invariants and carries out the effects."""

    def __init__(self, spec: RunSpec | None = None, *, extra_replicas: int = 2) -> None:
        self.spec = spec if spec is not None else make_spec()
        self.core = OrchestratorCore(self.spec, random.Random(7))
        self.now_s = START_S
        self.events: list[tuple[float, Event]] = []
        self.store: dict[str, ObjectRef] = {}
        self.deleted: list[str] = []
        self.announced: list[int] = []
        self.recorded: list[Recorded] = []
        """The public ledger."""
        self.loses: Callable[[ObjectRef], bool] = lambda ref: False
        """Objects that never become durable."""
        self.after: Callable[[World], None] = lambda world: None
        """Called after every event."""
        self._responses: dict[int, Response | Refusal] = {}
        self._next_request_id = 0
        self._sequences: dict[Hotkey, int] = {}
        stages, replicas = range(self.spec.num_stages), range(self.spec.replicas + extra_replicas)
        self.register(hotkey_of(stage, replica) for stage in stages for replica in replicas)

    # --- plumbing ---

    def register(self, miners: Iterable[Hotkey]) -> None:
        neurons = [Neuron(hotkey=miner, validator_permit=False) for miner in miners]
        validator = Neuron(hotkey=VALIDATOR, validator_permit=True)
        self.handle(MetagraphUpdated(neurons=(*neurons, validator)))

    def handle(self, event: Event) -> list[Effect]:
        self.events.append((self.now_s, event))
        effects = self.core.handle(event, self.now_s)
        self.core.check_invariants()
        self.after(self)
        for effect in effects:
            self._carry_out(effect)
        return effects

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Answer(request_id, message):
                self._responses[request_id] = message
            case Refuse(request_id, refusal):
                self._responses[request_id] = refusal
            case CheckObject(ref):
                durable = self.store.get(ref.key) == ref and not self.loses(ref)
                self.handle(ObjectChecked(ref=ref, durable=durable))
            case DeleteObjects(prefix):
                self.deleted.append(prefix)
                self.store = {key: ref for key, ref in self.store.items() if not key.startswith(prefix)}
            case Announce(version):
                self.announced.append(version)
            case Recorded():
                self.recorded.append(effect)

    def ask(self, hotkey: Hotkey, message: Request) -> Response | Refusal:
        """Sends a message; exactly one answer comes."""
        self._next_request_id += 1
        self.handle(RequestArrived(request_id=self._next_request_id, hotkey=hotkey, message=message))
        return self._responses.pop(self._next_request_id)

    def accept(self, hotkey: Hotkey, message: Request) -> Response:
        """Sends a message that must not be refused."""
        response = self.ask(hotkey, message)
        assert not isinstance(response, Refusal), response
        return response

    def refusal(self, hotkey: Hotkey, message: Request) -> RefusalCode:
        """Sends a message that must be refused."""
        response = self.ask(hotkey, message)
        assert isinstance(response, Refusal), response
        return response.code

    def tick(self, seconds: float = 0.25) -> None:
        self.now_s += seconds
        self.handle(Ticked())

    def wait(self, seconds: float, *alive: Hotkey) -> None:
        """Lets time pass while the given members send heartbeats."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            for hotkey in alive:
                self.beat(hotkey)
            self.tick(min(1.0, end_s - self.now_s))

    # --- what a miner sees ---

    def feed(self, hotkey: Hotkey) -> Feed:
        return self.core.feed(hotkey, self.now_s)

    @property
    def status(self) -> RunStatus:
        return self.core.status(self.now_s)

    def stage(self, stage_index: int) -> StageState:
        return self.feed(VALIDATOR).stages[stage_index]

    @property
    def phases(self) -> list[tuple[Phase, int]]:
        return [(stage.phase, stage.outer_step) for stage in self.feed(VALIDATOR).stages]

    def members(self, stage_index: int, *states: str) -> list[Hotkey]:
        return [
            miner.hotkey
            for miner in self.status.miners
            if miner.stage_index == stage_index and (not states or miner.state in states)
        ]

    def active(self, stage_index: int) -> list[Hotkey]:
        peers = self.feed(VALIDATOR).peers
        return [peer.hotkey for peer in peers if peer.stage_index == stage_index and peer.state == "active"]

    @property
    def finished(self) -> bool:
        return self.feed(VALIDATOR).finished

    def notices(self, word: str) -> list[str]:
        return [notice for notice in self.status.notices if word in notice]

    # --- what honest miners do ---

    def join(self, hotkey: Hotkey, stage_index: int | None = None) -> Response:
        url = f"http://10.0.0.1:{8000 + sum(hotkey.encode()) % 1000}"
        return self.accept(hotkey, Join(url=url, device="cpu", memory_bytes=1 << 30, stage_index=stage_index))

    def beat(
        self, hotkey: Hotkey, ready: int | None = -1, *, rate_bytes_per_s: float | None = None
    ) -> Response | Refusal:
        """A heartbeat; by default of a member that holds the anchor it should."""
        assignment = self.feed(hotkey).assignment
        stage = self.stage(assignment.stage_index if assignment is not None else 0)
        heartbeat = Heartbeat(
            outer_step=stage.outer_step,
            phase=stage.phase,
            ready_outer_step=stage.outer_step if ready == -1 else ready,
            inner_step=0,
            queued=0,
            in_flight=0,
            applied=0,
            tokens_per_s=1.0,
            busy_share=0.5,
            upload_bytes_per_s=rate_bytes_per_s,
            download_bytes_per_s=rate_bytes_per_s,
        )
        return self.ask(hotkey, heartbeat)

    def start(self) -> None:
        """All replicas join and become ready."""
        for stage_index in range(self.spec.num_stages):
            for replica in range(self.spec.replicas):
                self.join(hotkey_of(stage_index, replica), stage_index)
        for stage_index in range(self.spec.num_stages):
            for hotkey in self.members(stage_index):
                self.beat(hotkey)
        self.tick()

    @property
    def trained_step(self) -> int:
        """The outer step that the first stage trains, or was the last to train."""
        stage = self.stage(0)
        return stage.outer_step if stage.training_step is None else stage.training_step

    def lease(self, hotkey: Hotkey, num_microbatches: int = 1) -> tuple[LeasedMicrobatch, ...]:
        lease = self.accept(hotkey, self.lease_request(num_microbatches))
        assert isinstance(lease, Lease)
        return lease.microbatches

    def lease_request(self, num_microbatches: int = 1) -> LeaseRequest:
        """Of a miner that has heard of all that was leased so far."""
        return LeaseRequest(
            outer_step=self.trained_step,
            next_microbatch_id=self.status.microbatches_started,
            num_microbatches=num_microbatches,
        )

    def report(self, hotkey: Hotkey, **records: object) -> None:
        sequence = self._sequences.get(hotkey, 0)
        self._sequences[hotkey] = sequence + 1
        self.accept(hotkey, Report.model_validate({"sequence": sequence, **records}))

    def receipts(
        self, microbatch_id: MicrobatchId, path: tuple[Hotkey, ...]
    ) -> list[tuple[tuple[Hotkey, Hotkey], Receipt]]:
        """Every transfer of a trip along a path, with its two ends."""
        hops = [(Direction.ACTIVATION, stage, stage + 1) for stage in range(len(path) - 1)]
        hops += [(Direction.GRADIENT, stage + 1, stage) for stage in reversed(range(len(path) - 1))]
        return [
            (
                (path[from_stage], path[to_stage]),
                Receipt(
                    direction=direction,
                    microbatch_id=microbatch_id,
                    outer_step=self.trained_step,
                    sender=path[from_stage],
                    receiver=path[to_stage],
                    to_stage=to_stage,
                    digest=digest_of(microbatch_id, direction, to_stage),
                    size_bytes=100,
                ),
            )
            for direction, from_stage, to_stage in hops
        ]

    def travel(self, microbatch_id: MicrobatchId, path: tuple[Hotkey, ...], loss: float = 3.0) -> None:
        """A microbatch goes all the way and back; everybody reports."""
        for ends, receipt in self.receipts(microbatch_id, path):
            for hotkey in ends:
                self.report(hotkey, receipts=(receipt,))
        end = MicrobatchEnd(microbatch_id=microbatch_id, outcome=Outcome.APPLIED, loss=loss, path=path)
        self.report(path[0], ends=(end,))

    def train(self, *, num_left: int = 0) -> dict[Hotkey, int]:
        """Trains the whole share but `num_left`; who has applied how many."""
        num_applied: dict[Hotkey, int] = {}
        share = self.spec.inner_steps * self.spec.microbatches_per_step
        share *= min(len(self.active(stage_index)) for stage_index in range(self.spec.num_stages))
        for number in range(share - num_left):
            path = tuple(
                self.active(stage_index)[number % len(self.active(stage_index))]
                for stage_index in range(self.spec.num_stages)
            )
            (leased,) = self.lease(path[0])
            self.travel(leased.microbatch_id, path, loss=3.0 - 0.01 * leased.data_id)
            for hotkey in path:
                num_applied[hotkey] = num_applied.get(hotkey, 0) + 1
        return num_applied

    def commit(self, hotkey: Hotkey, num_applied: int, *, is_final: bool = True, log: object = "log") -> None:
        """A commitment to a log with that much work."""
        stage = self.stage_of(hotkey)
        commitment = Commitment(
            outer_step=stage.outer_step,
            num_entries=2 * num_applied,
            num_applied=num_applied,
            num_contributed=num_applied,
            num_kept=2 * num_applied,
            root=digest_of(log, hotkey, stage.outer_step, num_applied),
            is_final=is_final,
        )
        self.report(hotkey, commitment=commitment)

    def stage_of(self, hotkey: Hotkey) -> StageState:
        assignment = self.feed(hotkey).assignment
        assert assignment is not None
        return self.stage(assignment.stage_index)

    def contribution(self, hotkey: Hotkey, num_microbatches: int, content: object = "") -> Uploaded:
        """The message after writing a pseudo-gradient to the store."""
        stage = self.stage_of(hotkey)
        objects = tuple(
            ObjectRef(
                key=pseudo_gradient_key(stage.outer_step, stage.stage_index, hotkey, index),
                digest=digest_of("pseudo-gradient", hotkey, stage.outer_step, index, content),
                size_bytes=100,
            )
            for index in range(self.spec.num_partitions)
        )
        contribution = Contribution(hotkey=hotkey, num_microbatches=num_microbatches, objects=objects)
        return Uploaded(outer_step=stage.outer_step, contribution=contribution)

    def put(self, *refs: ObjectRef) -> None:
        self.store.update({ref.key: ref for ref in refs})

    def upload(self, hotkey: Hotkey, num_microbatches: int) -> None:
        self.commit(hotkey, num_microbatches)
        uploaded = self.contribution(hotkey, num_microbatches)
        self.put(*uploaded.contribution.objects)
        self.accept(hotkey, uploaded)

    def upload_all(self, num_applied: dict[Hotkey, int]) -> None:
        for hotkey, num_microbatches in num_applied.items():
            self.upload(hotkey, num_microbatches)

    def plan(self, stage_index: int) -> MergePlan | None:
        members = self.members(stage_index, "active", "ready", "joining")
        return self.feed(members[0]).merge_plan if members else None

    def reduce(
        self, hotkey: Hotkey, partition_index: int, content: object = "", excluded: tuple[Exclusion, ...] = ()
    ) -> Response | Refusal:
        """Writes a mean and reports it; honest ones have the same content."""
        stage = self.stage_of(hotkey)
        ref = ObjectRef(
            key=reduced_key(stage.outer_step, stage.stage_index, hotkey, partition_index),
            digest=digest_of("mean", stage.stage_index, stage.outer_step, partition_index, content),
            size_bytes=100,
        )
        self.put(ref)
        reduced = Reduced(outer_step=stage.outer_step, partition_index=partition_index, object=ref, excluded=excluded)
        return self.ask(hotkey, reduced)

    def reduce_all(self, stage_index: int) -> None:
        plan = self.plan(stage_index)
        assert plan is not None
        for partition in plan.partitions:
            for hotkey in partition.reducers:
                self.reduce(hotkey, partition.partition_index)

    def apply(self, hotkey: Hotkey, content: object = "") -> Response | Refusal:
        stage = self.stage_of(hotkey)
        digest = digest_of("anchor", stage.stage_index, stage.outer_step + 1, content)
        return self.ask(hotkey, Applied(outer_step=stage.outer_step, state_digest=digest))

    def apply_all(self, stage_index: int) -> None:
        for hotkey in self.members(stage_index, "active", "ready"):
            self.apply(hotkey)

    def checkpoint(self, stage_index: int, content: object = "") -> None:
        """Whoever is asked for the anchor uploads it."""
        stage = self.stage(stage_index)
        hotkey = stage.checkpoint_by
        assert hotkey is not None
        ref = ObjectRef(
            key=checkpoint_key(stage.outer_step, stage_index, hotkey),
            digest=digest_of("checkpoint", stage_index, stage.outer_step, hotkey),
            size_bytes=100,
        )
        self.put(ref)
        digest = digest_of("anchor", stage_index, stage.outer_step, content)
        self.accept(hotkey, CheckpointUploaded(outer_step=stage.outer_step, object=ref, state_digest=digest))

    def merge(self, stage_index: int) -> None:
        """From a complete upload to the next anchor and its checkpoint."""
        self.reduce_all(stage_index)
        self.apply_all(stage_index)
        if self.stage(stage_index).checkpoint_by is not None:
            self.checkpoint(stage_index)

    def outer_step(self) -> None:
        """A whole outer step in which nothing goes wrong."""
        self.upload_all(self.train())
        for stage_index in range(self.spec.num_stages):
            self.merge(stage_index)
        self.now_s += 1.0

    def run(self) -> None:
        """The whole run."""
        self.start()
        while not self.finished:
            self.outer_step()
