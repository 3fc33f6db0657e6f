"""Attackers among honest miners: each really attacks, is found by the check that claims it, and hurts nobody else."""

import pytest

from orion.simulator.adversaries.catalogue import ATTACKS, attack_named
from orion.simulator.adversaries.rows import EARNINGS_BEFORE_MAX
from orion.simulator.adversaries.table import Laboratory, Setting, Table
from orion.simulator.adversaries.trial import Trial
from orion.simulator.validator_host import REPLAY_S

SEED = 2
SETTING = Setting(replicas_alone=3, outer_steps=4, checked_share=1.0, whole_share=1.0, replay_s=REPLAY_S)
"""Smaller swarms than the benchmark's, and more checks: an attack shows within a few outer steps, also where the
validator leaves some of them out."""

FAILS_BY = {
    "noise_large": "forward",
    "noise_small": "forward",
    "zero_activations": "forward",
    "random_activations": "forward",
    "flipped_gradients": "backward",
    "free_rider": "forward",
    "skipped_backward": "backward",
    "stale_parameters": "forward",
    "copied_pseudo_gradient": "pseudo-gradient",
    "scaled_pseudo_gradient": "pseudo-gradient",
    "poisoned_pseudo_gradient": "pseudo-gradient",
    "consistent_free_rider": "is not what its transfer carried",
    "forged_receipts": "log",
    "forged_receipts_pair": "log",
    "log_changed": "log does not match its commitment",
    "evidence_changed": "does not match the committed log",
    "evidence_withheld": "withheld",
}
"""What the verdict on each attacker says."""

UNJUDGED = ("commitment_withheld", "repeated_requests")
"""Attacks that leave nothing to judge: what they earn is all that there is to see."""


@pytest.fixture(scope="module")
def laboratory() -> Laboratory:
    return Laboratory(SEED, SETTING)


def assert_harmless(trial: Trial) -> None:
    assert trial.num_attacks > 0, "the attack never happened"
    assert trial.honest_checks > 0
    assert trial.honest_failed == 0
    assert trial.honest_punished == 0


def test_every_attack_has_a_name_of_its_own() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert FAILS_BY.keys() <= set(names)


@pytest.mark.parametrize("name", FAILS_BY)
def test_an_attacker_is_found_by_the_check_that_claims_it(laboratory: Laboratory, name: str) -> None:
    trial = laboratory.trial(attack_named(name))
    assert_harmless(trial)
    assert trial.detected_after_outer_steps is not None
    assert any(FAILS_BY[name] in reason for reason in trial.reasons), trial.reasons
    faults = Table((trial,), trial.honest_checks, trial.honest_failed).faults()
    assert not [fault for fault in faults if "after it was found" in fault]


def test_reducers_that_lie_are_outvoted(laboratory: Laboratory) -> None:
    trial = laboratory.trial(attack_named("lying_reducer"))
    assert_harmless(trial)
    assert trial.outvoted == 1


@pytest.mark.parametrize("name", UNJUDGED)
def test_what_cannot_be_judged_earns_no_more_than_honest_work(laboratory: Laboratory, name: str) -> None:
    trial = laboratory.trial(attack_named(name))
    assert_harmless(trial)
    assert trial.earnings_before is not None
    assert trial.earnings_before <= EARNINGS_BEFORE_MAX


def test_a_split_machine_is_found_by_nothing_and_the_table_says_what_it_earns(laboratory: Laboratory) -> None:
    trial = laboratory.trial(attack_named("sybil"))
    assert_harmless(trial)
    assert trial.detected_after_outer_steps is None
    assert trial.earnings_before is not None
    faults = Table((trial,), trial.honest_checks, trial.honest_failed).faults()
    assert bool(faults) == (trial.earnings_before > EARNINGS_BEFORE_MAX), "no attack is excused from the bars"


def test_idle_attackers_save_what_they_are_said_to_save(laboratory: Laboratory) -> None:
    assert laboratory.trial(attack_named("zero_activations")).effort == 0.0
    assert laboratory.trial(attack_named("skipped_backward")).effort == pytest.approx(0.5, abs=0.1)
    assert laboratory.trial(attack_named("noise_small")).effort == 1.0


def test_the_honest_swarm_fails_no_check_and_pays_everybody(laboratory: Laboratory) -> None:
    trial = laboratory.honest(laboratory.shape())
    assert trial.num_attacks == 0
    assert trial.honest_checks > 20
    assert trial.honest_failed == 0
    assert all(shares[-1] > 0.5 for shares in trial.luck.values())


def test_the_table_says_which_bars_do_not_hold_and_has_the_keys_that_others_rely_on(laboratory: Laboratory) -> None:
    trial = laboratory.trial(attack_named("forged_receipts"))
    table = Table((trial,), honest_checks=trial.honest_checks, honest_failed=0)
    assert table.faults() == ()
    document = table.as_json()
    assert set(document) == {"attacks", "honest_checks", "honest_failed"}
    attacks = document["attacks"]
    assert isinstance(attacks, list)
    assert set(attacks[0]) == {
        "name",
        "share",
        "num_seeds",
        "computed",
        "detected_after_outer_steps",
        "earnings_before",
        "earnings_before_error",
        "earnings_after",
        "honest_spread",
        "honest_punished",
        "loss_effect",
    }
    assert Table((), honest_checks=1, honest_failed=1).faults() == ("1 checks of honest miners failed",)
