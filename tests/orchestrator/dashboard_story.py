"""The story of a small swarm in which something happens: a slow upload, a failed check, a miner that falls silent.

Told by driving the real core through the world of the orchestrator's tests, so it takes no time and is the same always.
"""

import random
from dataclasses import dataclass

from orchestrator_world import VALIDATOR, World, make_spec

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, MemberState, Phase, Subject
from orion.common.protocol.messages import Heartbeat, Join
from orion.common.protocol.records import Verdict
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import Effect, Event
from orion.orchestrator.journal import Record
from orion.orchestrator.stages import Uploading
from orion.simulator.swarm import named_hotkey

WHY = "the gradient of operation 3 has a cosine of 0.2134"
DEVICES = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "cpu")


@dataclass(frozen=True)
class Recording:
    """Every event that a core has handled, and what of it tests want to know."""

    spec: RunSpec
    records: tuple[Record, ...]
    straggler: Hotkey
    liar: Hotkey
    silent: Hotkey
    marks: dict[str, int]
    """How many records there were when something had come about."""

    def core(self) -> OrchestratorCore:
        """A new core that draws as the recorded one did."""
        return OrchestratorCore(self.spec, random.Random(7))


def tell_story(num_stages: int = 3, replicas: int = 3, outer_steps: int = 4, **changes: object) -> Recording:
    """Up to the middle of the last outer step's training."""
    model = {"preset": "nano", "num_blocks": max(4, 2 * num_stages)}
    fields = {"inner_steps": 4, "microbatches_per_step": 3, **changes}
    spec = make_spec(model=model, num_stages=num_stages, replicas=replicas, outer_steps=outer_steps, **fields)
    teller = _Teller(_SwiftWorld(spec))
    teller.tell()
    records = tuple(Record(number, now_s, event) for number, (now_s, event) in enumerate(teller.world.events))
    return Recording(spec, records, teller.straggler, teller.liar, teller.silent, teller.marks)


def miner_of(stage_index: int, replica: int) -> Hotkey:
    """A hotkey that looks like one."""
    return named_hotkey(f"miner {stage_index} {replica}")


class _SwiftWorld(World):
    """Does not check the core's invariants, which other tests do."""

    def handle(self, event: Event) -> list[Effect]:
        self.events.append((self.now_s, event))
        effects = self.core.handle(event, self.now_s)
        for effect in effects:
            self._carry_out(effect)
        return effects


class _Teller:
    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(11)
        self.marks: dict[str, int] = {}
        last = world.spec.num_stages - 1
        self.straggler = miner_of(min(1, last), 1)
        self.liar = miner_of(last, 0)
        self.silent = miner_of(0, world.spec.replicas - 1)
        self.num_applied: dict[Hotkey, int] = {}
        self.in_step: dict[Hotkey, int] = {}
        self.losses = 0

    def tell(self) -> None:
        world, spec = self.world, self.world.spec
        world.register(miner_of(stage, replica) for stage in range(spec.num_stages) for replica in range(spec.replicas))
        for stage_index in range(spec.num_stages):
            for replica in range(spec.replicas):
                hotkey = miner_of(stage_index, replica)
                device = DEVICES[replica % len(DEVICES)]
                url = f"http://10.{stage_index}.{replica}.1:9000"
                world.accept(hotkey, Join(url=url, device=device, memory_bytes=1 << 36, stage_index=stage_index))
                world.now_s += 0.3
        self.beat_all()
        world.tick()
        for outer_step in range(spec.outer_steps - 1):
            self.train(1.0)
            self.merge()
            self.judge(outer_step)
            self.marks[f"step {outer_step}"] = len(world.events)
        self.train(0.4, silent=self.silent)
        self.marks["gone"] = len(world.events)
        self.train(0.2)
        self.marks["end"] = len(world.events)

    # --- what goes on ---

    def present(self, stage_index: int) -> list[Hotkey]:
        return self.world.members(stage_index, "active", "ready", "joining")

    def beat_all(self, *, works: bool = False, silent: Hotkey | None = None) -> None:
        for stage_index in range(self.world.spec.num_stages):
            for hotkey in self.present(stage_index):
                if hotkey != silent:
                    self.beat(hotkey, stage_index, works)

    def beat(self, hotkey: Hotkey, stage_index: int, works: bool) -> None:
        stage, rng = self.world.stage(stage_index), self.rng
        applied = self.num_applied.get(hotkey, 0)
        busy = 0.72 + 0.25 * rng.random() if works else 0.02 * rng.random()
        late = applied // 5 if stage_index < self.world.spec.num_stages - 1 else 0
        self.world.ask(
            hotkey,
            Heartbeat(
                outer_step=stage.outer_step,
                phase=stage.phase,
                ready_outer_step=stage.outer_step,
                inner_step=applied // self.world.spec.microbatches_per_step % self.world.spec.inner_steps,
                queued=rng.randrange(3) if works else 0,
                in_flight=2 + rng.randrange(5) if works else 0,
                applied=applied,
                tokens_per_s=5_200.0 * busy,
                busy_share=busy,
                staleness_max=min(3, late),
                staleness=(applied - late - late // 3, late, late // 3),
                upload_bytes_per_s=1.1e7 * (0.8 + 0.4 * rng.random()),
                download_bytes_per_s=4.2e7 * (0.8 + 0.4 * rng.random()),
            ),
        )

    def train(self, part: float, silent: Hotkey | None = None) -> None:
        """A part of what is left of the outer step's share."""
        world, spec = self.world, self.world.spec
        share = world.core.look(lambda state: state.memory.leases.num_fresh)
        next_beat_s = world.now_s
        for number in range(round(share * part)):
            path = tuple(
                (ways := [hotkey for hotkey in world.active(stage) if hotkey != silent])[
                    (number + self.rng.randrange(2)) % len(ways)
                ]
                for stage in range(spec.num_stages)
            )
            (leased,) = world.lease(path[0])
            world.now_s += 0.12 + 0.25 * self.rng.random()
            self.losses += 1
            loss = 2.1 + 6.2 * (1 + self.losses / 14) ** -0.8 + 0.09 * self.rng.gauss(0, 1)
            world.travel(leased.microbatch_id, path, loss=loss)
            for hotkey in path:
                self.num_applied[hotkey] = self.num_applied.get(hotkey, 0) + 1
                self.in_step[hotkey] = self.in_step.get(hotkey, 0) + 1
            if world.now_s >= next_beat_s:
                self.beat_all(works=True, silent=silent)
                world.tick(0.0)
                next_beat_s = world.now_s + 1.0
        while silent is not None and silent in world.members(0, "active"):
            self.beat_all(works=True, silent=silent)
            world.tick(1.0)

    def merge(self) -> None:
        """Uploads come one after the other, the straggler's last; then every stage goes on by itself."""
        world, spec = self.world, self.world.spec
        took_s = {hotkey: 1.0 + 0.9 * self.rng.random() for hotkey in self.in_step}
        if self.straggler in took_s:
            took_s[self.straggler] = 5.5
        began_s = world.now_s
        for hotkey in sorted(took_s, key=lambda each: took_s[each]):
            world.now_s = max(world.now_s, began_s + took_s[hotkey])
            if isinstance(self.activity_of(hotkey), Uploading):
                world.upload(hotkey, self.in_step[hotkey])
            self.beat_all()
        while any(world.stage(stage_index).phase is Phase.UPLOAD for stage_index in range(spec.num_stages)):
            self.beat_all()  # who has done nothing is waited for a little
            world.tick(0.5)
        for stage_index in range(spec.num_stages):
            world.tick(0.2)
            plan = world.plan(stage_index)
            assert plan is not None
            for partition in plan.partitions:
                for hotkey in partition.reducers:
                    world.now_s += 0.15 * self.rng.random()
                    world.reduce(hotkey, partition.partition_index)
            for hotkey in world.members(stage_index, "active", "ready"):
                world.now_s += 0.1 * self.rng.random()
                world.apply(hotkey)
            if world.stage(stage_index).checkpoint_by is not None:
                world.checkpoint(stage_index)
        self.in_step.clear()
        self.beat_all()
        world.tick()

    def activity_of(self, hotkey: Hotkey) -> object:
        return self.world.core.look(lambda state: state.stage_of(state.memory.membership.members[hotkey]).activity)

    def judge(self, outer_step: int) -> None:
        """The validator replays everybody but a few; in the second outer step it finds the liar out."""
        world = self.world
        for stage_index in range(world.spec.num_stages):
            for hotkey in world.members(stage_index):
                lies = hotkey == self.liar and outer_step == 1
                if lies or self.rng.random() < 0.7:
                    world.accept(
                        VALIDATOR,
                        Verdict(
                            miner=hotkey,
                            outer_step=outer_step,
                            passed=not lies,
                            subject=Subject.WHOLE,
                            num_operations=24,
                            reason=WHY if lies else "",
                        ),
                    )
        world.tick()


def states(core: OrchestratorCore) -> dict[Hotkey, MemberState]:
    """Of every miner that was ever there."""
    return core.look(lambda state: {hotkey: member.state for hotkey, member in state.memory.membership.members.items()})
