"""What a local run ended with, and whether that is good. Pure."""

from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

from orion.common.protocol.records import Repairs, RunStatus


class SwarmOutcome(BaseModel):
    """The one object that `orion up --json` prints. Losses are nats per token; `seconds` is the swarm's own time."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    tokens: int
    tokens_per_s: float
    tokens_per_s_single_process: float | None
    loss_first: float | None
    loss_last: float | None
    heldout_loss: float
    heldout_loss_untrained: float
    heldout_loss_single_process: float | None
    outer_steps: int
    first_outer_step: int = 0
    """0, or where the checkpoint stood that the run went on from."""
    anchors_equal: bool
    microbatches_started: int
    microbatches_applied: int
    microbatches_cancelled: int
    microbatches_repaired: Repairs
    checks: int
    verdicts_failed: int
    scores: dict[str, float]
    chain_weights: dict[str, float]
    """Shares that the validator has set on the chain."""
    incentives: dict[str, float]
    """Shares that the chain pays after an epoch with these weights."""
    checkpoint: str
    plot: str
    seconds: float
    notices: list[str]
    sample: str


INCENTIVE_UNIT = 2 / 65_535
"""What the chain's rounding, of weights and of incentives, may turn around."""


@dataclass(frozen=True, slots=True)
class LossEnds:
    """Mean loss over the first and over the last microbatches of a run."""

    first: float | None
    last: float | None


def loss_ends(losses: list[float], window: int = 16) -> LossEnds:
    """Means over `window` microbatches at each end; None for a run without any."""
    if not losses:
        return LossEnds(None, None)
    head, tail = losses[:window], losses[-window:]
    return LossEnds(sum(head) / len(head), sum(tail) / len(tail))


def problems(outcome: SwarmOutcome, status: RunStatus) -> list[str]:
    """Every reason for which this run must not be called good; empty when it is."""
    found = []
    if not status.finished:
        found.append(f"the run stopped at outer step {status.outer_step} of {status.outer_steps}")
    if not outcome.anchors_equal:
        found.append("replicas of a stage ended an outer step with different anchors")
    if outcome.loss_first is None or outcome.loss_last is None:
        found.append("no microbatch was applied")
    elif outcome.loss_last >= outcome.loss_first and outcome.first_outer_step == 0:
        found.append(f"the loss did not fall ({outcome.loss_first:.3f} to {outcome.loss_last:.3f})")
    if outcome.heldout_loss >= outcome.heldout_loss_untrained:
        found.append(
            f"the merged model is no better than an untrained one on held-out text "
            f"({outcome.heldout_loss:.3f}, untrained {outcome.heldout_loss_untrained:.3f})"
        )
    if outcome.microbatches_started != outcome.microbatches_applied + outcome.microbatches_cancelled:
        found.append("some microbatches were neither applied nor cancelled")
    if outcome.verdicts_failed:
        found.append(f"{outcome.verdicts_failed} checks of this machine's own miners failed")
    return found + chain_problems(outcome)


def chain_problems(outcome: SwarmOutcome) -> list[str]:
    """Whether work has become weight, and weight has become pay."""
    if not outcome.chain_weights:
        return ["the validator's weights are not on the chain"]
    unpaid = [name for name in sorted(outcome.chain_weights) if not outcome.incentives.get(name)]
    if unpaid:
        return [f"no incentive after an epoch for {', '.join(unpaid)}, who have weight on the chain"]
    ranked = sorted(outcome.scores, key=lambda name: (-outcome.scores[name], name))
    for better, worse in pairwise(ranked):
        paid = outcome.incentives.get(better, 0.0) - outcome.incentives.get(worse, 0.0)
        if paid < -INCENTIVE_UNIT and outcome.scores[better] > outcome.scores[worse]:
            return [f"{worse} has more incentive than {better}, whose verified work is greater"]
    return []
