"""Path and loss of every applied trip of the outer steps that are kept: what shows who makes its paths worse.

Pure. A path is its first-stage miner's word; only one that fits the run's members is taken. Invariants: a trip has one
path at most; each path has one miner a stage. Bounded like the trips themselves: forgotten with them.
"""

from array import array
from dataclasses import dataclass, field

from orion.common.ids import Hotkey, MicrobatchId
from orion.common.protocol.records import Pathway, Pathways


@dataclass(slots=True)
class StepPathways:
    """Columns of one outer step's pathways, in order of arrival; miners by their place in `hotkeys`."""

    hotkeys: list[Hotkey] = field(default_factory=list)
    places: dict[Hotkey, int] = field(default_factory=dict)
    microbatch_ids: "array[int]" = field(default_factory=lambda: array("q"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    paths: "array[int]" = field(default_factory=lambda: array("i"))
    """One place a stage for each pathway, one pathway after the other."""


@dataclass(slots=True)
class PathwayBook:
    """The pathways of all outer steps that are kept."""

    num_stages: int
    steps: dict[int, StepPathways] = field(default_factory=dict)

    def add(self, outer_step: int, microbatch_id: MicrobatchId, path: tuple[Hotkey, ...], loss: float) -> None:
        """Keeps a trip's pathway; `path` names one miner for each stage."""
        assert len(path) == self.num_stages, "a path has one miner a stage"
        step = self.steps.setdefault(outer_step, StepPathways())
        for hotkey in path:
            if hotkey not in step.places:
                step.places[hotkey] = len(step.hotkeys)
                step.hotkeys.append(hotkey)
            step.paths.append(step.places[hotkey])
        step.microbatch_ids.append(microbatch_id)
        step.losses.append(loss)

    def page(self, outer_step: int, offset: int, num_max: int) -> Pathways:
        """Pathways of an outer step from the one numbered `offset` on, at most `num_max`."""
        step = self.steps.get(outer_step, StepPathways())
        total, width = len(step.losses), self.num_stages
        return Pathways(
            outer_step=outer_step,
            miners=tuple(step.hotkeys),
            pathways=tuple(
                Pathway(
                    microbatch_id=MicrobatchId(step.microbatch_ids[index]),
                    loss=step.losses[index],
                    path=tuple(step.paths[index * width : (index + 1) * width]),
                )
                for index in range(min(offset, total), min(offset + num_max, total))
            ),
            total=total,
        )

    def forget_before(self, outer_step: int) -> None:
        """Drops the pathways of older outer steps."""
        for old in [step for step in self.steps if step < outer_step]:
            del self.steps[old]
