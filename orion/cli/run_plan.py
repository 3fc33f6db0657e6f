"""`orion plan`: what each stage of a run takes at most, for people and as JSON.

Owns how the plan is told, and the devices that it is held against; the figures are those of `orion.common.memory_plan`,
which miners hold themselves to.
"""

from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from orion.cli.compute_dtype import ComputeDtype
from orion.common.config import RunSpec
from orion.common.memory_plan import StagePlan, plan_stages
from orion.common.train.encoded_size import encoded_bytes

DEVICES_GB = {"24 GB": 24, "A100 40 GB": 40, "48 GB": 48, "A100 80 GB": 80, "H200 141 GB": 141}
"""Memory of common devices, in 1e9 bytes."""
_RUNTIME_BYTES = 1_500_000_000
"""What the driver, kernels and the allocator's gaps take of a GPU; seen with PyTorch on such devices."""


class StageNeeds(BaseModel):
    """One stage's part of the report."""

    model_config = ConfigDict(frozen=True)

    stage_index: int
    num_blocks: int
    parameters: int
    credits: int
    """Microbatches a miner holds, at most."""
    versions_max: int
    graphs_max: int
    """Microbatches whose graph is kept; for more, backward computes the forward again."""
    graph_bytes: int
    """Activations that a microbatch's graph keeps."""
    activation_bytes: int
    """Body that goes on for each microbatch."""
    gradient_bytes: int
    """Body that goes back for each microbatch."""
    device_bytes: dict[str, int]
    device_total_bytes: int
    host_bytes: dict[str, int]
    host_total_bytes: int
    microbatch_s: float
    """Forward and backward at the given rate, and once more the forward where no graph is kept."""
    bandwidth_mbit_per_s: float
    """Each way, so that tensors move as fast as they are computed."""
    fits: dict[str, bool]
    """By device; the driver's own needs included."""


class RunPlan(BaseModel):
    """What `orion plan --json` prints."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    parameters: int
    compute_dtype: str
    flops_per_s: float
    tokens_per_microbatch: int
    stages: tuple[StageNeeds, ...]
    pseudo_gradient_bytes: int
    """Of the largest stage, as uploaded each outer step."""


def plan_run(run_file: Path, dtype: ComputeDtype, *, flops_per_s: float, evidence_bytes_max: int) -> RunPlan:
    """The plan of a run file. Raises ConfigError."""
    spec = RunSpec.load(run_file)
    plans = plan_stages(spec, dtype.value_bytes, evidence_bytes_max)
    return RunPlan(
        run_id=spec.run_id,
        parameters=sum(plan.num_params for plan in plans),
        compute_dtype=dtype.value,
        flops_per_s=flops_per_s,
        tokens_per_microbatch=spec.tokens_per_microbatch,
        stages=tuple(_needs(plan, flops_per_s) for plan in plans),
        pseudo_gradient_bytes=max(
            encoded_bytes(spec, layout, plan.num_params) for layout, plan in zip(spec.layouts, plans, strict=True)
        ),
    )


def _needs(plan: StagePlan, flops_per_s: float) -> StageNeeds:
    recomputes = plan.graphs_max < plan.credits and plan.activation_bytes > 0
    microbatch_s = plan.flops / flops_per_s * (4 / 3 if recomputes else 1)
    return StageNeeds(
        stage_index=plan.stage_index,
        num_blocks=plan.num_blocks,
        parameters=plan.num_params,
        credits=plan.credits,
        versions_max=plan.versions_max,
        graphs_max=plan.graphs_max,
        graph_bytes=plan.graph_bytes,
        activation_bytes=plan.activation_bytes,
        gradient_bytes=plan.gradient_bytes,
        device_bytes=asdict(plan.device),
        device_total_bytes=plan.device.total_bytes,
        host_bytes=asdict(plan.host),
        host_total_bytes=plan.host.total_bytes,
        microbatch_s=microbatch_s,
        bandwidth_mbit_per_s=plan.bandwidth_bits_per_s(microbatch_s) / 1e6,
        fits={name: plan.fits(size_gb * 10**9 - _RUNTIME_BYTES) for name, size_gb in DEVICES_GB.items()},
    )


def print_plan(console: Console, plan: RunPlan) -> None:
    """For people: GB are 1e9 bytes, MB 1e6."""
    console.print(
        f"{plan.run_id}: {plan.parameters / 1e9:.3f} billion parameters, {plan.tokens_per_microbatch} tokens a "
        f"microbatch, {plan.compute_dtype}, {plan.flops_per_s / 1e12:g} TFLOP/s a device",
        highlight=False,
    )
    console.print(_work_table(plan))
    console.print(_memory_table("device memory, GB", [stage.device_bytes for stage in plan.stages]))
    console.print(_memory_table("host memory, GB", [stage.host_bytes for stage in plan.stages]))
    for name in DEVICES_GB:
        misfits = [stage.stage_index for stage in plan.stages if not stage.fits[name]]
        verdict = "every stage fits" if not misfits else f"too small for stages {', '.join(map(str, misfits))}"
        console.print(f"{name}: {verdict}", highlight=False)


def _work_table(plan: RunPlan) -> Table:
    table = Table(title="stages")
    for name in (
        "stage",
        "blocks",
        "parameters, M",
        "credits",
        "graph, MB",
        "graphs kept",
        "versions",
        "sent on, MB",
        "sent back, MB",
        "microbatch, s",
        "Mbit/s each way",
    ):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            str(stage.stage_index),
            str(stage.num_blocks),
            f"{stage.parameters / 1e6:.2f}",
            str(stage.credits),
            f"{stage.graph_bytes / 1e6:.1f}",
            str(stage.graphs_max),
            str(stage.versions_max),
            f"{stage.activation_bytes / 1e6:.3f}",
            f"{stage.gradient_bytes / 1e6:.3f}",
            f"{stage.microbatch_s:.3g}",
            f"{stage.bandwidth_mbit_per_s:.3g}",
        )
    return table


def _memory_table(title: str, stages: list[dict[str, int]]) -> Table:
    table = Table(title=title)
    table.add_column("stage", justify="right")
    for kind in stages[0]:
        table.add_column(kind.replace("_", " "), justify="right")
    table.add_column("total", justify="right")
    for index, sizes in enumerate(stages):
        cells = [f"{size / 1e9:.3f}" for size in (*sizes.values(), sum(sizes.values()))]
        table.add_row(str(index), *cells)
    return table
