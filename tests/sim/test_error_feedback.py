"""Swarms that send 1.6 % of their pseudo-gradients: what is not sent is added later, and validators see that it is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orion.common.ids import Phase
from orion.common.model.params import boundary_map_ranges
from orion.common.protocol.codec import decode, error_spec
from orion.miner.worker import DeviceWorker
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.miner_host import HOST_DEVICE, MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Scenario, Swarm

SEED = 1
LIAR = 2


def sparse(**fields: Any) -> Scenario:
    return calm(codec="topk", checks_per_outer_step=6, whole_share=1.0, outer_steps=3, **fields)


def error_of(swarm: Swarm, miner: int, outer_step: int) -> Tensor:
    spec = swarm.scenario.spec
    body = swarm.miners[miner].evidence.error(outer_step)
    assert body is not None
    expected = error_spec(spec.stage_sizes[miner // spec.replicas])
    return decode(bytearray(body), expected, len(body))["error"]


@pytest.mark.parametrize("codec_boundaries", [None, "bf16"])
@pytest.mark.parametrize("sync", ["blocking", "overlapped"])
def test_what_was_not_sent_is_kept_and_every_upload_replays(sync: str, codec_boundaries: str | None) -> None:
    # That no honest miner is found guilty is an invariant.
    swarm = Swarm(sparse(sync=sync, codec_boundaries=codec_boundaries), SEED)
    status = watched(swarm, SEED).status
    assert status.num_checks > 12
    assert not any("failed a check" in notice for notice in status.notices)
    for miner in range(6):
        first_N, second_N = error_of(swarm, miner, 0), error_of(swarm, miner, 1)
        assert float(first_N.norm()) > 0
        spec = swarm.scenario.spec
        for start, end in boundary_map_ranges(spec.model, spec.layouts[miner // spec.replicas]):
            assert bool(first_N[start:end].any()) == (codec_boundaries is None)
        # Most of what was not sent at first is in what was not sent at second, a little decayed.
        assert float(torch.dot(first_N, second_N) / first_N.norm() ** 2) > 0.5


class _Forgets(DeviceWorker):
    """Adds nothing of what it has not sent: its uploads are easier to make, and its anchors worse."""

    def _error(self, outer_step: int, num_params: int) -> Tensor | None:
        return None


class _Liar(MinerHost):
    def make_worker(self) -> DeviceWorker:
        return _Forgets(
            self.world.spec,
            self.hotkey,
            cache=self.cache,
            evidence=self.evidence,
            device=HOST_DEVICE,
            compute_dtype=torch.float32,
            engine_type=self.make_engine,
        )


def test_who_adds_something_else_than_it_has_lost_is_found_out() -> None:
    swarm = Swarm(sparse(cheats={LIAR: _Liar}), SEED)
    status = watched(swarm, SEED).status
    failed = [notice for notice in status.notices if "failed a check" in notice]
    assert failed
    assert all(swarm.hotkeys[LIAR] in notice for notice in failed)


def test_an_error_state_survives_a_restart() -> None:
    restart = Fault(FaultKind.RESTART, 1, 1, Phase.TRAIN, after_s=0.6, duration_s=0.2, miner=2)
    swarm = Swarm(sparse(inner_steps=4, faults=[restart]), SEED)
    result = watched(swarm, SEED)
    assert all(record.has_fired for record in result.faults)
    assert result.status.num_verdicts_failed == 0
    first_N, second_N = error_of(swarm, 2, 0), error_of(swarm, 2, 1)
    assert float(torch.dot(first_N, second_N) / first_N.norm() ** 2) > 0.5
