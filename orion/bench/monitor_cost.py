"""What the boundary monitor costs for each tensor that a miner is sent: measured on this machine, with real tensors."""

from dataclasses import dataclass
from statistics import quantiles

import torch

from orion.common.clock import Clock
from orion.common.ids import Direction, Hotkey
from orion.miner.boundary_monitor import BoundaryMonitor

NUM_REPEATS = 200
SHAPES = (
    ((8, 128, 4), torch.float32),
    ((4, 2048, 64), torch.float32),
    ((8, 2048, 64), torch.bfloat16),
)
"""Narrow tensors [B, T, C]: of the local run, and of two megabytes in both types."""


@dataclass(frozen=True, slots=True)
class MonitorCost:
    """Milliseconds for each tensor of a size, on one thread."""

    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    median_ms: float
    ninth_decile_ms: float


def monitor_costs(clock: Clock) -> list[MonitorCost]:
    """Measures and averages each tensor as a miner does."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_cost(shape, dtype, clock) for shape, dtype in SHAPES]
    finally:
        torch.set_num_threads(num_threads)


def _cost(shape: tuple[int, ...], dtype: torch.dtype, clock: Clock) -> MonitorCost:
    monitor, generator = BoundaryMonitor(1), torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    peer = Hotkey("somebody")
    taken_ms = []
    for _ in range(NUM_REPEATS):
        began_s = clock.monotonic_s()
        monitor.took(peer, Direction.ACTIVATION, monitor.measure(tensor))
        taken_ms.append(1e3 * (clock.monotonic_s() - began_s))
    deciles = quantiles(taken_ms, n=10)
    size_bytes = tensor.numel() * tensor.element_size()
    return MonitorCost(shape, str(dtype).removeprefix("torch."), size_bytes, deciles[4], deciles[8])
