"""The memory plan: what it bounds, for drawn runs, and what real engines hold under it."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.config import RunSpec
from orion.common.errors import ConfigError
from orion.common.ids import MicrobatchId
from orion.common.memory_plan import plan_stages
from orion.common.model.stage import Stage
from orion.common.protocol.codec import activation_spec, body_size, gradient_spec
from orion.common.train.anchor import initial_anchor
from orion.common.train.engine import StageEngine

RUNS = Path(__file__).parents[2] / "runs"


def spec_of(**changes: Any) -> RunSpec:
    tree: dict[str, Any] = {
        "run_id": "planned",
        "seed": 1,
        "num_stages": 3,
        "replicas": 1,
        "outer_steps": 2,
        "inner_steps": 4,
        "microbatches_per_step": 2,
        "model": {"preset": "nano", "vocab_size": 64},
        "data": {"sequence_length": 16, "sequences_per_microbatch": 2},
        "inner": {"schedule": {"shape": "constant", "num_warmup_steps": 0}},
        **changes,
    }
    return RunSpec.parse(tree, "test")


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.name)
@pytest.mark.parametrize("value_bytes", [2, 4])
def test_the_runs_that_ship_can_be_planned(path: Path, value_bytes: int) -> None:
    spec = RunSpec.load(path)
    plans = plan_stages(spec, value_bytes)
    assert [plan.num_params for plan in plans] == list(spec.stage_sizes)
    for plan in plans:
        assert plan.device.total_bytes == plan.device.kept_bytes + plan.device.working
        assert plan.device.graphs >= plan.graphs_max * plan.graph_bytes
        assert plan.device.graphs <= spec.flow.graph_memory_bytes + plan.credits * plan.activation_bytes * 2
    assert plans[0].gradient_bytes == 0 and plans[-1].activation_bytes == 0


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_bodies_fit_what_is_planned_for_them(wire_dtype: str) -> None:
    spec = spec_of(wire_dtype=wire_dtype)
    plan = plan_stages(spec, 4)[1]
    activation, gradient = body_size(activation_spec(spec, 1)), body_size(gradient_spec(spec, 0))
    assert activation <= plan.activation_bytes <= activation + 1024
    assert gradient <= plan.gradient_bytes <= gradient + 1024
    assert plan.cache_bytes_per_microbatch == 2 * (plan.activation_bytes + plan.gradient_bytes)


@given(
    credits=st.integers(1, 64),
    staleness_max=st.integers(0, 64),
    graph_memory_bytes=st.integers(0, 1 << 34),
    device_memory_bytes=st.integers(1, 1 << 34),
    value_bytes=st.sampled_from([2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_graphs_follow_the_budget(
    credits: int, staleness_max: int, graph_memory_bytes: int, device_memory_bytes: int, value_bytes: int
) -> None:
    flow = {"in_flight_max": credits, "staleness_max": staleness_max, "graph_memory_bytes": graph_memory_bytes}
    for plan in plan_stages(spec_of(flow=flow), value_bytes):
        assert 0 <= plan.graphs_max <= credits
        assert plan.graphs_max * plan.graph_bytes <= graph_memory_bytes
        assert 2 <= plan.versions_max <= max(2, 1 + min(credits, staleness_max))
        without = plan.device.total_bytes - plan.device.graphs
        if device_memory_bytes < without:
            with pytest.raises(ConfigError, match="more stages"):
                plan.graphs_within(device_memory_bytes)
        else:
            kept = plan.graphs_within(device_memory_bytes)
            assert kept <= plan.graphs_max
            assert without + kept * plan.graph_bytes <= device_memory_bytes
            assert plan.fits(device_memory_bytes) == (kept == plan.graphs_max)


class CountedEngine:
    """A real engine of the middle stage, whose saved tensors are counted."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.plan = plan_stages(spec, 4)[1]
        self.engine = StageEngine(
            Stage(spec.model, spec.layouts[1]),
            inner=spec.inner,
            outer=spec.outer,
            total_params=sum(spec.stage_sizes),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            wire_dtype=torch.float32,
            graphs_max=self.plan.graphs_max,
        )
        self.engine.load(initial_anchor(spec, 1))
        self.engine.begin_outer_step()
        self.shape = (spec.data.sequences_per_microbatch, spec.data.sequence_length, spec.model.boundary_width)
        self.live_bytes: dict[MicrobatchId, int] = {}

    def forward(self, number: MicrobatchId) -> None:
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        num_graphs = self.engine.num_graphs
        lasting = {tensor.untyped_storage().data_ptr() for tensor in self._lasting()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.engine.forward(number, torch.randn(self.shape), torch.zeros(self.shape[0], self.shape[1] + 1).long())
        if self.engine.num_graphs > num_graphs:
            sizes = [tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in lasting]
            self.live_bytes[number] = sum(sizes)
            assert self.live_bytes[number] > 0

    def backward(self, number: MicrobatchId) -> None:
        self.engine.backward(number, torch.randn(self.shape))
        self.live_bytes.pop(number, None)

    def check(self) -> None:
        plan = self.plan
        assert sum(self.live_bytes.values()) <= plan.device.graphs
        assert len(self.live_bytes) == self.engine.num_graphs <= plan.graphs_max
        assert self.engine.num_held <= plan.credits
        assert self.engine.num_versions <= plan.versions_max

    def _lasting(self) -> list[torch.Tensor]:
        return [*self.engine._version.params.values(), *self.engine._stage.buffers()]


@pytest.mark.parametrize("graphs", [0, 2, 5])
def test_a_real_engine_holds_no_more_than_is_planned(graphs: int) -> None:
    one_graph = plan_stages(spec_of(), 4)[1].graph_bytes
    flow = {"in_flight_max": 5, "staleness_max": 2, "graph_memory_bytes": graphs * one_graph}
    counted = CountedEngine(spec_of(flow=flow))
    rng = Random(graphs)
    held: dict[MicrobatchId, int] = {}
    num_steps = most_graphs = 0
    for number in range(60):
        for stale in [old for old, version in held.items() if num_steps - version >= 2 and rng.random() < 0.5]:
            counted.backward(stale)
            del held[stale]
        if len(held) == 5 or (held and rng.random() < 0.4):
            oldest = rng.choice(list(held))
            counted.backward(oldest)
            del held[oldest]
        counted.forward(MicrobatchId(number))
        held[MicrobatchId(number)] = num_steps
        counted.check()
        if counted.engine.num_accumulated >= 2:
            for stale in [old for old, version in held.items() if num_steps - version >= 2]:
                counted.engine.drop(stale)
                counted.live_bytes.pop(stale, None)
                del held[stale]
            counted.engine.inner_step(num_steps)
            num_steps += 1
        counted.check()
        most_graphs = max(most_graphs, counted.engine.num_graphs)
    assert num_steps > 10, "no versions were made"
    assert most_graphs == graphs
