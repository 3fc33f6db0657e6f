"""A miner that takes part without a device: its real core admits, receives, answers and frees, and computes nothing.

Owns the events that the orchestrator and the device would bring. What lies between the socket and the cache is a real
miner's: gate, signature, admission, digest, layout, finiteness, the monitor of what neighbours send.
"""

from random import Random

from orion.bench.transport.cargo import DEADLINE_S, STAGE_INDEX, receiver_key, run_spec, sender_key
from orion.common.clock import Clock
from orion.common.ids import Digest, MemberState, Phase
from orion.common.net.gate import Gate
from orion.common.protocol.messages import Feed, Joined, Peer, StageState
from orion.common.protocol.signing import Verifier, hotkey_of
from orion.miner.boundary_monitor import BoundaryMonitor
from orion.miner.cache import TensorCache
from orion.miner.core import MinerCore
from orion.miner.desk import Desk
from orion.miner.effects import Accept, Compute, Effect, FreeTensors, PersistLog, ReadBody, Refuse, SendReport
from orion.miner.events import (
    AnchorLoaded,
    ComputeEnded,
    ComputeRefused,
    Event,
    FeedArrived,
    Forward,
    JoinEnded,
    LogPersisted,
    ReportEnded,
    Ticked,
)
from orion.miner.memory_archive import MemoryArchive, MemoryDisk
from orion.miner.peer_server import PeerServer

TICK_S = 0.5


class DevicelessMiner:
    """The only replica of its stage, in its train phase."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        spec = run_spec()
        self._hotkey = hotkey_of(receiver_key())
        self._core = MinerCore(spec, self._hotkey, Random(1))
        self._desk = Desk()
        self._cache = TensorCache(spec.flow.in_flight_max)
        self._archive = MemoryArchive(MemoryDisk(), 1 << 20)
        self.server = PeerServer(
            spec,
            Gate(Verifier(self._hotkey), spec.digest, clock),
            core=self._core,
            desk=self._desk,
            cache=self._cache,
            archive=self._archive,
            monitor=BoundaryMonitor(1),
        )
        self._take(JoinEnded(Joined(stage_index=STAGE_INDEX, state=MemberState.ACTIVE)))
        self._take(FeedArrived(self._feed(spec.num_stages)))
        self._take(AnchorLoaded(STAGE_INDEX, 0, Digest("0" * 64)))

    async def run(self) -> None:
        """Owns the core until it is cancelled."""
        while True:
            event = await self._desk.next_event(TICK_S)
            self._take(event or Ticked())

    def _take(self, event: Event) -> None:
        waiting = [event]
        while waiting:
            for effect in self._core.handle(waiting.pop(0), self._clock.now_s()):
                ended = self._carry_out(effect)
                if ended is not None:
                    waiting.append(ended)

    def _carry_out(self, effect: Effect) -> Event | None:
        match effect:
            case ReadBody() | Accept() | Refuse():
                self._desk.answer(effect)
            case FreeTensors(microbatch_id):
                self._cache.free(microbatch_id)
            case Compute(Forward(microbatch_id)):
                # The shortest life that a microbatch can have: its credit is free again at once.
                return ComputeEnded(ComputeRefused(microbatch_id, "this miner has no device"))
            case SendReport(report):
                return ReportEnded(report.sequence, True)
            case PersistLog(stage_index, entries, commitment):
                return LogPersisted(self._archive.persist(stage_index, entries, commitment))
            case _:
                pass
        return None

    def _feed(self, num_stages: int) -> Feed:
        """What an orchestrator would say to a member whose run trains."""
        now_s = self._clock.now_s()
        places = ((hotkey_of(sender_key()), STAGE_INDEX - 1), (self._hotkey, STAGE_INDEX))
        return Feed(
            version=1,
            now_s=now_s,
            finished=False,
            assignment=Joined(stage_index=STAGE_INDEX, state=MemberState.ACTIVE),
            stages=tuple(
                StageState(
                    stage_index=index,
                    phase=Phase.TRAIN,
                    outer_step=0,
                    deadline_s=now_s + DEADLINE_S,
                    checkpoint=None,
                    checkpoint_by=None,
                )
                for index in range(num_stages)
            ),
            peers=tuple(
                Peer(hotkey=hotkey, url="http://127.0.0.1:1", stage_index=stage_index, state=MemberState.ACTIVE)
                for hotkey, stage_index in places
            ),
            merge_plan=None,
            manifest=None,
            validators=(),
        )
