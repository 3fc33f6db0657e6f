"""Scenarios with a name: what the tests and the command line simulate. Only data.

They train a real model on made-up text, small enough that an outer step takes a fraction of a second of computing.
"""

from collections.abc import Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any, Literal

from orion.common.config import FlowLimits, RunSpec, TimeLimits, ValidationRules
from orion.common.model.config import BoundaryConfig, ModelConfig
from orion.common.train.compress import CodecName
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.data_config import DataConfig
from orion.common.train.schedule import InnerSchedule
from orion.simulator.faults import Fault, Shape, draw_schedule
from orion.simulator.swarm import MakeMiner, Scenario

_VIRTUAL_S_MAX = 600.0


def tiny_model() -> ModelConfig:
    """Three blocks of width 16: about a millisecond for a forward or a backward of a stage."""
    return ModelConfig(
        name="tiny",
        vocab_size=64,
        width=16,
        num_blocks=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_width=32,
        context_length=16,
        boundary=BoundaryConfig(kind="anchored", ratio=2),
    )


def tiny_spec(
    *,
    num_stages: int = 3,
    replicas: int = 2,
    outer_steps: int = 3,
    inner_steps: int = 2,
    microbatches_per_step: int = 2,
    checks_per_outer_step: int = 1,
    whole_share: float = 0.5,
    seed: int = 1,
    sync: Literal["blocking", "overlapped"] = "blocking",
    codec: CodecName = "none",
    codec_boundaries: Literal["none", "bf16"] | None = None,
) -> RunSpec:
    """A run of the tiny model, with time limits that fit its devices (tenths of a second for a microbatch)."""
    return RunSpec(
        run_id="simulated",
        seed=seed,
        model=tiny_model(),
        data=DataConfig(sequence_length=8, sequences_per_microbatch=2),
        num_stages=num_stages,
        replicas=replicas,
        outer_steps=outer_steps,
        inner_steps=inner_steps,
        microbatches_per_step=microbatches_per_step,
        sync=sync,
        codec=codec,
        codec_boundaries=codec_boundaries,
        num_partitions=3,
        inner=InnerConfig(
            optimizer="adamw",
            lr_matrix=1e-2,
            lr_other=1e-2,
            schedule=InnerSchedule(shape="constant", num_warmup_steps=2),
        ),
        outer=OuterConfig(lr=0.9, momentum=0.5, momentum_start=0.5),
        time_limits=TimeLimits(train_s=40.0, transfer_grace_s=6.0, microbatch_s=15.0, member_s=6.0),
        flow=FlowLimits(in_flight_max=4),
        validation=ValidationRules(
            checks_per_outer_step=checks_per_outer_step, replay_ops_max=6, commit_s=0.5, whole_share=whole_share
        ),
    )


def calm(
    *,
    virtual_s_max: float = _VIRTUAL_S_MAX,
    num_spares: int = 0,
    faults: Sequence[Fault] = (),
    cheats: Mapping[int, MakeMiner] = MappingProxyType({}),
    **fields: Any,
) -> Scenario:
    """Nothing goes wrong beyond what is asked for. `fields` are those of `tiny_spec`."""
    return Scenario(
        name="calm",
        spec=tiny_spec(**fields),
        virtual_s_max=virtual_s_max,
        num_spares=num_spares,
        faults=tuple(faults),
        cheats=cheats,
    )


def stormy(seed: int, **fields: Any) -> Scenario:
    """One to four faults, drawn with the seed. `fields` are those of `tiny_spec`."""
    spec = tiny_spec(**fields)
    shape = Shape(spec.num_stages, spec.replicas, spec.outer_steps)
    faults = draw_schedule(Random(f"schedule {seed}"), shape, num_faults=1 + seed % 4)
    return Scenario(name="stormy", spec=spec, virtual_s_max=_VIRTUAL_S_MAX, faults=faults)
