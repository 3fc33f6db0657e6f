"""All attacks that are tried: what each does, where, and which check claims to find it. Only data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from orion.simulator.adversaries import answers, consistent, parameters, passes, records, reducers
from orion.simulator.adversaries.adversary import Adversary, Plot, SharedDeviceHost
from orion.simulator.swarm import MakeMiner

ATTACKED_SHARE = 0.3
"""Of a stage's replicas, where an attack is made by many."""


@dataclass(frozen=True, slots=True)
class Lineup:
    """The shape of the swarm that is attacked, and by how many of a stage's miners."""

    num_stages: int
    replicas: int
    num_attackers: int

    def of_stage(self, stage_index: int, num_miners: int | None = None) -> list[int]:
        """Indices of the stage's first miners, as many as attack."""
        first = stage_index * self.replicas
        return list(range(first, first + (self.num_attackers if num_miners is None else num_miners)))


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of attack."""

    name: str
    what: str
    found_by: str
    """The check that claims to find it; empty: none does, and what it earns is measured."""
    cast: Callable[[Lineup, Plot], Mapping[int, MakeMiner]]
    """Who attacks, by index of the miner."""
    is_one_machine: bool = False
    """The attackers are one machine under several hotkeys, which is paid for all of them."""
    inner_steps: int | None = None
    """Of a trial, where the usual number would be too few to show anything."""
    in_flight_max: int | None = None
    """Credits of a trial's miners, where the usual few would decide what comes of it."""


def num_attackers(replicas: int) -> int:
    """How many of a stage's replicas attack where it is made by many."""
    return max(2, math.floor(ATTACKED_SHARE * replicas + 0.5))


def _in_stage(
    kind: type[Adversary], stage_index: int, at_least: int = 1
) -> Callable[[Lineup, Plot], dict[int, MakeMiner]]:
    def cast(lineup: Lineup, plot: Plot) -> dict[int, MakeMiner]:
        miners = lineup.of_stage(stage_index, max(at_least, lineup.num_attackers))
        return {index: partial(kind, plot=plot) for index in miners}

    return cast


def _neighbours(lineup: Lineup, plot: Plot) -> dict[int, MakeMiner]:
    """Pairs: the same number in the first stage and in the next."""
    lower: dict[int, MakeMiner] = {i: partial(records.LowerAccomplice, plot=plot) for i in lineup.of_stage(0)}
    upper: dict[int, MakeMiner] = {i: partial(records.UpperAccomplice, plot=plot) for i in lineup.of_stage(1)}
    return lower | upper


LOG_REPLAY = "replay of a log's beginning"
WHOLE_REPLAY = "replay of a whole outer step"
LOG_CHECK = "comparison of log, evidence and commitment"
REDUCTION = "two reducers for each partition, and validators' reductions"
RECEIPTS = "receipts of both ends"
LOG_AGAINST_RECEIPTS = "comparison of a log with its miner's receipts"

MIDDLE = 1

ATTACKS: tuple[Attack, ...] = (
    Attack("noise_large", "noise as large as the activations", LOG_REPLAY, _in_stage(passes.LargeNoise, MIDDLE)),
    Attack("noise_small", "noise just above tolerance", LOG_REPLAY, _in_stage(passes.SmallNoise, MIDDLE)),
    Attack("zero_activations", "zeros, nothing computed", LOG_REPLAY, _in_stage(passes.Zeros, MIDDLE)),
    Attack("random_activations", "noise, nothing computed", LOG_REPLAY, _in_stage(passes.RandomTensors, MIDDLE)),
    Attack(
        "flipped_gradients",
        "input gradients with the sign flipped",
        LOG_REPLAY,
        _in_stage(passes.FlippedGradients, MIDDLE),
    ),
    Attack("free_rider", "repeats its first tensors", LOG_REPLAY, _in_stage(passes.FreeRider, MIDDLE)),
    Attack("skipped_backward", "makes up input gradients", LOG_REPLAY, _in_stage(passes.NoBackward, MIDDLE)),
    Attack(
        "late_cheat",
        "honest as far as a log's beginning is replayed, then repeats itself",
        WHOLE_REPLAY,
        _in_stage(passes.LateCheat, MIDDLE),
        inner_steps=4,
    ),
    Attack(
        "consistent_free_rider",
        "computes one microbatch and logs it for all",
        LOG_AGAINST_RECEIPTS,
        _in_stage(consistent.ConsistentFreeRider, MIDDLE),
        inner_steps=4,
    ),
    Attack(
        "lazy_first_stage",
        "no backward where nobody awaits a gradient",
        WHOLE_REPLAY,
        _in_stage(passes.LazyFirstStage, 0),
    ),
    Attack("stale_parameters", "never applies a merge", LOG_REPLAY, _in_stage(parameters.StaleParameters, MIDDLE)),
    Attack(
        "copied_pseudo_gradient",
        "uploads a replica's",
        WHOLE_REPLAY,
        _in_stage(parameters.CopiedPseudoGradient, MIDDLE),
    ),
    Attack(
        "scaled_pseudo_gradient",
        f"uploads {parameters.SCALE:g} times its own",
        WHOLE_REPLAY,
        _in_stage(parameters.ScaledPseudoGradient, MIDDLE),
    ),
    Attack(
        "poisoned_pseudo_gradient",
        f"uploads {parameters.POISON:g} times its own",
        WHOLE_REPLAY,
        _in_stage(parameters.PoisonedPseudoGradient, MIDDLE),
    ),
    Attack("lying_reducer", "flips the sign of means", REDUCTION, _in_stage(reducers.LyingReducer, MIDDLE)),
    Attack(
        "colluding_reducers", "two flip the sign of means alike", REDUCTION, _in_stage(reducers.LyingReducer, MIDDLE, 2)
    ),
    Attack("forged_receipts", "claims what it refused", RECEIPTS, _in_stage(records.ReceiptForger, MIDDLE)),
    Attack("forged_receipts_pair", "two neighbours confirm trips that never happened", LOG_CHECK, _neighbours),
    Attack(
        "repeated_requests", "one outer step's requests over and over", RECEIPTS, _in_stage(records.Repeater, MIDDLE)
    ),
    Attack(
        "commitment_withheld",
        "a free rider that commits to nothing",
        LOG_CHECK,
        _in_stage(answers.CommitmentWithheld, MIDDLE),
    ),
    Attack("log_changed", "another log than the committed one", LOG_CHECK, _in_stage(answers.LogChanged, MIDDLE)),
    Attack(
        "evidence_changed",
        "other tensors than the committed ones",
        LOG_CHECK,
        _in_stage(answers.EvidenceChanged, MIDDLE),
    ),
    Attack(
        "evidence_withheld",
        "a free rider that shows no tensors",
        LOG_CHECK,
        _in_stage(answers.EvidenceWithheld, MIDDLE),
    ),
    Attack("evader", "a free rider that goes away when it is challenged", "", _in_stage(answers.Evader, MIDDLE)),
    Attack(
        "sybil",
        "one machine under two hotkeys",
        "",
        _in_stage(SharedDeviceHost, MIDDLE, 2),
        is_one_machine=True,
        # Longer outer steps, and as many credits as a real run has: where four bound what a miner holds, a machine with
        # twice as many is seldom idle. (Still shorter than a real run's: devices idle at both ends of an outer step.)
        inner_steps=8,
        in_flight_max=24,
    ),
)


def attack_named(name: str) -> Attack:
    """The attack of that name. Raises KeyError."""
    return {attack.name: attack for attack in ATTACKS}[name]
