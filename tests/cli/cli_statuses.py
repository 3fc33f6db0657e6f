"""Run statuses and outcomes for the views' tests."""

from typing import Any

from orion.cli.outcome import SwarmOutcome
from orion.common.ids import Hotkey, MemberState, MicrobatchId, Phase
from orion.common.protocol.messages import (
    Heartbeat,
    StageState,
)
from orion.common.protocol.records import (
    LossPoint,
    MinerStatus,
    Repairs,
    RunStatus,
)

ALICE = Hotkey("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY")
BOB = Hotkey("5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty")


def stage_state(stage_index: int, phase: Phase = Phase.TRAIN, outer_step: int = 0) -> StageState:
    return StageState(
        stage_index=stage_index,
        phase=phase,
        outer_step=outer_step,
        deadline_s=100.0,
        checkpoint=None,
        checkpoint_by=None,
    )


def miner_status(hotkey: Hotkey, stage_index: int, state: MemberState = MemberState.ACTIVE) -> MinerStatus:
    beat = Heartbeat(
        outer_step=0,
        phase=Phase.TRAIN,
        ready_outer_step=0,
        inner_step=3,
        queued=1,
        in_flight=2,
        applied=7,
        tokens_per_s=1234.0,
        busy_share=0.75,
    )
    return MinerStatus(
        hotkey=hotkey,
        stage_index=stage_index,
        state=state,
        url="http://127.0.0.1:9000",
        heartbeat=beat,
        last_seen_s=50.0,
        num_microbatches=7,
    )


def run_status(**changes: Any) -> RunStatus:
    fields: dict[str, Any] = {
        "run_id": "local",
        "now_s": 1000.0,
        "started_s": 990.0,
        "finished": False,
        "outer_step": 1,
        "outer_steps": 4,
        "stages": (stage_state(0), stage_state(1)),
        "miners": (miner_status(ALICE, 0), miner_status(BOB, 1)),
        "microbatches_started": 30,
        "microbatches_applied": 25,
        "microbatches_cancelled": 2,
        "tokens": 25_600,
        "anchors_equal": True,
        "num_checks": 1,
        "num_verdicts_failed": 0,
        "recent_losses": losses(5.0, 4.0, 3.0),
        "notices": (),
    }
    return RunStatus.model_validate({**fields, **changes})


def losses(*values: float) -> tuple[LossPoint, ...]:
    return tuple(
        LossPoint(microbatch_id=MicrobatchId(index), outer_step=0, loss=value, time_s=990.0 + index)
        for index, value in enumerate(values)
    )


def outcome(**changes: Any) -> SwarmOutcome:
    fields: dict[str, Any] = {
        "run_id": "local",
        "tokens": 40_960,
        "tokens_per_s": 2000.0,
        "tokens_per_s_single_process": None,
        "loss_first": 7.6,
        "loss_last": 5.0,
        "heldout_loss": 5.1,
        "heldout_loss_untrained": 7.6,
        "heldout_loss_single_process": None,
        "outer_steps": 4,
        "anchors_equal": True,
        "microbatches_started": 42,
        "microbatches_applied": 40,
        "microbatches_cancelled": 2,
        "microbatches_repaired": Repairs(),
        "checks": 4,
        "verdicts_failed": 0,
        "scores": {"miner-0": 1e12},
        "chain_weights": {"miner-0": 1.0},
        "incentives": {"miner-0": 1.0},
        "checkpoint": "checkpoint",
        "plot": "loss.png",
        "seconds": 20.0,
        "notices": [],
        "sample": "In the beginning",
    }
    return SwarmOutcome.model_validate({**fields, **changes})
