"""How much earlier suspicion has an attacker checked than turns alone would: whole simulated swarms, then many draws.

Each swarm runs with one attacker and the real signs; the suspicions of each round are read off the validator's notices.
Who is drawn is then tried many times over, once with these suspicions and once without, which costs nothing. The checks
of the simulated validator itself change nothing that is measured here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean

from orion.common.config import ValidationRules
from orion.common.ids import Hotkey
from orion.simulator.adversaries import passes
from orion.simulator.adversaries.adversary import Adversary, Plot
from orion.simulator.host import Host
from orion.simulator.scenarios import calm
from orion.simulator.swarm import Swarm
from orion.simulator.validator_host import ValidatorHost
from orion.validator.events import Notice
from orion.validator.sampling import draw_checks

NUM_STAGES = 3
REPLICAS = 4
OUTER_STEPS = 6
INNER_STEPS = 4
ATTACKER = 5
"""Replica 1 of the middle stage."""
NUM_DRAWS = 2_000
_ROUNDS_MAX = 100
RULES = ValidationRules()
"""Of the draws."""

ATTACKS: Mapping[str, type[Adversary]] = {
    "noise as loud as the activation": passes.LargeNoise,
    "noise just above tolerance": passes.SmallNoise,
    "random tensors": passes.RandomTensors,
    "zeros": passes.Zeros,
    "repeats its first answer": passes.FreeRider,
    "gradients with the sign flipped": passes.FlippedGradients,
    "made-up gradients": passes.NoBackward,
}

Suspicions = Mapping[int, Mapping[Hotkey, float]]
"""By outer step."""


@dataclass(frozen=True, slots=True)
class SuspicionRow:
    """What came of one attack over all seeds."""

    attack: str
    num_attacks: int
    suspected: float
    """Share of rounds in which the attacker was a suspect."""
    others_suspected: float
    """Share of rounds in which anybody else was."""
    first_check_rounds: float
    """Mean number of rounds until the attacker is checked for the first time, by one check a round."""
    first_check_rounds_by_turns: float
    """The same without suspicion."""
    recheck_chance: float
    """Chance in the round after the last one that the attacker is drawn, everybody having been checked once."""
    recheck_chance_by_turns: float


@dataclass(slots=True)
class _Ear:
    """Hears whom the validator suspects."""

    suspicions: dict[int, dict[Hotkey, float]] = field(default_factory=dict)

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        if not isinstance(host, ValidatorHost):
            return
        for effect in effects:
            if isinstance(effect, Notice) and effect.event == "suspects":
                outer_step, suspects = effect.fields["outer_step"], effect.fields["suspects"]
                assert isinstance(outer_step, int) and isinstance(suspects, dict)
                self.suspicions[outer_step] = suspects


def observed(kind: type[Adversary], seed: int, outer_steps: int = OUTER_STEPS) -> tuple[Suspicions, Swarm, Plot]:
    """Runs one swarm with an attacker of this kind."""
    plot, ear = Plot(), _Ear()
    scenario = calm(
        num_stages=NUM_STAGES,
        replicas=REPLICAS,
        outer_steps=outer_steps,
        inner_steps=INNER_STEPS,
        cheats={ATTACKER: partial(kind, plot=plot)},
    )
    swarm = Swarm(scenario, seed)
    swarm.world.observers.append(ear)
    swarm.start()
    assert swarm.run(), "the swarm did not finish"
    return ear.suspicions, swarm, plot


def first_check(
    miners: Sequence[Hotkey], attacker: Hotkey, suspicions: Suspicions, rng: random.Random, *, num_seen: int
) -> int:
    """Rounds until the attacker is drawn; after the observed rounds those of the last go on."""
    last_turn: dict[Hotkey, int] = {}
    for outer_step in range(_ROUNDS_MAX):
        now = suspicions.get(min(outer_step, num_seen - 1), {})
        drawn = draw_checks(set(miners), last_turn, outer_step, 1, rng, rules=RULES, suspicions=now)
        if any(draw.hotkey == attacker for draw in drawn):
            return outer_step + 1
        last_turn |= {draw.hotkey: outer_step for draw in drawn}
    return _ROUNDS_MAX


def suspicion_row(
    attack: str, seeds: Sequence[int], *, outer_steps: int = OUTER_STEPS, num_draws: int = NUM_DRAWS
) -> SuspicionRow:
    """Tries one attack in a swarm for each seed."""
    rng = random.Random(f"suspicion {attack}")
    runs = [observed(ATTACKS[attack], seed, outer_steps) for seed in seeds]
    rounds = [
        (swarm.hotkeys[ATTACKER], suspicions.get(outer_step, {}))
        for suspicions, swarm, _ in runs
        for outer_step in range(outer_steps)
    ]

    def mean_first(of: Callable[[Suspicions], Suspicions]) -> float:
        return fmean(
            first_check(swarm.hotkeys, swarm.hotkeys[ATTACKER], of(suspicions), rng, num_seen=outer_steps)
            for suspicions, swarm, _ in runs
            for _ in range(num_draws)
        )

    def recheck(of: Callable[[Suspicions], Suspicions]) -> float:
        checked = dict.fromkeys(runs[0][1].hotkeys, outer_steps - 1)
        return fmean(
            _draw_again(swarm, of(suspicions).get(outer_steps - 1, {}), checked, rng) == swarm.hotkeys[ATTACKER]
            for suspicions, swarm, _ in runs
            for _ in range(num_draws)
        )

    return SuspicionRow(
        attack=attack,
        num_attacks=sum(plot.attacks.total() for _, _, plot in runs),
        suspected=fmean(attacker in suspects for attacker, suspects in rounds),
        others_suspected=fmean(bool(set(suspects) - {attacker}) for attacker, suspects in rounds),
        first_check_rounds=mean_first(lambda suspicions: suspicions),
        first_check_rounds_by_turns=mean_first(lambda _: {}),
        recheck_chance=recheck(lambda suspicions: suspicions),
        recheck_chance_by_turns=recheck(lambda _: {}),
    )


def suspicion_report(rows: Sequence[SuspicionRow], num_seeds: int) -> dict[str, object]:
    """The study as one JSON object."""
    return {"num_seeds": num_seeds, "rows": [asdict(row) for row in rows]}


def format_row(row: SuspicionRow) -> str:
    """A row for people."""
    return (
        f"{row.attack}: suspected in {row.suspected:.0%} of rounds (others in {row.others_suspected:.0%}), first check "
        f"after {row.first_check_rounds:.1f} rounds instead of {row.first_check_rounds_by_turns:.1f}, then drawn with "
        f"a chance of {row.recheck_chance:.0%} instead of {row.recheck_chance_by_turns:.0%}"
    )


def _draw_again(
    swarm: Swarm, suspects: Mapping[Hotkey, float], checked: Mapping[Hotkey, int], rng: random.Random
) -> Hotkey:
    outer_step = 1 + max(checked.values())
    (drawn,) = draw_checks(set(swarm.hotkeys), checked, outer_step, 1, rng, rules=RULES, suspicions=suspects)
    return drawn.hotkey
