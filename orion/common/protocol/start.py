"""The checkpoint that a run goes on from, as the run's specification pins it. Pure.

A run that goes on is a run of its own: other miners, another ledger, another digest. All that it takes over is in its
specification, by digest, so nobody has to be believed about it.
"""

from orion.common.config import RunSpec, RunStart, StageStart
from orion.common.errors import ConfigError
from orion.common.ids import DataId
from orion.common.protocol.keys import start_key
from orion.common.protocol.messages import CheckpointRef, ObjectRef, RunCheckpoint

_SAME = ("model", "num_stages", "split", "seed", "data", "data_digest")
"""What a run must share with the one that it goes on from: whose parameters these are, and which data was used."""
_SHOWN_CHARS_MAX = 60


def start_checkpoint(start: RunStart, stage_index: int) -> CheckpointRef:
    """A stage's checkpoint at the run's beginning."""
    stage = start.stages[stage_index]
    key = start_key(start.outer_step, stage_index)
    return CheckpointRef(
        stage_index=stage_index,
        outer_step=start.outer_step,
        object=ObjectRef(key=key, digest=stage.object_digest, size_bytes=stage.size_bytes),
        state_digest=stage.state_digest,
    )


def whole_start(start: RunStart) -> RunCheckpoint:
    """The checkpoint of all stages at the run's beginning."""
    return RunCheckpoint(
        outer_step=start.outer_step,
        next_data_id=DataId(start.next_data_id),
        stages=tuple(start_checkpoint(start, stage_index) for stage_index in range(len(start.stages))),
    )


def continued(spec: RunSpec, left: RunSpec, checkpoint: RunCheckpoint) -> RunSpec:
    """The run that goes on from a checkpoint which the run `left` has left.

    `spec` has its data pinned. Replicas, optimizers and limits may be others. Raises ConfigError that says what
    differs and may not, or that nothing is left to train.
    """
    differing = _differences(spec, left)
    if differing:
        raise ConfigError(f"the checkpoint is of another run: {'; '.join(differing)}")
    start = RunStart(
        run_digest=left.digest,
        outer_step=checkpoint.outer_step,
        next_data_id=checkpoint.next_data_id,
        stages=tuple(
            StageStart(state_digest=ref.state_digest, object_digest=ref.object.digest, size_bytes=ref.object.size_bytes)
            for ref in checkpoint.stages
        ),
    )
    return RunSpec.parse({**spec.model_dump(mode="json"), "start": start.model_dump(mode="json")}, "continued run")


def _differences(spec: RunSpec, left: RunSpec) -> list[str]:
    mine, theirs = _flat(spec), _flat(left)
    return [
        f"{name} is {_shown(theirs.get(name))} there and {_shown(mine.get(name))} here"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def _flat(spec: RunSpec) -> dict[str, object]:
    """The values that must agree, by dotted name."""
    tree = spec.model_dump(mode="json", include=set(_SAME))
    found: dict[str, object] = {}
    waiting = list(tree.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            found[name] = value
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS_MAX else f"{text[:_SHOWN_CHARS_MAX]}…"
