"""Random days: members that come, go, stall, repeat themselves and lie, a store that loses objects, restarts."""

import random

from orchestrator_world import World, digest_of, hotkey_of, make_spec

from orion.common.ids import Hotkey, MicrobatchId, Outcome, Phase
from orion.common.protocol.messages import (
    Applied,
    Leave,
    MicrobatchEnd,
    ObjectRef,
    Refusal,
    Report,
    Uploaded,
)
from orion.orchestrator.events import (
    ConnectionLost,
    ConnectionSeen,
    ObjectChecked,
    RequestArrived,
    Resumed,
)

NUM_STAGES, REPLICAS = 2, 3
OUTER_STEPS = 9
NUM_EVENTS = 250


class Day:
    """Miners around a core; each step of a day is one thing that one of them does."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = World(
            make_spec(
                replicas=REPLICAS,
                outer_steps=OUTER_STEPS,
                keep_outer_steps=2,
                time_limits={"transfer_grace_s": 5.0, "train_s": 40.0, "microbatch_s": 15.0, "member_s": 8.0},
            )
        )
        self.everybody = [hotkey_of(stage, replica) for stage in range(NUM_STAGES) for replica in range(REPLICAS)]
        self.applied: dict[tuple[Hotkey, int], int] = {}
        self.open_trips: list[tuple[MicrobatchId, Hotkey]] = []
        self.num_done: dict[str, int] = {}

    # --- honest work, as far as it is due now ---

    def work(self, hotkey: Hotkey) -> None:
        feed = self.world.feed(hotkey)
        if feed.assignment is None or feed.assignment.state == "gone":
            self.world.join(hotkey)
            return
        self.world.beat(hotkey)
        stage = feed.stages[feed.assignment.stage_index]
        num_applied = self.applied.get((hotkey, stage.outer_step), 0)
        if stage.phase is Phase.TRAIN and stage.stage_index == 0:
            self.lease(hotkey)
        if stage.phase is Phase.UPLOAD:
            self.world.commit(hotkey, num_applied)
            if num_applied:
                self.upload(hotkey, self.world.contribution(hotkey, num_applied))
        if feed.merge_plan is not None:
            for partition in feed.merge_plan.partitions:
                if hotkey in partition.reducers:
                    self.world.reduce(hotkey, partition.partition_index)
        if stage.phase is Phase.MERGE and feed.manifest is not None and feed.manifest.outer_step == stage.outer_step:
            self.world.apply(hotkey)
        if self.world.stage(stage.stage_index).checkpoint_by == hotkey:
            self.world.checkpoint(stage.stage_index)

    def lease(self, hotkey: Hotkey) -> None:
        lease = self.world.ask(hotkey, self.world.lease_request(3))
        if isinstance(lease, Refusal) or lease.kind != "lease":
            return
        for leased in lease.microbatches:
            self.travel(leased.microbatch_id, hotkey)

    def travel(self, microbatch_id: MicrobatchId, lessee: Hotkey) -> None:
        others = self.world.active(1)
        if not others:
            return
        path = (lessee, self.rng.choice(others))
        self.world.travel(microbatch_id, path)
        outer_step = self.world.stage(0).outer_step
        for hotkey in path:
            self.applied[(hotkey, outer_step)] = self.applied.get((hotkey, outer_step), 0) + 1

    def upload(self, hotkey: Hotkey, uploaded: Uploaded) -> None:
        self.world.put(*uploaded.contribution.objects)
        self.world.ask(hotkey, uploaded)

    # --- what goes wrong ---

    def do_anything(self) -> None:
        """One of them does something, mostly what it should."""
        hotkey = self.rng.choice(self.everybody)
        action = self.rng.choice(
            [self.work] * 12
            + [self.stall, self.leave, self.forget, self.lie, self.lose, self.repeat, self.rubbish, self.restart]
            + [self.break_off]
        )
        self.num_done[action.__name__] = self.num_done.get(action.__name__, 0) + 1
        action(hotkey)
        self.world.tick(self.rng.choice([0.1, 0.3, 1.0]))

    def stall(self, hotkey: Hotkey) -> None:
        """Time passes in which this one and some others say nothing."""
        silent = {hotkey, *self.rng.sample(self.everybody, 2)}
        for _ in range(self.rng.randrange(20)):
            for other in self.everybody:
                if other not in silent:
                    self.world.beat(other)
            self.world.tick(1.0)

    def leave(self, hotkey: Hotkey) -> None:
        self.world.ask(hotkey, Leave(reason="chaos"))

    def break_off(self, hotkey: Hotkey) -> None:
        """The connections of some break off; not all of them come back."""
        for other in {hotkey, *self.rng.sample(self.everybody, self.rng.randrange(3))}:
            self.world.handle(ConnectionLost(hotkey=other, usual_s=self.rng.random()))
        self.world.tick(self.rng.random())
        if self.rng.random() < 0.5:
            self.world.handle(ConnectionSeen(hotkey=hotkey))

    def forget(self, hotkey: Hotkey) -> None:
        """A miner's process starts anew."""
        self.world.join(hotkey)
        self.world.beat(hotkey, ready=None)

    def lie(self, hotkey: Hotkey) -> None:
        feed = self.world.feed(hotkey)
        if feed.assignment is None:
            return
        stage = feed.stages[feed.assignment.stage_index]
        self.world.beat(hotkey, ready=self.rng.choice([0, stage.outer_step, stage.outer_step + 1]))
        if feed.merge_plan is not None:
            for partition in feed.merge_plan.partitions:
                self.world.reduce(hotkey, partition.partition_index, "lie")
        self.world.ask(hotkey, Applied(outer_step=stage.outer_step, state_digest=digest_of("lie")))
        if stage.phase is Phase.UPLOAD:
            self.world.commit(hotkey, 1 << 18)
            self.upload(hotkey, self.world.contribution(hotkey, 1 << 30, "lie"))
        microbatch_id = MicrobatchId(self.rng.randrange(60))
        for _, receipt in self.world.receipts(microbatch_id, (hotkey_of(0, 0), hotkey)):
            self.world.ask(hotkey, Report(sequence=1 << 40, receipts=(receipt,)))
        end = MicrobatchEnd(microbatch_id=microbatch_id, outcome=Outcome.APPLIED, loss=0.0)
        self.world.ask(hotkey, Report(sequence=1 << 41, ends=(end,)))

    def lose(self, hotkey: Hotkey) -> None:
        """The store loses this miner's objects for a while."""
        lost = self.rng.choice([hotkey, Hotkey("nobody")])
        self.world.loses = lambda ref: lost in ref.key

    def repeat(self, _: Hotkey) -> None:
        """Something that was sent before arrives again."""
        event = self.rng.choice(self.world.events)[1]
        if isinstance(event, RequestArrived):
            self.world.ask(event.hotkey, event.message)
        elif isinstance(event, ObjectChecked):
            self.world.handle(event)

    def rubbish(self, hotkey: Hotkey) -> None:
        """The store answers what nobody asked."""
        ref = ObjectRef(key=f"outer/0/stage/0/reduced/{hotkey}/0.safetensors", digest=digest_of(1), size_bytes=1)
        self.world.handle(ObjectChecked(ref=ref, durable=True))

    def restart(self, _: Hotkey) -> None:
        self.world.now_s += self.rng.choice([0.5, 30.0])
        self.world.handle(Resumed())

    # --- and then ---

    def behave(self) -> None:
        """Everybody works as it should until the run ends; it must, within the sum of all deadlines."""
        self.world.loses = lambda ref: False
        last_s = self.world.now_s + OUTER_STEPS * (40.0 + 3 * 10.0) + 100.0
        while not self.world.finished:
            assert self.world.now_s < last_s, self.world.phases
            for hotkey in self.everybody:
                self.work(hotkey)
            self.world.tick(1.0)

    def pass_by(self) -> None:
        """All of it, to the end of the run."""
        for _ in range(NUM_EVENTS):
            if not self.world.finished:
                self.do_anything()
        assert len(self.num_done) == 10, "every kind of trouble has fired"
        self.behave()
