"""When a run may call itself good."""

from typing import Any

import pytest
from cli_statuses import outcome, run_status

from orion.cli.outcome import LossEnds, loss_ends, problems

DONE = run_status(finished=True, outer_step=4)


def test_a_good_run_has_no_problems() -> None:
    assert problems(outcome(), DONE) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchors_equal": False}, "different anchors"),
        ({"loss_first": None, "loss_last": None}, "no microbatch"),
        ({"loss_last": 7.7}, "did not fall"),
        ({"heldout_loss": 7.6}, "no better than an untrained"),
        ({"microbatches_applied": 39}, "neither applied nor cancelled"),
        ({"verdicts_failed": 1}, "1 checks"),
        ({"chain_weights": {}}, "not on the chain"),
        ({"incentives": {}}, "no incentive after an epoch for miner-0"),
        ({"scores": {"a": 2.0, "b": 1.0}, "incentives": {"a": 0.3, "b": 0.3001, "miner-0": 1.0}}, "b has more"),
    ],
)
def test_each_flaw_is_named(changes: dict[str, Any], words: str) -> None:
    (problem,) = problems(outcome(**changes), DONE)
    assert words in problem


def test_an_unfinished_run_is_a_problem() -> None:
    (problem,) = problems(outcome(), run_status(finished=False, outer_step=2))
    assert "stopped at outer step 2 of 4" in problem


def test_rounding_turns_no_order_around() -> None:
    paid = {"miner-0": 0.5, "a": 0.25, "b": 0.25 + 1 / 65_535}
    assert problems(outcome(scores={"miner-0": 4.0, "a": 2.0, "b": 2.0}, incentives=paid), DONE) == []
    assert problems(outcome(scores={"miner-0": 4.0, "a": 2.000001, "b": 2.0}, incentives=paid), DONE) == []


def test_loss_ends() -> None:
    assert loss_ends([]) == LossEnds(None, None)
    assert loss_ends([4.0, 3.0, 2.0, 1.0], window=2) == LossEnds(3.5, 1.5)


def test_the_keys_that_other_tools_rely_on() -> None:
    documented = (
        "run_id tokens tokens_per_s tokens_per_s_single_process loss_first loss_last heldout_loss "
        "heldout_loss_untrained heldout_loss_single_process outer_steps anchors_equal microbatches_started "
        "microbatches_applied microbatches_cancelled checks verdicts_failed scores chain_weights incentives "
        "checkpoint plot seconds"
    )
    assert set(documented.split()) <= outcome().model_dump().keys()
