"""The core by its events: rounds, its own failures, weights and the end."""

import random
from dataclasses import replace

import pytest
from validator_core_kit import ALL, SPEC, VIEW, A, B, C, events_of, failed, spec_with, world_of
from validator_world import LongestPrefix, make_feed
from working_miner import WorkingMiner, digest

from orion.common.ids import Phase
from orion.common.protocol.records import CommittedLog
from orion.validator.check import FETCHES_MAX, REPLAY_RETRY_S, TRIES
from orion.validator.errand import FAILURES_MAX
from orion.validator.events import (
    CommitmentsArrived,
    FeedArrived,
    FetchCommitments,
    FetchEvidence,
    FetchLedger,
    FetchLog,
    FetchProblem,
    FetchSigns,
    LogArrived,
    Replay,
    SendVerdict,
    WeightsRefused,
)

# --- honest rounds ----------------------------------------------------------------------------------------------------


def test_honest_miners_pass_and_weights_follow(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed()
    assert set(world.verdicts) == {A, B, C}
    assert not failed(world)
    assert all(1 <= verdict.num_operations <= 12 for verdict in world.verdicts.values())
    assert world.core.num_checks == ALL
    assert world.weights == [{1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 3: pytest.approx(1 / 3)}]
    ended = [notice.fields for notice in world.notices if notice.event == "check_ended"]
    assert all(fields["num_bit_equal"] == fields["num_compared"] for fields in ended)


def test_nobody_is_asked_before_the_commitments_are_in(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    for phase in (Phase.TRAIN, Phase.UPLOAD):
        world.give_feed(phase=phase)
        assert not world.effects
    feed = make_feed(SPEC, world.stages, version=9, phase=Phase.MERGE)
    effects = world.core.handle(FeedArrived(feed), world.now_s)
    assert effects == [FetchCommitments(0), FetchLedger(0), FetchSigns((0,))]
    assert world.core.handle(CommitmentsArrived(0, world.commitments(0)), world.now_s) == []  # the ledger is missing


def test_the_step_after_the_last_is_nobody_s_work(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed(outer_step=SPEC.outer_steps, phase=Phase.MERGE)
    world.give_feed(outer_step=SPEC.outer_steps, phase=Phase.DONE)
    fetched = [effect.outer_step for effect in world.effects if isinstance(effect, FetchCommitments)]
    assert fetched == [SPEC.outer_steps - 1]


def test_one_stage_behind_holds_the_round_back(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    feed = make_feed(SPEC, world.stages, version=1, phase=Phase.MERGE)
    behind = feed.stages[2].model_copy(update={"phase": Phase.UPLOAD})
    world.give(FeedArrived(feed.model_copy(update={"stages": (*feed.stages[:2], behind)})))
    assert not world.effects


def test_the_draw_and_the_prefix_differ_between_validators(honest: list[WorkingMiner]) -> None:
    spec = spec_with(checks_per_outer_step=1)
    seen = set()
    for seed in range(12):
        world = world_of(honest, spec, rng=random.Random(seed))
        world.give_feed()
        seen |= {(miner, verdict.num_operations) for miner, verdict in world.verdicts.items()}
    assert {miner for miner, _ in seen} == {A, B, C}
    assert len(seen) > 6


def test_evidence_is_fetched_a_few_at_a_time(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, spec_with(checks_per_outer_step=1), rng=LongestPrefix(0))
    feed = make_feed(SPEC, world.stages, version=1)
    effects = world.core.handle(FeedArrived(feed), world.now_s)
    for _ in range(3):
        effects = [
            following
            for effect in effects
            if (event := world.answer(effect)) is not None
            for following in world.core.handle(event, world.now_s)
        ]
    assert len([effect for effect in effects if isinstance(effect, FetchEvidence)]) <= FETCHES_MAX


def test_repeated_events_change_nothing(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed()
    effects = list(world.effects)
    for effect in effects:
        answer = world.answer(effect)
        if answer is not None:
            world.give(answer)
    assert world.core.num_checks == ALL
    assert len(world.weights) == 2  # the loop above set them once more by itself
    assert len([effect for effect in world.effects if isinstance(effect, Replay)]) == ALL


def test_a_log_of_an_earlier_request_is_not_taken_for_this_one(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, spec_with(checks_per_outer_step=1))
    for name in (A, B, C):
        world.problems[name] = FetchProblem.BUSY
    world.give_feed()
    asked = next(effect for effect in world.effects if isinstance(effect, FetchLog))
    late = CommittedLog(outer_step=7, start=0, entries=(), proof=())
    world.give(LogArrived(asked.miner, 7, late))
    assert not world.verdicts


def test_rounds_that_were_missed_are_not_made_up_for(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed()
    world.give_feed(outer_step=3, phase=Phase.TRAIN)
    assert [effect.outer_step for effect in world.effects if isinstance(effect, FetchCommitments)] == [0, 2]
    assert "outer_steps_not_checked" in events_of(world)


def test_no_checks_where_none_are_wanted_or_possible(honest: list[WorkingMiner]) -> None:
    for spec in (
        spec_with(checks_per_outer_step=0),
        SPEC.model_copy(update={"inner": SPEC.inner.model_copy(update={"inner_state": "kept"})}),
    ):
        world = world_of(honest, spec)
        world.give_feed()
        assert not world.verdicts
        assert len(world.weights) == 1


def test_without_a_permit_nobody_is_asked_and_with_it_the_newest_outer_step_is_checked(
    honest: list[WorkingMiner],
) -> None:
    world = world_of(honest)
    world.give_feed(validators=())
    world.pass_time(5)
    assert not world.effects
    world.give_feed()
    assert set(world.verdicts) == {A, B, C}


def test_a_run_that_ends_without_a_permit_ends(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True, validators=())
    assert not world.verdicts
    assert "outer_steps_not_checked" in events_of(world)
    assert world.core.is_done


def test_a_permit_that_is_lost_during_a_check_blames_nobody(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.problems[B] = FetchProblem.BUSY
    world.give_feed()
    world.pass_time(35)
    world.give_feed(validators=())
    assert set(world.verdicts) == {A, C}
    assert "check_undecided" in events_of(world)


# --- the validator's own failures -------------------------------------------------------------------------------------


def test_an_anchor_that_comes_late_is_waited_for(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.can_replay = False
    world.give_feed()
    world.can_replay = True
    world.pass_time(REPLAY_RETRY_S)
    assert set(world.verdicts) == {A, B, C}


def test_no_verdict_without_an_anchor(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.can_replay = False
    world.give_feed()
    world.pass_time(ALL * TRIES * REPLAY_RETRY_S)
    assert len([effect for effect in world.effects if isinstance(effect, Replay)]) == ALL * TRIES
    assert not world.verdicts
    assert events_of(world).count("check_undecided") == ALL
    assert len(world.weights) == 1


def test_an_orchestrator_that_fails_is_asked_again_with_a_bound(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.orchestrator_problem = True
    world.give_feed()
    world.pass_time(3)
    world.orchestrator_problem = None
    world.pass_time(4)
    assert set(world.verdicts) == {A, B, C}

    world = world_of(honest)
    world.orchestrator_problem = True
    world.give_feed()
    world.pass_time(1000)
    fetches = [effect for effect in world.effects if isinstance(effect, FetchCommitments)]
    assert len(fetches) == FAILURES_MAX
    assert "outer_steps_not_checked" in events_of(world)


def test_a_verdict_that_is_refused_for_good_is_not_sent_again(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, spec_with(checks_per_outer_step=1))
    feed = make_feed(SPEC, world.stages, version=1)
    events = [FeedArrived(feed)]
    while events:
        for effect in world.core.handle(events.pop(0), world.now_s):
            world.orchestrator_problem = False if isinstance(effect, SendVerdict) else None
            world.effects.append(effect)
            answer = world.answer(effect)
            if answer is not None:
                events.append(answer)  # type: ignore[arg-type]  # any event
    assert len([effect for effect in world.effects if isinstance(effect, SendVerdict)]) == 1
    assert not world.core.is_done


# --- weights and the end ----------------------------------------------------------------------------------------------


def test_weights_wait_for_the_rate_limit(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, view=replace(VIEW, last_update_block=999))
    world.give_feed()
    world.pass_time(99 * 12 - 2)
    assert not world.weights
    world.view = VIEW
    world.pass_time(3)
    assert len(world.weights) == 1


def test_the_chain_is_asked_again_when_it_says_later_and_not_when_it_says_no(honest: list[WorkingMiner]) -> None:
    for retry_after_s, num_set in ((20.0, 1), (None, 0)):
        world = world_of(honest)
        world.refusal = WeightsRefused("planted", retry_after_s)
        world.give_feed()
        world.refusal = None
        world.pass_time(19)
        assert not world.weights
        world.pass_time(2)
        assert len(world.weights) == num_set


def test_without_a_permit_no_weights_are_set(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, view=replace(VIEW, has_permit=False))
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    world.pass_time(2 * (40 + 12) - 1)
    assert not world.core.is_done
    world.pass_time(2)
    assert not world.weights
    assert "weights_not_set" in events_of(world)
    assert world.core.is_done


def test_a_permit_that_comes_with_the_next_epoch_is_used(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, view=replace(VIEW, has_permit=False))
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    world.view = VIEW
    world.pass_time(40 + 11)
    assert not world.weights
    world.pass_time(2)
    assert len(world.weights) == 1


def test_the_run_ends_with_its_last_checks_and_weights(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed(phase=Phase.TRAIN)
    assert not world.core.is_done
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    assert set(world.verdicts) == {A, B, C}
    assert len(world.weights) == 1
    assert world.core.is_done


def test_a_run_that_finishes_after_its_last_round_gets_weights_once_more(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed(phase=Phase.MERGE)
    assert len(world.weights) == 1
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    assert len(world.weights) == 2
    assert world.core.is_done


def test_the_end_waits_for_a_chain_that_is_away_but_not_for_ever(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, view=None)
    world.give_feed(outer_step=1, phase=Phase.DONE, finished=True)
    world.pass_time(60)
    assert not world.core.is_done
    world.pass_time(400)
    assert world.core.is_done
    assert "weights_not_set" in events_of(world)


def test_digests_of_bodies_are_those_of_the_wire(honest: list[WorkingMiner]) -> None:
    entry = honest[1].entries[0]
    assert entry.microbatch_id is not None
    assert digest(honest[1].bodies[entry.microbatch_id, entry.operation, "output"]) == entry.output_digest
