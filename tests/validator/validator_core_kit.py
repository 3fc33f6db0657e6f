"""Validator rounds that tests begin with: three miners of three stages, the chain as they see it, and what came out."""

import random

from validator_world import World
from working_miner import WorkingMiner, hotkey, make_spec

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.validator.events import ChainView

ALL = 3
A, B, C = hotkey(0), hotkey(1), hotkey(2)
VIEW = ChainView(
    block=1000,
    block_s=12.0,
    uids={A: 1, B: 2, C: 3},
    owner_uid=0,
    has_permit=True,
    next_epoch_s=40.0,
    last_update_block=None,
    weights_rate_limit_blocks=100,
    weight_max=1.0,
)


def spec_with(**rules: object) -> RunSpec:
    return make_spec(validation={"checks_per_outer_step": ALL, "replay_ops_max": 12, **rules})


SPEC = spec_with()


def world_of(
    miners: list[WorkingMiner],
    spec: RunSpec = SPEC,
    view: ChainView | None = VIEW,
    rng: random.Random | None = None,
) -> World:
    by_name = {hotkey(miner.stage_index): miner for miner in miners}
    return World(spec, by_name, rng=rng if rng is not None else random.Random(0), view=view)


def failed(world: World) -> dict[Hotkey, str]:
    return {miner: verdict.reason for miner, verdict in world.verdicts.items() if not verdict.passed}


def events_of(world: World) -> list[str]:
    return [notice.event for notice in world.notices]
