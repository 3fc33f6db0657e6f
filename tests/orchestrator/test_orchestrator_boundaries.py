"""What miners report of their neighbours: the newest report of each, public, in pages, and worth nothing by itself."""

from orchestrator_world import World, hotkey_of, make_spec

from orion.common.ids import Direction, Hotkey, Phase
from orion.common.protocol.fields import BOUNDARY_PAGE_MAX
from orion.common.protocol.messages import BoundaryReport, Heartbeat, PeerStatistics
from orion.common.protocol.records import BoundaryQuery, BoundaryRecord, LedgerQuery

A0, B0, B1 = hotkey_of(0, 0), hotkey_of(1, 0), hotkey_of(1, 1)


def report_of(outer_step: int, peer: Hotkey) -> BoundaryReport:
    statistics = PeerStatistics(
        peer=peer,
        direction=Direction.ACTIVATION,
        num_tensors=4,
        num_refused=1,
        log_rms=-0.5,
        log_rms_excess=0.0,
        cosine_mean=0.5,
        cosine_previous=0.4,
        repeated_share=0.0,
    )
    return BoundaryReport(outer_step=outer_step, peers=(statistics,))


def tell(world: World, hotkey: Hotkey, report: BoundaryReport | None) -> None:
    heartbeat = Heartbeat(
        outer_step=0,
        phase=Phase.TRAIN,
        ready_outer_step=0,
        inner_step=0,
        queued=0,
        in_flight=0,
        applied=0,
        tokens_per_s=1.0,
        busy_share=0.5,
        boundary=report,
    )
    world.accept(hotkey, heartbeat)


def test_the_newest_report_of_each_miner_can_be_read() -> None:
    world = World()
    world.start()
    assert world.core.boundaries(BoundaryQuery()).records == ()
    before = world.core.ledger(LedgerQuery())
    tell(world, B0, report_of(0, A0))
    tell(world, B1, report_of(0, A0))
    tell(world, B0, report_of(1, A0))
    tell(world, B0, None)
    records = world.core.boundaries(BoundaryQuery()).records
    assert records == (
        BoundaryRecord(hotkey=B0, stage_index=1, report=report_of(1, A0)),
        BoundaryRecord(hotkey=B1, stage_index=1, report=report_of(0, A0)),
    )
    assert world.core.boundaries(BoundaryQuery(after=B0)).records == records[1:]
    assert world.core.boundaries(BoundaryQuery(after=B1)).records == ()
    assert world.core.ledger(LedgerQuery()) == before
    assert all(miner.heartbeat is None or miner.heartbeat.boundary is None for miner in world.status.miners)


def test_pages_are_bounded() -> None:
    replicas = BOUNDARY_PAGE_MAX + 3
    world = World(make_spec(replicas=replicas, num_stages=1), extra_replicas=0)
    world.start()
    names = sorted(world.active(0))
    for name in names:
        tell(world, name, report_of(0, A0))
    first = world.core.boundaries(BoundaryQuery()).records
    assert [record.hotkey for record in first] == names[:BOUNDARY_PAGE_MAX]
    rest = world.core.boundaries(BoundaryQuery(after=first[-1].hotkey)).records
    assert [record.hotkey for record in rest] == names[BOUNDARY_PAGE_MAX:]
