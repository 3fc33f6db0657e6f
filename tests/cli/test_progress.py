"""Progress from successive statuses."""

import pytest
from cli_statuses import losses, run_status

from orion.cli.progress import ProgressTracker


def test_throughput_is_measured_over_the_recent_past() -> None:
    tracker = ProgressTracker(microbatches_total=100)
    assert tracker.update(run_status(now_s=1000.0, started_s=990.0, tokens=0)).tokens_per_s == 0.0
    assert tracker.update(run_status(now_s=1010.0, tokens=20_000)).tokens_per_s == pytest.approx(2000.0)
    for second in range(11, 60):
        progress = tracker.update(run_status(now_s=1000.0 + second, tokens=20_000))
    assert progress.tokens_per_s == 0.0  # nothing came for longer than the window


def test_fraction_follows_work_and_outer_steps_whichever_is_further() -> None:
    tracker = ProgressTracker(microbatches_total=100)
    assert tracker.update(run_status(outer_step=0, microbatches_applied=10)).fraction == pytest.approx(0.1)
    # Fewer microbatches than planned, because a miner is gone: the outer steps count.
    assert tracker.update(run_status(outer_step=2, outer_steps=4, microbatches_applied=30)).fraction == pytest.approx(
        0.5
    )
    assert tracker.update(run_status(finished=True)).fraction == 1.0


def test_remaining_time_extrapolates_from_the_start() -> None:
    tracker = ProgressTracker(microbatches_total=100)
    progress = tracker.update(run_status(now_s=1000.0, started_s=990.0, outer_step=0, microbatches_applied=25))
    assert progress.remaining_s == pytest.approx(30.0)
    assert tracker.update(run_status(started_s=None)).remaining_s is None


def test_loss_and_microbatches_in_flight() -> None:
    progress = ProgressTracker(100).update(run_status(recent_losses=losses(4.0, 2.0)))
    assert progress.loss == pytest.approx(3.0)
    assert progress.in_flight == 3
    assert ProgressTracker(100).update(run_status(recent_losses=())).loss is None


def test_the_first_look_shows_the_mean_over_the_run_so_far() -> None:
    progress = ProgressTracker(100).update(run_status(now_s=1000.0, started_s=990.0, tokens=30_000))
    assert progress.tokens_per_s == pytest.approx(3000.0)
