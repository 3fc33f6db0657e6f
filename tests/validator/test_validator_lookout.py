"""Signs: read in pages, kept for a window, and turned into draws; without them a round goes on."""

import random

import numpy as np
import pytest
import torch
from validator_world import World
from working_miner import CPU, Tokens, WorkingMiner, hotkey, make_spec, trained

from orion.common.clock import SystemClock
from orion.common.ids import Hotkey, MicrobatchId, Subject
from orion.common.offload import in_place
from orion.common.protocol.messages import BoundaryReport, RefusalCode
from orion.common.protocol.records import Boundaries, BoundaryRecord, Pathway, Pathways
from orion.common.protocol.refusals import refused
from orion.validator.events import FetchCommitments, FetchSigns, OrchestratorFailed, SignsArrived
from orion.validator.hands import Hands
from orion.validator.lookout import OUTER_STEPS_KEPT, Lookout

REPLICAS = 4
BAD = hotkey(1, 2)
NAMES = [hotkey(stage, replica) for stage in range(3) for replica in range(REPLICAS)]
SPEC = make_spec(validation={"checks_per_outer_step": 1, "replay_ops_max": 2, "reductions_per_outer_step": 0})


def pathways(outer_step: int, num: int = 200, harm: float = 0.5) -> Pathways:
    """Random paths through three stages; BAD raises losses."""
    rng = np.random.default_rng(outer_step)
    found = []
    for number in range(num):
        path = tuple(int(rng.integers(REPLICAS)) + REPLICAS * stage for stage in range(3))
        loss = float(rng.normal(4.0, 0.2)) + harm * (NAMES.index(BAD) in path)
        found.append(Pathway(microbatch_id=MicrobatchId(number), loss=loss, path=path))
    return Pathways(outer_step=outer_step, miners=tuple(NAMES), pathways=tuple(found), total=num)


def arrive(lookout: Lookout, asked: FetchSigns, harm: float = 0.5) -> None:
    lookout.on_signs(SignsArrived(asked, tuple(pathways(step, harm=harm) for step in asked.outer_steps), ()))


def test_only_what_is_not_known_is_asked_for_and_old_signs_are_forgotten() -> None:
    lookout = Lookout()
    assert lookout.ask(1) == FetchSigns((0, 1))
    assert lookout.is_waiting
    arrive(lookout, FetchSigns((0, 1)))
    assert not lookout.is_waiting
    assert lookout.ask(3) == FetchSigns((2, 3))
    arrive(lookout, FetchSigns((2, 3)))
    assert sum(effect.num_pathways for effect in lookout.effects) == 4 * 200 * 3
    assert lookout.ask(100).outer_steps == tuple(range(101 - OUTER_STEPS_KEPT, 101))


def test_signs_become_suspicions_of_members_only_by_name() -> None:
    lookout = Lookout()
    arrive(lookout, lookout.ask(0))
    assert set(lookout.suspicions({})) == {BAD}
    arrive(lookout, lookout.ask(1), harm=0.0)
    assert set(lookout.suspicions({})) == {BAD}  # the first outer step still is in the window


def test_late_signs_and_failures_of_earlier_rounds_change_nothing() -> None:
    lookout = Lookout()
    early = lookout.ask(0)
    late = lookout.ask(2)
    arrive(lookout, early)
    lookout.on_failed(early)
    assert lookout.is_waiting
    lookout.on_failed(late)
    assert not lookout.is_waiting
    assert lookout.suspicions({}) == {}
    assert lookout.ask(2) == late


# --- reading pages ----------------------------------------------------------------------------------------------------


class PagedOrchestrator:
    """Serves small pages."""

    def __init__(self) -> None:
        self.records = [
            BoundaryRecord(hotkey=name, stage_index=0, report=BoundaryReport(outer_step=0, peers=())) for name in NAMES
        ]
        self.is_forbidden = False

    async def pathways(self, outer_step: int, offset: int) -> Pathways:
        whole = pathways(outer_step, num=70)
        return whole.model_copy(update={"pathways": whole.pathways[offset : offset + 30]})

    async def boundaries(self, after: Hotkey | None) -> Boundaries:
        if self.is_forbidden:
            raise refused(RefusalCode.FORBIDDEN, "not for you")
        left = [record for record in self.records if after is None or record.hotkey > after]
        return Boundaries(records=tuple(left[:5]))


def hands_of(orchestrator: PagedOrchestrator) -> Hands:
    nothing: object = None
    return Hands(
        SPEC,
        orchestrator,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        ledger=nothing,  # type: ignore[arg-type]
        objects=nothing,  # type: ignore[arg-type]
        tokens=Tokens(),
        device=CPU,
        compute_dtype=torch.float32,
        on_device=in_place,
        clock=SystemClock(),
        offload=in_place,
    )


async def test_all_pages_are_read() -> None:
    event = await hands_of(PagedOrchestrator()).carry_out(FetchSigns((0, 2)))
    assert isinstance(event, SignsArrived)
    assert [(page.outer_step, len(page.pathways)) for page in event.pathways] == [
        (step, num) for step in (0, 2) for num in (30, 30, 10)
    ]
    assert [record.hotkey for record in event.boundaries] == NAMES


async def test_a_refusal_is_a_failure_that_is_not_repeated() -> None:
    orchestrator = PagedOrchestrator()
    orchestrator.is_forbidden = True
    event = await hands_of(orchestrator).carry_out(FetchSigns(()))
    assert isinstance(event, OrchestratorFailed)
    assert event.effect == FetchSigns(())
    assert not event.retry


# --- the core ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest() -> list[WorkingMiner]:
    return trained(SPEC)


class SignlessWorld(World):
    """The orchestrator answers everything but questions for signs."""

    def _answer_of_orchestrator(self, effect: object) -> object:  # type: ignore[override]
        if isinstance(effect, FetchSigns):
            return OrchestratorFailed(effect, "planted", retry=False)
        return super()._answer_of_orchestrator(effect)  # type: ignore[arg-type]


def drawn(honest: list[WorkingMiner], seed: int, pages: tuple[Pathways, ...]) -> set[Hotkey]:
    miners = {hotkey(stage, replica): honest[stage] for stage in range(3) for replica in range(REPLICAS)}
    world = World(SPEC, miners, rng=random.Random(seed), pathways=pages)
    world.give_feed()
    told = [notice.fields["suspects"] for notice in world.notices if notice.event == "suspects"]
    assert told == ([{BAD: 10.0}] if pages else [])
    return {miner for miner, verdict in world.verdicts.items() if verdict.subject is not Subject.REDUCTION}


def test_a_suspect_is_drawn_first_and_passes_if_it_is_honest(honest: list[WorkingMiner]) -> None:
    signs = (pathways(0),)
    with_signs = [drawn(honest, seed, signs) for seed in range(40)]
    without = [drawn(honest, seed, ()) for seed in range(40)]
    assert all(len(miners) == 1 for miners in with_signs + without)
    assert sum(BAD in miners for miners in without) < 12
    assert sum(BAD in miners for miners in with_signs) > 14
    assert len(set.union(*with_signs)) > 4


def test_a_round_goes_on_without_signs(honest: list[WorkingMiner]) -> None:
    world = SignlessWorld(SPEC, {name: honest[0] for name in NAMES[:REPLICAS]}, rng=random.Random(0))
    world.give_feed()
    assert len(world.verdicts) == 1
    assert "signs_not_known" in [notice.event for notice in world.notices]
    assert any(isinstance(effect, FetchCommitments) for effect in world.effects)
