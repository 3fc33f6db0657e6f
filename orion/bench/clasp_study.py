"""How well CLASP finds miners that raise their paths' losses: made-up pathways, no swarm.

The setting is that of the published toy study: 5 stages of 5 miners, random paths, losses normal around 4.5 with a
spread of 0.2, multiplied (so mean and spread alike) where a malicious miner is on the path. Deterministic.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from orion.common.ids import Hotkey
from orion.validator.clasp import Integers, PathwayTable, member_effects

NUM_STAGES = 5
REPLICAS = 5
LOSS_MEAN = 4.5
LOSS_SPREAD = 0.2
NUM_PATHWAYS = (50, 100, 200, 400, 800, 1600)
FACTORS = (1.0, 1.01, 1.02, 1.05, 1.1)


class Malicious(StrEnum):
    """Who raises losses."""

    ONE = "one"
    TWO_STAGES = "two in different stages"
    ONE_STAGE = "two in one stage"


MEMBERS = {Malicious.ONE: (7,), Malicious.TWO_STAGES: (7, 18), Malicious.ONE_STAGE: (7, 8)}
"""Places of the malicious; the member of place p is replica p mod 5 of stage p ÷ 5."""


@dataclass(frozen=True, slots=True)
class StudyRow:
    """What came of the trials of one setting."""

    malicious: Malicious
    num_pathways: int
    factor: float
    """By which a malicious miner multiplies its paths' losses; 1 = it does not."""
    num_trials: int
    found: float
    """Share of the malicious that raised the alarm; 0 where nobody does any harm."""
    false_alarms: float
    """Share of trials in which any honest miner raised it."""
    false_alarms_beside: float
    """Share of trials in which an honest miner of a malicious one's own stage did."""


def study_table(num_pathways: int, malicious: tuple[int, ...], factor: float, rng: np.random.Generator) -> PathwayTable:
    """One trial's pathways."""
    draws_NS = rng.integers(0, REPLICAS, size=(num_pathways, NUM_STAGES))
    paths_NS: Integers = draws_NS + REPLICAS * np.arange(NUM_STAGES)
    losses_N = rng.normal(LOSS_MEAN, LOSS_SPREAD, num_pathways)
    losses_N[np.isin(paths_NS, malicious).any(axis=1)] *= factor
    places = range(NUM_STAGES * REPLICAS)
    members = tuple((place // REPLICAS, Hotkey(f"miner {place}")) for place in places)
    return PathwayTable(members, paths_NS, losses_N, np.zeros(num_pathways, dtype=np.int64))


def study_row(malicious: Malicious, num_pathways: int, factor: float, num_trials: int, seed: int) -> StudyRow:
    """Runs the trials of one setting."""
    bad = {f"miner {place}" for place in MEMBERS[malicious]} if factor != 1.0 else set()
    beside = {f"miner {place + step}" for place in MEMBERS[malicious] for step in range(-4, 5)}
    beside = {name for name in beside if _stage(name) in {place // REPLICAS for place in MEMBERS[malicious]}} - bad
    num_found = num_false = num_beside = 0
    for trial in range(num_trials):
        rng = np.random.default_rng([seed, trial, num_pathways, round(1000 * factor)])
        table = study_table(num_pathways, MEMBERS[malicious], factor, rng)
        alarming = {effect.hotkey for effect in member_effects(table) if effect.is_alarming}
        num_found += len(alarming & bad)
        num_false += bool(alarming - bad)
        num_beside += bool(alarming & beside)
    return StudyRow(
        malicious=malicious,
        num_pathways=num_pathways,
        factor=factor,
        num_trials=num_trials,
        found=num_found / (num_trials * len(bad)) if bad else 0.0,
        false_alarms=num_false / num_trials,
        false_alarms_beside=num_beside / num_trials,
    )


def run_study(num_trials: int, seed: int) -> list[StudyRow]:
    """All settings; without harm only once, as it does not matter who would do it."""
    return [
        study_row(malicious, num_pathways, factor, num_trials, seed)
        for malicious in Malicious
        for factor in FACTORS
        for num_pathways in NUM_PATHWAYS
        if factor != 1.0 or malicious is Malicious.ONE
    ]


def study_report(rows: list[StudyRow], seed: int) -> dict[str, object]:
    """The study as one JSON object."""
    return {"seed": seed, "rows": [asdict(row) for row in rows]}


def format_row(row: StudyRow) -> str:
    """A row for people."""
    return (
        f"{row.malicious.value}, losses × {row.factor:g}, {row.num_pathways} pathways: found {row.found:.0%}, "
        f"false alarms in {row.false_alarms:.1%} of trials, beside the malicious in {row.false_alarms_beside:.1%}"
    )


def _stage(name: str) -> int:
    return int(name.removeprefix("miner ")) // REPLICAS
