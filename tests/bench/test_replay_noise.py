"""What an honest replay may differ in, and what a cheat does, on the tiny model."""

import pytest
import torch

from orion.bench.replay_noise import Conditions, NoiseRow, Quantity, format_row, measure
from orion.simulator.scenarios import tiny_spec


@pytest.fixture(scope="module")
def rows() -> list[NoiseRow]:
    fp32, bf16 = Conditions(), Conditions(compute_dtype=torch.bfloat16)
    two_threads = Conditions(num_threads=2)
    recompute = Conditions(keeps_graphs=False)
    spec = tiny_spec(inner_steps=2, microbatches_per_step=2)
    return measure(spec, 1, {fp32: [fp32, recompute, bf16], two_threads: [two_threads], bf16: [bf16]})


def test_on_one_build_and_thread_count_a_replay_is_the_same_bit_for_bit(rows: list[NoiseRow]) -> None:
    same = [row for row in rows if row.cheat == "none" and row.miner == row.validator]
    assert {row.quantity for row in same} == set(Quantity)
    assert len({row.miner for row in same}) == 3, "one and two threads, and bf16"
    for row in same:
        assert row.bit_equal_share == 1.0, format_row(row)


def test_whether_a_graph_was_kept_or_computed_again_changes_no_bit(rows: list[NoiseRow]) -> None:
    recomputed = [row for row in rows if "recompute" in row.validator]
    assert len(recomputed) == len(Quantity)
    assert all(row.bit_equal_share == 1.0 for row in recomputed)


def test_every_cheat_leaves_a_trace(rows: list[NoiseRow]) -> None:
    cheats = {row.cheat for row in rows} - {"none"}
    assert len(cheats) == 6
    for cheat in cheats:
        assert any(row.bit_equal_share < 1.0 for row in rows if row.cheat == cheat), cheat


def test_every_row_can_be_read(rows: list[NoiseRow]) -> None:
    for row in rows:
        assert row.num_tensors > 0
        assert row.cosine_least <= row.cosine_median <= row.cosine_most
        assert row.norm_ratio_least <= row.norm_ratio_median
        assert row.quantity in format_row(row)
