"""One machine under several hotkeys: what is in the queues ends, and pay follows work where devices are busy."""

from orion.bench.split_machine import (
    SPLIT_STAGE,
    SplitSetting,
    SplitWorld,
    format_split_row,
    split_report,
    split_row,
)

BUSY = SplitSetting("busy", trips=600, outer_steps=1)


def test_every_trip_ends_and_leaves_nothing_behind() -> None:
    world = SplitWorld(SplitSetting("few credits", trips=40, outer_steps=2, credits=2), 1)
    assert world.run() > 0.0
    for stage in world.stages:
        assert sum(replica.num_done for replica in stage) == 80
        for replica in stage:
            assert not replica.num_held and not replica.forwards and not replica.backwards and not replica.unsent
            assert not sum(replica.router.in_flight(peer.hotkey) for peer in world.stages[SPLIT_STAGE])


def test_a_world_repeats_itself() -> None:
    first, again = (SplitWorld(SplitSetting("short", trips=40, outer_steps=1), 3).run() for _ in range(2))
    assert first == again


def test_where_devices_are_busy_a_split_machine_earns_what_one_earns_and_elsewhere_what_others_leave() -> None:
    busy = split_row(BUSY, [1, 2])
    assert busy.others_use > 0.9
    assert busy.earned < 1.1
    idle = split_row(SplitSetting("idle", slowness=0.5, trips=128), [1])
    assert idle.others_use < 0.7
    assert 1.2 < idle.earned <= 2.1
    assert "under 2 hotkeys earns" in format_split_row(idle)
    assert split_report([busy, idle], 2)["num_seeds"] == 2
