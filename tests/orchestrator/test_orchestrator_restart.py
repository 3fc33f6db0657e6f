"""Killed at any event and started again, the orchestrator stands where its journal ends."""

import random

from orchestrator_world import World, hotkey_of, make_spec

from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import CheckObject, DeleteObjects, Resumed, Ticked, event_from_json, event_to_json
from orion.orchestrator.journal import Header, MemoryJournal, Record
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.replay import Replayed, replay


def test_a_replay_gives_the_state_after_every_event() -> None:
    """The digest after each event of a run equals that of a core that replays the journal up to there."""
    digests: list[str] = []
    world = World(make_spec(outer_steps=2, inner_steps=1))
    world.after = lambda world: digests.append(world.core.digest())
    world.run()
    first_shown = len(world.events) - len(digests)
    twin = OrchestratorCore(world.spec, random.Random(7))
    for number, (now_s, event) in enumerate(world.events):
        twin.handle(event_from_json(event_to_json(event)), now_s)
        if number >= first_shown:
            assert twin.digest() == digests[number - first_shown], f"event {number}: {event}"
    assert len(digests) > 100


def test_replay_reads_the_whole_journal() -> None:
    world = World()
    world.run()
    journal = MemoryJournal(Header(world.spec.digest, b"s" * 32))
    journal.append([Record(number, now_s, event) for number, (now_s, event) in enumerate(world.events)])
    twin = OrchestratorCore(world.spec, random.Random(7))
    ledger = MemoryLedger(world.spec.digest)
    assert replay(twin, journal, ledger) == Replayed(len(world.events), world.now_s - 1.0, len(world.events))
    assert twin.digest() == world.core.digest()
    empty = MemoryJournal(journal.header)
    fresh = MemoryLedger(world.spec.digest)
    assert replay(OrchestratorCore(world.spec, random.Random(7)), empty, fresh) == Replayed(0, 0.0, 0)
    assert (ledger.num_entries, fresh.num_entries) == (len(world.recorded), 0)


def test_nobody_is_blamed_for_the_time_the_orchestrator_was_away() -> None:
    world = World()
    world.start()
    world.lease(hotkey_of(0, 0), 2)
    deadline_s = world.stage(0).deadline_s
    world.now_s += 3600.0
    world.handle(Resumed())
    world.handle(Ticked())
    assert len(world.active(0)) == len(world.active(1)) == 2
    assert world.status.microbatches_cancelled == 0
    assert world.stage(0).deadline_s == deadline_s + 3600.0
    assert world.notices("away for 3600")
    world.wait(40.0, *world.active(0), *world.active(1))
    assert world.status.microbatches_cancelled == 2


def test_looks_at_objects_and_deletions_that_were_lost_are_repeated() -> None:
    world = World(make_spec(outer_steps=6, keep_outer_steps=2))
    world.start()
    for _ in range(4):
        world.outer_step()
    assert world.deleted == ["outer/0/", "outer/1/"]
    (hotkey, num_applied), *_ = world.train().items()
    world.commit(hotkey, num_applied)
    uploaded = world.contribution(hotkey, num_applied)
    world.accept(hotkey, uploaded)  # the objects are not there yet
    effects = world.handle(Resumed())
    assert {effect.prefix for effect in effects if isinstance(effect, DeleteObjects)} == {"outer/0/", "outer/1/"}
    world.put(*uploaded.contribution.objects)
    effects = world.handle(Ticked())
    looked = [effect.ref for effect in effects if isinstance(effect, CheckObject)]
    assert looked == [] or set(looked) == set(uploaded.contribution.objects)
    world.tick(2.5)
    assert not [effect for effect in world.handle(Ticked()) if isinstance(effect, CheckObject)]


def test_a_run_goes_on_to_its_end_after_restarts_at_every_phase() -> None:
    """The orchestrator is away for a minute after every tenth event; the run ends as if it had not been."""
    world = World()
    count = 0

    def away(world: World) -> None:
        nonlocal count
        count += 1
        if count % 10 == 0:
            world.now_s += 60.0
            world.core.handle(Resumed(), world.now_s)
            world.core.check_invariants()

    world.after = away
    world.run()
    assert world.status.finished
    assert world.status.microbatches_applied == 24 and world.status.microbatches_cancelled == 0
    assert count > 200
