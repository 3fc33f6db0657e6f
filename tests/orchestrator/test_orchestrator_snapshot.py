"""Snapshots of the core: whoever goes on from one decides as whoever went on without."""

import random
from array import array
from collections import deque
from dataclasses import dataclass, field, make_dataclass
from enum import StrEnum

import pytest
from bad_days import Day
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator_world import World, make_spec

from orion.common.errors import DataError
from orion.common.ids import Digest
from orion.common.protocol.messages import ObjectRef
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.state_codec import StateCodec

RESTORED_EVERY = 12
"""Events, on average."""


@pytest.mark.parametrize("seed", [11, 12])
def test_a_core_that_is_restored_again_and_again_does_what_one_does_that_never_was(seed: int) -> None:
    day = Day(seed)
    day.pass_by()
    rng = random.Random(seed)
    world = day.world
    never, often = (OrchestratorCore(world.spec, random.Random(7)) for _ in range(2))
    num_restored = 0
    for number, (now_s, event) in enumerate(world.events):
        where = f"seed {seed}, event {number}: {event}"
        assert often.handle(event, now_s) == never.handle(event, now_s), where
        if rng.randrange(RESTORED_EVERY) == 0:
            snapshot = often.snapshot()
            assert snapshot == never.snapshot(), where
            often = OrchestratorCore(world.spec, random.Random(number))
            often.restore(snapshot)
            often.check_invariants()
            assert often.digest() == never.digest(), where
            num_restored += 1
    assert often.digest() == never.digest() == world.core.digest()
    assert often.status(world.now_s) == world.status
    assert num_restored > 20


def test_a_run_that_goes_on_from_a_checkpoint_and_one_that_overlaps_are_restored_too() -> None:
    world = World(make_spec(sync="overlapped", outer_steps=2))
    snapshots: list[tuple[int, bytes]] = []
    world.after = lambda world: snapshots.append((len(world.events), world.core.snapshot()))
    world.run()
    for number, snapshot in snapshots[::40]:
        core = OrchestratorCore(world.spec, random.Random(3))
        core.restore(snapshot)
        for now_s, event in world.events[number:]:
            core.handle(event, now_s)
        assert core.digest() == world.core.digest()


def test_what_is_no_snapshot_of_this_version_is_refused_and_changes_nothing() -> None:
    core = OrchestratorCore(make_spec(), random.Random(7))
    digest = core.digest()
    snapshot = core.snapshot()
    wrong = [b"", b"{}", b"[]", snapshot[:-20], snapshot.replace(b'"draw_seed"', b'"draw_sed"')]
    for data in (*wrong, snapshot.replace(b'"Memory":[', b'"Member2":[],"Memory":[')):
        with pytest.raises(DataError):
            core.restore(data)
    assert core.digest() == digest


# --- the codec ---


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Place:
    stage: int
    name: str


@dataclass(slots=True)
class Part:
    number: float


@dataclass(slots=True)
class First:
    parts: list[Part]


@dataclass(slots=True)
class Empty:
    pass


@dataclass(slots=True)
class Tree:
    number: float
    maybe: int | None
    colours: dict[Place, Colour]
    pairs: dict[tuple[str, int], tuple[Colour, ...]]
    either: First | Empty
    queue: deque[tuple[int, str]]
    refs: list[ObjectRef]
    parts: list[Part]
    by_name: dict[str, Part]
    column: "array[float]" = field(default_factory=lambda: array("d"))


CODEC = StateCodec(Tree, shared=[Part])
PLACES = st.builds(Place, st.integers(), st.text())
COLOURS = st.sampled_from(Colour)
PARTS = st.lists(st.builds(Part, st.floats(allow_nan=False)), max_size=3)
REFS = st.builds(ObjectRef, key=st.just("outer/0/x"), digest=st.just(Digest("a" * 64)), size_bytes=st.integers(0, 9))
TREES = st.builds(
    Tree,
    number=st.floats(allow_nan=False),
    maybe=st.none() | st.integers(),
    colours=st.dictionaries(PLACES, COLOURS, max_size=3),
    pairs=st.dictionaries(st.tuples(st.text(), st.integers()), st.lists(COLOURS, max_size=3).map(tuple), max_size=3),
    either=st.builds(First, PARTS) | st.builds(Empty),
    queue=st.lists(st.tuples(st.integers(), st.text()), max_size=5).map(lambda items: deque(items, 7)),
    refs=st.lists(REFS, max_size=2),
    parts=PARTS,
    by_name=st.just({}),
    column=st.lists(st.floats(allow_nan=False), max_size=4).map(lambda items: array("d", items)),
)


@settings(max_examples=30)
@given(TREES)
def test_a_state_comes_back_as_it_was(tree: Tree) -> None:
    tree.by_name = {str(number): part for number, part in enumerate(reversed(tree.parts))}
    again = CODEC.decode(CODEC.encode(tree))
    assert again == tree
    assert CODEC.encode(again) == CODEC.encode(tree)
    assert list(again.colours) == list(tree.colours), "in the same order"
    assert again.queue.maxlen == 7
    for number, part in enumerate(reversed(again.parts)):
        assert again.by_name[str(number)] is part, "one object on two ways"


def test_the_order_in_which_a_dict_was_filled_is_part_of_the_state() -> None:
    codec = StateCodec(make_dataclass("Held", [("values", dict[str, int])]))
    held = make_dataclass("Held", [("values", dict[str, int])])
    assert codec.encode(held({"a": 1, "b": 2})) != codec.encode(held({"b": 2, "a": 1}))


def test_a_field_that_is_new_in_this_version_gets_its_default_and_one_that_is_gone_is_refused() -> None:
    old = make_dataclass("Held", [("number", int)])
    new = make_dataclass("Held", [("number", int), ("more", list[int], field(default_factory=list))])
    strict = make_dataclass("Held", [("number", int), ("more", int)])
    data = StateCodec(old).encode(old(3))
    assert StateCodec(new).decode(data) == new(3, [])
    with pytest.raises(DataError, match="without more"):
        StateCodec(strict).decode(data)
    with pytest.raises(DataError, match=r"Held has \['more'\]"):
        StateCodec(old).decode(StateCodec(new).encode(new(3, [1])))


@pytest.mark.parametrize("hint", [set[int], object, bytes, int | list[int], "Tree | int"])
def test_what_has_no_canonical_form_is_found_before_there_is_a_state(hint: object) -> None:
    with pytest.raises((TypeError, NameError)):
        StateCodec(make_dataclass("Held", [("field", hint)]))
