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
    assert "loss 3.0400" in study(loss=3.04).faults()[0]
    assert "not 15 to 20 %" in study(merging_share=0.3).faults()[0]
    report = study().as_json()
    assert report["modes"] == {
        "blocking": {"idle_share": 0.2, "loss": 3.0, "tokens_per_s": pytest.approx(83.0)},
        "overlapped": {"idle_share": 0.01, "loss": 3.0, "tokens_per_s": 100.0},
    }


def test_overlapped_devices_idle_less_than_blocking_ones() -> None:
    workload = replace(Workload.quick(), outer_steps=2, inner_steps=3, microbatches_per_step=2, up_bytes_per_s=1e6)
    modes: tuple[ModeName, ModeName] = ("blocking", "overlapped")
    blocking, overlapped = (run_mode(workload, mode) for mode in modes)
    assert 0.0 < overlapped.idle_share < blocking.idle_share < 1.0
    assert overlapped.tokens_per_s > blocking.tokens_per_s
    assert 1.0 < overlapped.loss < 10.0
