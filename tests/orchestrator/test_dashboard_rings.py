"""Histories stay small however long a run is, and stay true."""

import random
from itertools import pairwise

import pytest

from orion.orchestrator.dashboard.peaks import peak_flops_per_s
from orion.orchestrator.dashboard.rings import LossCurve, Sample, SampleRing


def sample(time_s: float) -> Sample:
    return Sample(time_s=time_s, tokens=int(10 * time_s), applied=int(time_s), busy=0.5, num_active=2)


def test_a_ring_covers_the_whole_run_in_a_bounded_number_of_samples() -> None:
    ring = SampleRing(samples_max=10)
    for second in range(1000):
        if ring.is_due(float(second)):
            ring.add(sample(float(second)))
        assert len(ring.samples) <= 10
    assert ring.samples[0].time_s == 0.0
    assert ring.samples[-1].time_s > 1000 - 2 * ring.interval_s
    times = [each.time_s for each in ring.samples]
    assert {later - former for former, later in pairwise(times)} == {ring.interval_s}


@pytest.mark.parametrize("num_points", [1, 7, 16, 17, 1000])
def test_a_curve_keeps_the_mean_and_the_order_of_all_losses(num_points: int) -> None:
    curve = LossCurve(inner_steps=4, usual_share=20, bins_max=16)
    rng = random.Random(num_points)
    losses = [rng.random() for _ in range(num_points)]
    steps = [number // 50 for number in range(num_points)]
    for start in range(0, num_points, 13):  # as they come in
        chosen = slice(start, start + 13)
        curve.add(steps[chosen], losses[chosen], [float(number) for number in range(num_points)][chosen])
    assert len(curve.bins) <= 16 and curve.num_points == num_points
    assert sum(each.num for each in curve.bins) == num_points
    assert all(each.num == curve.bin_size for each in curve.bins[:-1])
    assert sum(each.total for each in curve.bins) == pytest.approx(sum(losses))
    assert [each.step for each in curve.bins] == sorted(each.step for each in curve.bins)
    last = losses[-curve.bins[-1].num :]
    mean = sum(last) / len(last)
    assert curve.bins[-1].mean == pytest.approx(mean)
    variance = sum((loss - mean) ** 2 for loss in last) / len(last)
    assert curve.bins[-1].deviation == pytest.approx(variance**0.5, abs=1e-6)


def test_inner_steps_follow_from_how_far_the_outer_step_has_got() -> None:
    curve = LossCurve(inner_steps=4, usual_share=8)
    curve.add([0] * 8 + [1] * 2, [1.0] * 10, [0.0] * 10)
    assert [each.step for each in curve.bins[:8]] == [0.5 * number for number in range(1, 9)]
    assert [each.step for each in curve.bins[8:]] == [4.5, 5.0]


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_known_devices_have_a_peak(device: str, tflops: float) -> None:
    assert peak_flops_per_s(device) == tflops * 1e12


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "", "NVIDIA A1000", "H1000"])
def test_other_devices_have_none(device: str) -> None:
    assert peak_flops_per_s(device) is None
