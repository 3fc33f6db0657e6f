"""The overlap benchmark: that its modes run to the end on the same tokens, and that its bars can fail."""

from dataclasses import replace

import pytest

from orion.bench.overlap_study import ModeName, ModeResult, OverlapStudy, Workload, run_mode


def study(merging_share: float = 0.17, **of_overlapped: float) -> OverlapStudy:
    fields = {"idle_share": 0.01, "loss": 3.0, "tokens_per_s": 100.0} | of_overlapped
    blocking = ModeResult("blocking", idle_share=0.2, loss=3.0, tokens_per_s=100.0 * (1.0 - merging_share))
    return OverlapStudy(Workload.quick(), (blocking, ModeResult("overlapped", **fields)))


def test_bars_hold_or_are_named() -> None:
    assert study().faults() == []
    assert study(loss=3.02, idle_share=0.02).faults() == []
    assert "idle 2.1%" in study(idle_share=0.021).faults()[0]
    assert "loss 1.0133 times" in study(loss=3.04).faults()[0]
    assert "not 15 to 20 %" in study(merging_share=0.3).faults()[0]
    report = study().as_json()
    assert report["modes"] == {
        "blocking": {"idle_share": 0.2, "loss": 3.0, "tokens_per_s": pytest.approx(83.0)},
        "overlapped": {"idle_share": 0.01, "loss": 3.0, "tokens_per_s": 100.0},
    }


def test_losses_are_compared_within_a_seed_and_told_with_their_spread() -> None:
    modes: tuple[ModeName, ModeName] = ("blocking", "overlapped")
    losses = {1: (2.0, 2.02), 2: (4.0, 3.96), 3: (3.0, 3.06)}
    results = [
        ModeResult(mode, idle_share=0.01, loss=loss, tokens_per_s=speed, seed=seed)
        for seed, pair in losses.items()
        for mode, loss, speed in zip(modes, pair, (83.0, 100.0), strict=True)
    ]
    found = OverlapStudy(Workload.quick(), tuple(reversed(results)))
    assert found.loss_ratios("overlapped") == pytest.approx([1.01, 0.99, 1.02])
    assert found.of("blocking").loss == 3.0
    assert found.spread("blocking") == pytest.approx({"idle_share": 0.0, "loss": 1.0, "tokens_per_s": 0.0})
    assert found.faults() == [], "the mean of the ratios counts"
    assert found.as_json()["seeds"] == [1, 2, 3]


def test_overlapped_devices_idle_less_than_blocking_ones() -> None:
    workload = replace(Workload.quick(), outer_steps=2, inner_steps=3, microbatches_per_step=2, up_bytes_per_s=1e6)
    modes: tuple[ModeName, ModeName] = ("blocking", "overlapped")
    blocking, overlapped = (run_mode(workload, mode) for mode in modes)
    assert 0.0 < overlapped.idle_share < blocking.idle_share < 1.0
    assert overlapped.tokens_per_s > blocking.tokens_per_s
    assert 1.0 < overlapped.loss < 10.0
