"""Routing rules raced through simulated worlds: the same world for all, whatever the rule."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from typer.testing import CliRunner

from orion.bench.routing.race import Race
from orion.bench.routing.rules import RULES, LogCapacity, Status, VirtualRuntime
from orion.bench.routing.study import RoutingStudy, WorldTimes, routing_study
from orion.bench.routing.world import (
    MEAN_PRESENT_S,
    NUM_MINERS,
    STAGES_MAX,
    STAGES_MIN,
    Reliability,
    Resident,
    World,
    draw_world,
)
from orion.cli.main import app
from orion.common.ids import Hotkey

PEERS = [Hotkey(name) for name in ("a", "b", "c")]


def small_world(seed: int = 0) -> World:
    return draw_world(seed, num_epochs=2, num_activations=60, num_miners=24)


def test_the_world_is_the_described_one() -> None:
    worlds = [draw_world(seed) for seed in range(12)]
    assert {world.num_stages for world in worlds} == set(range(STAGES_MIN, STAGES_MAX + 1))
    for world in worlds:
        classes = Counter(resident.reliability for resident in world.residents)
        assert classes == {Reliability.RELIABLE: 72, Reliability.SEMI: 14, Reliability.UNRELIABLE: 10}
        assert len({resident.hotkey for resident in world.residents}) == NUM_MINERS
        sizes = Counter(resident.stage for resident in world.residents)
        assert max(sizes.values()) - min(sizes.values()) <= 1
        for resident in world.residents:
            first, *later = resident.epochs
            assert first.mean_present_s == MEAN_PRESENT_S[resident.reliability]
            assert all(traits.mean_present_s != first.mean_present_s for traits in later), "reliability drifts"


@pytest.mark.parametrize("rule", RULES)
def test_a_race_ends_and_repeats_itself(rule: str) -> None:
    first, again = (Race(small_world(), RULES[rule]).run() for _ in range(2))
    assert first == again
    assert len(first.epoch_s) == 2 and all(seconds > 0 for seconds in first.epoch_s)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_held_or_in_flight_after_the_last_merge(rule: str) -> None:
    race = Race(small_world(1), RULES[rule])
    race.run()
    for miner in race.miners:
        assert not miner.num_held and not miner.num_waiting


def test_miners_that_drop_out_lose_what_they_hold() -> None:
    calm = replace(small_world(), residents=tuple(_never_away(resident) for resident in small_world().residents))
    undisturbed, disturbed = (Race(world, RULES["uniform"]).run() for world in (calm, draw_world(2, num_epochs=1)))
    assert undisturbed.num_unreached == 0
    assert disturbed.num_unreached > 0 and disturbed.num_lost > 0, "the fault fired"


def _never_away(resident: Resident) -> Resident:
    return replace(resident, epochs=tuple(replace(traits, mean_present_s=1e12) for traits in resident.epochs))


def test_logarithm_of_capacity_passes_over_full_peers() -> None:
    rule = LogCapacity(Random(1))
    assert {rule.choose(PEERS, 0.0) for _ in range(50)} == set(PEERS), "nothing is known: evenly"
    rule.told(PEERS[0], Status(free=0, forward_queue=3))
    rule.told(PEERS[1], Status(free=5, forward_queue=0))
    assert {rule.choose(PEERS, 0.0) for _ in range(50)} == {PEERS[1]}


def test_virtual_runtime_gives_work_in_proportion_to_pace() -> None:
    rule = VirtualRuntime(Random(1))
    chosen: Counter[Hotkey] = Counter()
    for _ in range(600):
        peer = rule.choose(PEERS[:2], 0.0)
        assert peer is not None
        chosen[peer] += 1
        rule.completed(peer, 1000.0 * sum(chosen.values()), 1000.0 * sum(chosen.values()) + (1.0, 3.0)[peer == "b"])
    assert 2.5 < chosen[PEERS[0]] / chosen[PEERS[1]] < 3.5


def test_virtual_runtime_bans_who_failed_until_the_list_is_read_again() -> None:
    rule = VirtualRuntime(Random(1))
    assert rule.choose(PEERS[:2], 0.0) is not None
    rule.failed(PEERS[0], 1.0)
    assert {rule.choose(PEERS[:2], 2.0) for _ in range(20)} == {PEERS[1]}
    assert PEERS[0] in {rule.choose(PEERS[:2], 40.0) for _ in range(20)}


def test_a_bar_that_is_missed_is_named() -> None:
    study = routing_study([])
    world = small_world()
    results = {rule: Race(world, RULES["uniform"]).run() for rule in RULES}
    study.worlds.append(WorldTimes(world, results))
    assert isinstance(study, RoutingStudy)
    assert len(study.faults()) == 2 * (len(RULES) - 1) + 1


def test_the_study_is_printed_as_one_object() -> None:
    result = CliRunner().invoke(app, ["bench", "routing", "--seeds", "2", "--activations", "40", "--json"])
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["rules"]) == {"uniform", "log_capacity", "virtual_runtime", "orion"}
    assert all(0 < times["median"] <= times["worst"] for times in report["rules"].values())
    assert 0 < report["gain_over_uniform"] < 1
    assert result.exit_code == (1 if report["faults"] else 0), result.output
