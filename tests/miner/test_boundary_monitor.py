"""The boundary monitor: what it tells of senders that are honest, loud, noisy or repeat themselves, and its bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miner_kit import hotkey_of, make_spec
from torch import Tensor

from orion.common.ids import DataId, Digest, Direction, Hotkey, MicrobatchId, Phase
from orion.common.protocol.fields import BOUNDARY_PEERS_MAX
from orion.common.protocol.messages import BoundaryReport, PeerStatistics, RefusalCode, Transfer
from orion.miner.boundary_monitor import REPORT_TENSORS, SKETCH_ROWS_MAX, SKETCH_VALUES, BoundaryMonitor, sender_of

PEER, OTHER = hotkey_of(0, 0), hotkey_of(0, 1)
SHAPE = (2, 16, 96)
COMMON = torch.randn(SHAPE[-1], generator=torch.Generator().manual_seed(5))


def honest(seed: int, noise: float = 1.0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Values around a common direction of the channels, as activations are."""
    return COMMON + noise * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(tensors: list[Tensor], seed: int = 1) -> PeerStatistics:
    monitor = BoundaryMonitor(seed)
    for tensor in tensors:
        monitor.took(PEER, Direction.ACTIVATION, monitor.measure(tensor))
    report = monitor.due_report(0, Phase.UPLOAD)
    assert report is not None
    (seen,) = report.peers
    return seen


def test_an_honest_sender_looks_like_itself() -> None:
    seen = told([honest(seed) for seed in range(30)])
    assert seen.num_tensors == 30
    assert seen.log_rms == pytest.approx(0.5 * math.log(1 + float(COMMON.square().mean())), abs=0.03)
    # cos = |common|² ÷ (|common|² + noise²), about a half.
    assert seen.cosine_previous == pytest.approx(0.5, abs=0.1)
    assert seen.cosine_mean > seen.cosine_previous
    assert seen.repeated_share == 0.0


def test_noise_scale_sign_and_repetition_show() -> None:
    usual = told([honest(seed) for seed in range(30)])
    random = told([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(30)])
    assert random.cosine_mean < usual.cosine_mean - 0.3
    loud = told([3.0 * honest(seed) for seed in range(30)])
    assert loud.log_rms - usual.log_rms == pytest.approx(math.log(3.0), abs=1e-3)
    assert loud.cosine_mean == pytest.approx(usual.cosine_mean, abs=1e-3)
    flipped = told([honest(seed) * (-1) ** seed for seed in range(30)])
    assert flipped.cosine_previous < -0.3
    same = told([honest(0)] * 10)
    assert same.repeated_share == pytest.approx(0.9)
    assert same.cosine_previous == pytest.approx(1.0)
    turns = told([honest(seed % 3) for seed in range(30)])
    assert turns.repeated_share == pytest.approx(0.9)


def test_old_tensors_fade() -> None:
    seen = told([honest(seed) for seed in range(60)] + [10.0 * honest(seed) for seed in range(400)])
    assert seen.log_rms == pytest.approx(told([10.0 * honest(seed) for seed in range(60)]).log_rms, abs=0.05)


def test_loudness_is_compared_with_what_others_sent_at_that_time() -> None:
    monitor = BoundaryMonitor(1)
    rare = [0, 1, 2, 3]
    for number in range(60):
        # Everybody grows louder by the same; OTHER is always a tenth louder, and PEER only sends at the beginning.
        scale = math.exp(number / 20)
        if number in rare:
            monitor.took(PEER, Direction.ACTIVATION, monitor.measure(scale * honest(number)))
        monitor.took(hotkey_of(0, 2), Direction.ACTIVATION, monitor.measure(scale * honest(100 + number)))
        monitor.took(OTHER, Direction.ACTIVATION, monitor.measure(1.1 * scale * honest(200 + number)))
    report = monitor.due_report(0, Phase.UPLOAD)
    assert report is not None
    seen = {peer.peer: peer for peer in report.peers}
    usual = seen[hotkey_of(0, 2)]
    assert seen[OTHER].log_rms_excess - usual.log_rms_excess == pytest.approx(math.log(1.1), abs=0.06)
    assert usual.log_rms - seen[PEER].log_rms > 1.0
    # The level lags a little behind what grows, and lagged less at the beginning.
    assert abs(seen[PEER].log_rms_excess - usual.log_rms_excess) < 0.5


def test_a_deafening_sender_does_not_make_the_others_quiet() -> None:
    monitor = BoundaryMonitor(1)
    for number in range(60):
        monitor.took(PEER, Direction.ACTIVATION, monitor.measure(1e20 * honest(number)))
        monitor.took(OTHER, Direction.ACTIVATION, monitor.measure(honest(100 + number)))
        monitor.took(hotkey_of(0, 2), Direction.ACTIVATION, monitor.measure(honest(200 + number)))
    report = monitor.due_report(0, Phase.UPLOAD)
    assert report is not None
    excess = {peer.peer: peer.log_rms_excess for peer in report.peers}
    assert excess[PEER] > 40.0
    assert abs(excess[OTHER] - excess[hotkey_of(0, 2)]) < 0.2


def test_a_sender_cannot_aim_at_the_sketch_and_receivers_agree_about_it() -> None:
    tensors = [honest(seed) for seed in range(40)]
    cosines = [told(tensors, seed).cosine_previous for seed in range(6)]
    assert len(set(cosines)) == 6
    assert max(cosines) - min(cosines) < 0.1


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 3e38]),
)
def test_every_finite_tensor_gives_finite_figures(shape: list[int], dtype: torch.dtype, scale: float) -> None:
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    seen = told([tensor, tensor, -tensor])
    assert seen.num_tensors == 3
    assert -100 <= seen.log_rms <= 100
    assert -1 <= seen.cosine_mean <= 1


def test_large_tensors_are_compared_by_a_part_of_them() -> None:
    num_values = 3 * SKETCH_ROWS_MAX * SKETCH_VALUES + 17
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(2))
    seen = told([values, values])
    assert seen.repeated_share == 0.5
    assert seen.log_rms == pytest.approx(0.0, abs=0.01)


def test_refusals_count_when_they_are_the_sender_s_doing() -> None:
    monitor = BoundaryMonitor(1)
    for code in RefusalCode:
        monitor.refused(PEER, Direction.GRADIENT, code)
    report = monitor.due_report(3, Phase.MERGE)
    assert report is not None
    assert [(seen.num_tensors, seen.num_refused) for seen in report.peers] == [(0, 3)]
    assert report.outer_step == 3


def test_a_report_is_due_after_training_or_when_there_is_much_news_until_it_was_heard() -> None:
    monitor = BoundaryMonitor(1)
    assert monitor.due_report(0, Phase.UPLOAD) is None
    summary = monitor.measure(honest(0))
    for _ in range(REPORT_TENSORS - 1):
        monitor.took(PEER, Direction.ACTIVATION, summary)
    assert monitor.due_report(0, Phase.TRAIN) is None
    assert monitor.due_report(0, Phase.UPLOAD) == monitor.due_report(0, Phase.UPLOAD)
    monitor.took(OTHER, Direction.ACTIVATION, summary)
    report = monitor.due_report(0, Phase.TRAIN)
    assert report is not None
    assert {seen.peer for seen in report.peers} == {PEER, OTHER}
    monitor.reported()
    assert monitor.due_report(0, Phase.UPLOAD) is None
    monitor.took(PEER, Direction.GRADIENT, summary)
    again = monitor.due_report(1, Phase.UPLOAD)
    assert isinstance(again, BoundaryReport)
    assert len(again.peers) == 3


def test_neighbours_are_bounded_and_the_longest_silent_are_forgotten() -> None:
    monitor = BoundaryMonitor(1)
    summary = monitor.measure(honest(0))
    crowd = [Hotkey(f"5{place:03x}".replace("0", "z").ljust(48, "y")) for place in range(BOUNDARY_PEERS_MAX + 10)]
    for peer in crowd:
        monitor.took(peer, Direction.ACTIVATION, summary)
        monitor.took(crowd[0], Direction.ACTIVATION, summary)
    report = monitor.due_report(0, Phase.UPLOAD)
    assert report is not None
    assert len(report.peers) == BOUNDARY_PEERS_MAX
    names = [seen.peer for seen in report.peers]
    assert crowd[0] in names
    assert crowd[1] not in names
    assert len(report.model_dump_json()) < 64 * 1024


def test_the_sender_is_the_path_s() -> None:
    spec = make_spec()
    path = tuple(hotkey_of(stage, 0) for stage in range(spec.num_stages))
    fields: dict[str, object] = {
        "microbatch_id": MicrobatchId(1),
        "data_id": DataId(1),
        "outer_step": 0,
        "to_stage": 1,
        "deadline_s": 1.0,
        "digest": Digest("a" * 64),
        "size_bytes": 1,
    }
    forward = Transfer.model_validate({**fields, "direction": Direction.ACTIVATION, "path": path[:1]})
    back = Transfer.model_validate({**fields, "direction": Direction.GRADIENT, "path": path})
    assert sender_of(forward) == path[0]
    assert sender_of(back) == path[2]
