"""The core by its events: what fails a miner, what silence means, and whose fault it was."""

import pytest
import torch
from validator_core_kit import SPEC, A, B, C, events_of, failed, spec_with, world_of
from validator_world import LongestPrefix, make_feed
from working_miner import Cheat, WorkingMiner, record_of, trained

from orion.common.ids import MemberState, Phase
from orion.miner.archive import OUTER_STEPS_KEPT
from orion.validator import check
from orion.validator.core import OUTER_STEPS_OWED
from orion.validator.events import (
    FeedArrived,
    FetchLog,
    FetchProblem,
)

# --- cheats -----------------------------------------------------------------------------------------------------------


def test_cheats_fail_and_lose_their_weight() -> None:
    world = world_of(
        trained(SPEC, {1: Cheat(gradient=lambda gradient: gradient + gradient.std())}), rng=LongestPrefix(0)
    )
    world.give_feed()
    assert set(failed(world)) == {B}
    assert "cosine" in failed(world)[B]
    assert world.weights == [{1: pytest.approx(0.5), 3: pytest.approx(0.5)}]


def test_a_log_changed_after_the_commitment_fails(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.logs[B] = (*honest[1].entries[:-1], honest[1].entries[-2])
    entry = honest[2].entries[0].model_copy(update={"data_id": 1})
    world.logs[C] = (entry, *honest[2].entries[1:])
    world.give_feed()
    assert set(failed(world)) == {B, C}
    assert all("log does not match its commitments" in reason for reason in failed(world).values())


def test_a_log_that_does_not_continue_what_was_committed_to_on_the_way_fails(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    record = record_of(B, honest[1])
    first, second = record.earlier
    world.records[B] = record.model_copy(update={"earlier": (first, second.model_copy(update={"root": first.root}))})
    early = record_of(C, honest[2])
    claim = early.earlier[0].model_copy(update={"num_applied": early.earlier[0].num_applied + 1})
    world.records[C] = early.model_copy(update={"earlier": (claim, *early.earlier[1:])})
    world.give_feed()
    assert set(failed(world)) == {B, C}
    assert f"the first {second.num_entries} records have another root" in failed(world)[B]
    assert f"commitment claims {claim.num_applied}" in failed(world)[C]


def test_two_commitments_to_one_length_fail(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    record = record_of(B, honest[1])
    other = record.commitment.model_copy(update={"root": record.earlier[0].root, "is_final": False})
    world.records[B] = record.model_copy(update={"earlier": (*record.earlier, other)})
    world.give_feed()
    assert set(failed(world)) == {B}
    assert "different roots" in failed(world)[B]


def test_who_keeps_too_little_to_be_replayed_fails_and_nothing_beyond_what_is_kept_is_drawn(
    honest: list[WorkingMiner],
) -> None:
    spec = spec_with(replay_ops_max=5)
    world = world_of(honest, spec, rng=LongestPrefix(0))
    for name, num_kept in ((B, 4), (C, 5)):
        record = record_of(name, world.miners[name])
        newest = record.commitment.model_copy(update={"num_kept": num_kept})
        world.records[name] = record.model_copy(update={"commitment": newest})
    world.give_feed()
    assert failed(world) == {B: "keeps the tensors of 4 operations, 5 must be"}
    assert world.verdicts[C].num_operations == 5


def test_of_a_long_log_only_what_is_replayed_is_fetched(
    honest: list[WorkingMiner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LOG_ENTRIES_WHOLE", 10)
    spec = spec_with(replay_ops_max=4)
    world = world_of(honest, spec, rng=LongestPrefix(0))
    world.give_feed()
    asked = {effect.miner: effect.request for effect in world.effects if isinstance(effect, FetchLog)}
    assert not failed(world)
    for name, miner in world.miners.items():
        assert len(miner.entries) > 10
        assert (asked[name].start, asked[name].stop, asked[name].sizes[-1]) == (0, 4, len(miner.entries))
    changed = honest[1].entries[9].model_copy(update={"data_id": 1})
    world = world_of(honest, spec, rng=LongestPrefix(0))
    world.logs[B] = (*honest[1].entries[:9], changed, *honest[1].entries[10:])
    world.give_feed()
    assert set(failed(world)) == {B}, "also what is not shown must be under the root"


def test_evidence_that_is_not_the_committed_tensor_fails(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.bodies[A] = {"z": torch.zeros(2, 16, 8)}
    world.give_feed()
    assert set(failed(world)) == {A}
    assert "does not match the committed log" in failed(world)[A]


def test_a_body_that_cannot_be_used_fails(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.evidence_problems[A] = FetchProblem.BAD_BODY
    world.problems[B] = FetchProblem.BAD_BODY
    world.give_feed()
    assert set(failed(world)) == {A, B}


# --- silence ----------------------------------------------------------------------------------------------------------


def test_refused_evidence_fails_once_a_feed_shows_the_miner_is_there(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.evidence_problems[B] = FetchProblem.REFUSED
    world.give_feed()
    assert B not in world.verdicts
    world.pass_time(1)
    world.give_feed()
    assert set(failed(world)) == {B}
    assert "withheld" in failed(world)[B]
    assert set(world.verdicts) == {A, B, C}


@pytest.mark.parametrize("problem", [FetchProblem.UNREACHABLE, FetchProblem.BUSY])
def test_a_miner_that_does_not_answer_is_asked_until_the_deadline(
    honest: list[WorkingMiner], problem: FetchProblem
) -> None:
    world = world_of(honest)
    world.problems[B] = problem
    world.give_feed()
    world.pass_time(30)
    world.give_feed()
    world.pass_time(5)
    assert failed(world) == {B: "log not delivered in time"}
    assert 5 <= len([effect for effect in world.effects if isinstance(effect, FetchLog) and effect.miner == B]) <= 27


def test_a_miner_that_answers_late_but_in_time_passes(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.evidence_problems[B] = FetchProblem.BUSY
    world.give_feed()
    world.pass_time(4)
    del world.evidence_problems[B]
    world.pass_time(4)
    assert set(world.verdicts) == {A, B, C}
    assert not failed(world)


def test_a_miner_that_is_gone_gets_no_verdict(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.problems[B] = FetchProblem.UNREACHABLE
    world.give_feed()
    world.pass_time(2)
    left = {name: stage_index for name, stage_index in world.stages.items() if name != B}
    world.give(FeedArrived(make_feed(SPEC, left, version=50)))
    assert set(world.verdicts) == {A, C}
    assert "check_undecided" in events_of(world)


def test_a_miner_that_was_away_meanwhile_is_not_blamed_for_silence(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.evidence_problems[B] = FetchProblem.REFUSED
    world.give_feed()
    world.pass_time(1)
    world.give_feed(states={B: MemberState.JOINING})
    assert set(world.verdicts) == {A, C}


def test_a_miner_that_was_started_anew_is_drawn_and_answers_like_any_other(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed(states={B: MemberState.JOINING})
    assert set(world.verdicts) == {A, B, C}
    assert not failed(world)


def test_silence_while_the_orchestrator_is_silent_too_gives_no_verdict(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.problems[B] = FetchProblem.NOT_FOUND
    world.give_feed()
    world.pass_time(61)
    assert set(world.verdicts) == {A, C}
    assert "check_undecided" in events_of(world)


def test_nobody_has_to_stay_after_the_run(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.evidence_problems[B] = FetchProblem.UNREACHABLE
    world.give_feed()
    world.pass_time(2)
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    world.pass_time(2)
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    assert set(world.verdicts) == {A, C}
    assert world.core.is_done


@pytest.mark.parametrize("what", ["log", "evidence"])
@pytest.mark.parametrize("state", [MemberState.ACTIVE, MemberState.JOINING])
def test_who_no_longer_has_what_it_committed_to_fails(
    honest: list[WorkingMiner], what: str, state: MemberState
) -> None:
    world = world_of(honest)
    (world.problems if what == "log" else world.evidence_problems)[B] = FetchProblem.NOT_FOUND
    world.give_feed()
    assert B not in world.verdicts
    world.pass_time(1)
    world.give_feed(states={B: state})
    assert set(failed(world)) == {B}
    assert "withheld" in failed(world)[B]


@pytest.mark.parametrize("outer_step", [OUTER_STEPS_OWED - 1, OUTER_STEPS_OWED])
def test_nobody_has_to_keep_logs_for_ever(honest: list[WorkingMiner], outer_step: int) -> None:
    world = world_of(honest)
    world.problems[B] = FetchProblem.NOT_FOUND
    world.give_feed()
    world.pass_time(1)
    world.give_feed(outer_step=outer_step, phase=Phase.TRAIN)
    assert set(failed(world)) == ({B} if outer_step < OUTER_STEPS_OWED else set())
    assert OUTER_STEPS_OWED < OUTER_STEPS_KEPT, "a feed may be late"


def test_work_that_no_commitment_covers_is_nobody_s_fault(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.uncommitted |= {A, B}
    world.give_feed()
    world.pass_time(1)
    world.give_feed()
    assert set(world.verdicts) == {C}
    assert not failed(world)
