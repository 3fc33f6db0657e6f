"""What people see while a swarm runs."""

import io

from cli_statuses import ALICE, BOB, miner_status, outcome, run_status, stage_state
from rich.console import Console

from orion.cli.live_view import SwarmView, picture, plain_line
from orion.cli.outcome import SwarmOutcome
from orion.cli.progress import ProgressTracker
from orion.cli.summary import print_summary
from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.protocol.records import Repairs, RunStatus, StageStaleness

NAMES = {ALICE: "miner-0", BOB: "miner-1"}


def shown(statuses: list[RunStatus], *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    tracker = ProgressTracker(100)
    with SwarmView(console, NAMES) as view:
        for status in statuses:
            view.show(status, tracker.update(status))
    return out.getvalue()


def summary(of: SwarmOutcome, *problems: str) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=160, color_system=None), of, problems)
    return out.getvalue()


def test_the_picture_shows_every_miner_by_name_with_its_state_and_work() -> None:
    status = run_status(miners=(miner_status(ALICE, 0), miner_status(BOB, 1, MemberState.GONE)))
    picture = shown([status], terminal=True)
    for words in ("outer step 1/4", "miner-0", "miner-1", "gone", "1,234", "75%", "loss 4.000", "3 in flight", "left"):
        assert words in picture
    assert ALICE not in picture


def test_the_picture_tells_what_saved_the_microbatches_of_lost_miners() -> None:
    assert " 0 repaired, 2 cancelled" in shown([run_status(microbatches_cancelled=2)], terminal=True)
    status = run_status(microbatches_repaired=Repairs(rerouted=3, spliced=2, released=1), microbatches_cancelled=1)
    picture = shown([status], terminal=True)
    assert "6 repaired (3 rerouted, 2 spliced, 1 leased again), 1 cancelled" in picture


def test_the_picture_shows_the_same_facts_as_the_dashboard() -> None:
    status = run_status(staleness=(StageStaleness(counts=(3, 1)), StageStaleness(counts=())), started_s=None)
    tracker = ProgressTracker(100, flops_per_token=2e6)
    tracker.update(status.model_copy(update={"now_s": status.now_s - 10.0, "tokens": status.tokens - 1000}))
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(picture(status, tracker.update(status), NAMES))
    for words in ("75% busy", "2e+08 FLOP/s", "staleness 0.250", "replicas equal"):
        assert words in out.getvalue()
    differing = picture(status.model_copy(update={"anchors_equal": False}), tracker.update(status), NAMES)
    Console(file=out, width=120, color_system=None).print(differing)
    assert "REPLICAS HAVE DIFFERED" in out.getvalue()


def test_without_a_terminal_lines_appear_when_something_changes_or_time_passes() -> None:
    start = run_status(now_s=1000.0)
    same = run_status(now_s=1000.5)
    upload = run_status(now_s=1001.0, stages=(stage_state(0, Phase.UPLOAD), stage_state(1)))
    later = run_status(now_s=1020.0, stages=(stage_state(0, Phase.UPLOAD), stage_state(1)))
    lines = shown([start, same, upload, later], terminal=False).splitlines()
    assert len(lines) == 3
    assert "[train train]" in lines[0]
    assert "[upload train]" in lines[1]


def test_notices_name_miners_and_are_said_once() -> None:
    status = run_status(notices=(f"{ALICE} is gone",))
    text = shown([status, status.model_copy(update={"now_s": 1100.0})], terminal=False)
    assert text.count("miner-0 is gone") == 1


def test_plain_line_of_a_run_that_has_not_begun() -> None:
    status = run_status(recent_losses=(), started_s=None, miners=())
    assert "loss -" in plain_line(status, ProgressTracker(100).update(status))


def test_what_outlived_a_lost_miner_is_shown_while_it_runs_and_at_the_end() -> None:
    repairs = Repairs(rerouted=3, spliced=2, released=1)
    status = run_status(microbatches_repaired=repairs)
    assert "6 repaired" in plain_line(status, ProgressTracker(100).update(status))
    assert "6 repaired" in shown([status], terminal=True)
    assert "6 outlived a lost miner (3 rerouted, 2 spliced, 1 leased again)" in summary(
        outcome(microbatches_repaired=repairs)
    )
    assert "outlived" not in summary(outcome())


def test_the_summary_names_problems_or_says_that_all_is_well() -> None:
    compared = outcome(tokens_per_s_single_process=4000.0, heldout_loss_single_process=5.0)
    good = summary(compared)
    for words in ("all is well", "swarm +2.0%", "swarm 50%", "In the beginning", "miner-0", "yes"):
        assert words in good
    bad = summary(compared, "the loss did not fall")
    assert "the loss did not fall" in bad
    assert "all is well" not in bad


def test_hotkeys_without_a_name_are_shortened() -> None:
    stranger = Hotkey("5DAAnrj7VHTznn2AWBemMuyBwZWs6FNFjdyVXUeYum3PTXFy")
    picture = shown([run_status(miners=(miner_status(stranger, 0),))], terminal=True)
    assert stranger[:12] in picture
    assert stranger not in picture
