"""Suspicion: the odd one among replicas stands out, one receiver's word is not enough, and CLASP's alarms count."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from working_miner import hotkey

from orion.common.ids import Direction, Hotkey
from orion.common.protocol.messages import BoundaryReport, PeerStatistics
from orion.common.protocol.records import BoundaryRecord
from orion.validator.clasp import MemberEffect
from orion.validator.suspicion import ODDNESS_MIN, SUSPICION_MAX, oddness, suspicions

REPLICAS = 4
STAGES = {hotkey(stage, replica): stage for stage in range(3) for replica in range(REPLICAS)}
MIDDLE = [name for name, stage in STAGES.items() if stage == 1]
LAST = [name for name, stage in STAGES.items() if stage == 2]
FIRST = [name for name, stage in STAGES.items() if stage == 0]
USUAL = {"log_rms": -0.5, "log_rms_excess": 0.0, "cosine_mean": 0.4, "cosine_previous": 0.3, "repeated_share": 0.0}


def statistics(peer: Hotkey, direction: Direction = Direction.ACTIVATION, **fields: float) -> PeerStatistics:
    counts = {"num_tensors": 100, "num_refused": 0}
    return PeerStatistics.model_validate({"peer": peer, "direction": direction, **counts, **USUAL, **fields})


def record(
    reporter: Hotkey,
    odd: Mapping[Hotkey, Mapping[str, float]],
    direction: Direction = Direction.ACTIVATION,
    senders: list[Hotkey] = MIDDLE,
) -> BoundaryRecord:
    peers = tuple(statistics(peer, direction, **odd.get(peer, {})) for peer in senders)
    report = BoundaryReport(outer_step=3, peers=peers)
    return BoundaryRecord(hotkey=reporter, stage_index=STAGES[reporter], report=report)


def effect(name: Hotkey, lower: float, confirmed: float = 1.0) -> MemberEffect:
    return MemberEffect(
        hotkey=name,
        stage_index=STAGES[name],
        num_pathways=100,
        effect=1.0,
        standard_error=0.1,
        lower=lower,
        upper=2.0,
        p_value=0.5,
        effect_confirmed=confirmed,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"log_rms_excess": 0.4},
        {"log_rms_excess": -0.4},
        {"cosine_mean": 0.0},
        {"cosine_previous": 1.0},
        {"repeated_share": 0.5},
        {"num_refused": 30},
    ],
    ids=["louder", "quieter", "another direction", "all alike", "repeats", "not finite"],
)
def test_the_odd_one_among_replicas_is_suspicious_and_nobody_else(fields: dict[str, float]) -> None:
    odd = MIDDLE[1]
    found = suspicions([], [record(reporter, {odd: fields}) for reporter in LAST], STAGES)
    assert set(found) == {odd}
    assert 1.0 <= found[odd] <= SUSPICION_MAX


def test_gradients_show_the_odd_one_too() -> None:
    odd = MIDDLE[2]
    records = [record(reporter, {odd: {"log_rms_excess": 3.0}}, Direction.GRADIENT) for reporter in FIRST]
    assert set(suspicions([], records, STAGES)) == {odd}


def test_what_all_replicas_share_is_not_odd() -> None:
    everybody = {name: {"log_rms_excess": 5.0, "cosine_mean": -1.0} for name in MIDDLE}
    records = [record(reporter, everybody) for reporter in LAST[:1]] + [record(reporter, {}) for reporter in LAST[1:]]
    assert suspicions([], records, STAGES) == {}


@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.floats(-100, 100),
    st.sampled_from(["log_rms_excess", "cosine_mean", "repeated_share"]),
)
def test_less_than_half_of_the_receivers_frame_nobody(
    num_reporters: int, num_liars: int, value: float, name: str
) -> None:
    lie = {MIDDLE[0]: {name: value if name == "log_rms_excess" else abs(value) / 100}}
    liars = min(num_liars, num_reporters // 2)
    records = [record(reporter, lie if place < liars else {}) for place, reporter in enumerate(LAST[:num_reporters])]
    assert suspicions([], records, STAGES) == {}


def test_a_single_receiver_is_not_believed() -> None:
    odd = {MIDDLE[0]: {"log_rms_excess": 9.0}}
    assert oddness([record(LAST[0], odd)], STAGES) == {}
    assert MIDDLE[0] in suspicions([], [record(reporter, odd) for reporter in LAST[:2]], STAGES)


def test_of_two_replicas_both_are_looked_at() -> None:
    pair = MIDDLE[:2]
    records = [record(reporter, {pair[0]: {"log_rms_excess": 1.0}}, senders=pair) for reporter in LAST]
    found = suspicions([], records, STAGES)
    assert found[pair[0]] == found[pair[1]] >= 1.0


def test_reports_from_or_about_elsewhere_count_for_nothing() -> None:
    odd = {MIDDLE[0]: {"log_rms_excess": 9.0}}
    moved = {**STAGES, **dict.fromkeys(LAST, 1)}
    assert suspicions([], [record(reporter, odd) for reporter in LAST], moved) == {}
    # Members of the same stage, or behind, never were sent its activations.
    assert suspicions([], [record(reporter, odd) for reporter in MIDDLE + FIRST], STAGES) == {}
    assert suspicions([], [record(reporter, odd, Direction.GRADIENT) for reporter in LAST], STAGES) == {}
    gone = {name: stage for name, stage in STAGES.items() if name != MIDDLE[0]}
    assert suspicions([], [record(reporter, odd) for reporter in LAST], gone) == {}


def test_few_tensors_say_little() -> None:
    def told(num_tensors: int) -> dict[Hotkey, float]:
        fields = {MIDDLE[0]: {"log_rms_excess": 0.2, "num_tensors": num_tensors}}
        return oddness([record(reporter, fields) for reporter in LAST], STAGES)

    assert told(1000)[MIDDLE[0]] >= ODDNESS_MIN > told(5)[MIDDLE[0]]
    assert MIDDLE[0] not in told(3)


def test_clasp_alarms_are_suspicions_and_the_larger_sign_counts() -> None:
    found = suspicions([effect(MIDDLE[0], 0.3), effect(MIDDLE[1], -0.1), effect(LAST[0], 0.3, 0.1)], [], STAGES)
    assert found == {MIDDLE[0]: pytest.approx(4.0)}
    glaring = [record(reporter, {MIDDLE[0]: {"log_rms_excess": 90.0}}) for reporter in LAST]
    assert suspicions([effect(MIDDLE[0], 0.3)], glaring, STAGES) == {MIDDLE[0]: SUSPICION_MAX}
