"""One attack in one swarm: what it earned, when it was found, whom else that hurt, and what it did to the loss.

It owns the measurement and decides nothing: pay is what the validator has set on the (simulated) chain, by the very
code of production; a finding is a failed verdict in the public record, or a mean that is not the one that stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

import torch

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Subject
from orion.common.model.stage import Stage
from orion.common.protocol.records import MergeQuery, MergeRecord, Verdict
from orion.common.protocol.refusals import RefusedError
from orion.common.train.engine import StageEngine
from orion.orchestrator.events import RequestArrived
from orion.simulator.adversaries.adversary import Plot
from orion.simulator.adversaries.catalogue import Attack, Lineup
from orion.simulator.host import Host
from orion.simulator.miner_host import HOST_DEVICE
from orion.simulator.orchestrator_host import OrchestratorHost
from orion.simulator.swarm import Scenario, Swarm
from orion.simulator.validator_host import REPLAY_S, ValidatorHost
from orion.validator.events import WeightsSet

HELD_OUT_FROM = 10_000_000
"""Data ids beyond any that a trial trains on."""
HELD_OUT_MICROBATCHES = 32
VIRTUAL_S_MAX = 2_000.0


@dataclass(frozen=True, slots=True)
class PaySet:
    """Weights that the validator has set once."""

    weights: Mapping[Hotkey, int]
    found: frozenset[Hotkey]
    """Whom a finding had named by then."""


@dataclass(slots=True)
class Watch:
    """Observes a swarm: findings and pay, in order."""

    swarm: Swarm
    plot: Plot
    pay: list[PaySet] = field(default_factory=list)
    verdicts: dict[tuple[Hotkey, int, Subject], Verdict] = field(default_factory=dict)
    outvoted: dict[Hotkey, int] = field(default_factory=dict)
    """Outer step of the first mean of each reducer that does not stand."""
    attacked_step: int | None = None
    """Outer step in which something dishonest was done for the first time."""

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        if self.attacked_step is None and self.plot.attacks:
            self.attacked_step = min(stage.outer_step for stage in self.swarm.orchestrator.stage_states())
        match host, event:
            case ValidatorHost(), WeightsSet():
                self.note_merges()
                self._note_pay(host)
            case OrchestratorHost(), RequestArrived(message=Verdict() as verdict):
                self.verdicts.setdefault((verdict.miner, verdict.outer_step, verdict.subject), verdict)

    @property
    def failed(self) -> dict[Hotkey, int]:
        """Outer step of the first failed verdict on each miner."""
        failed: dict[Hotkey, int] = {}
        for (miner, outer_step, _), verdict in self.verdicts.items():
            if not verdict.passed:
                failed[miner] = min(outer_step, failed.get(miner, outer_step))
        return failed

    @property
    def found(self) -> dict[Hotkey, int]:
        """Outer step of the first finding against each attacker. A mean that is not the one that stands tells only that
        somebody lied, so against honest miners it counts for nothing."""
        found = self.failed
        for hotkey, outer_step in self.outvoted.items():
            if hotkey in self.plot.members:
                found[hotkey] = min(outer_step, found.get(hotkey, outer_step))
        return found

    def note_merges(self) -> None:
        """Finds reducers whose mean is not the one that stands."""
        spec, core = self.swarm.scenario.spec, self.swarm.orchestrator.core
        for stage_index in range(spec.num_stages):
            for outer_step in range(spec.outer_steps):
                try:
                    record = core.merge(MergeQuery(stage_index=stage_index, outer_step=outer_step))
                except RefusedError:
                    break  # not settled yet
                for hotkey in _outvoted(record):
                    self.outvoted.setdefault(hotkey, outer_step)

    def _note_pay(self, host: ValidatorHost) -> None:
        row = host.chain_weights()
        hotkeys = {neuron.uid: neuron.hotkey for neuron in self.swarm.world.metagraph().neurons}
        weights = {hotkeys[uid]: weight for uid, weight in row.items()}
        self.pay.append(PaySet(weights, frozenset(self.found)))


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one attack, or of a run without any."""

    name: str
    share: float
    """Of the replicas of the attacked stage."""
    num_attacks: int
    """Things that were really done dishonestly; 0 means that the trial shows nothing."""
    effort: float
    """Share of the passes that attackers claimed which they computed."""
    detected_after_outer_steps: int | None
    """Until the last attacker was found, 1 = in the outer step of its first attack; None = not all were."""
    earnings_before: float | None
    """Mean pay of an attacker until it was found, 1 = that of an honest miner in its place; None = no pay day."""
    earnings_after: float | None
    """The same from then on; None = not found, or no pay day followed."""
    honest_spread: float | None
    """Standard deviation of what honest miners of the attackers' stages earned meanwhile, 1 = their mean: what an
    attacker's figure may differ by for no reason but luck; None = no pay day before all were found."""
    honest_punished: int
    """Honest miners with a failed verdict."""
    honest_checks: int
    """Verdicts on honest miners."""
    honest_failed: int
    """Of these, failed ones."""
    loss: float
    """Held-out, of the model as it ended."""
    loss_effect: float
    """Above that of the same swarm without the attack."""
    reasons: tuple[str, ...]
    """Why attackers failed, as the verdicts say."""
    outvoted: int
    """Attackers whose mean of a partition did not stand."""
    pay: tuple[Mapping[Hotkey, int], ...]
    """What the validator set on each pay day."""
    luck: Mapping[Hotkey, Sequence[float]]
    """Pay of each miner on each pay day as a share of its stage's mean, when nobody attacks; empty otherwise."""


def run_trial(
    attack: Attack | None,
    spec: RunSpec,
    num_attackers: int,
    seed: int,
    without: Trial | None,
    *,
    replay_s: float = REPLAY_S,
) -> Trial:
    """Runs a swarm with this attack (None: without any) to its end.

    `without` is the trial of the same swarm and seed without an attack: what an honest miner earns in the attackers'
    place (its link may be better than others'), and how far the model comes. A replay takes the validator `replay_s`.
    """
    plot = Plot()
    cheats = {} if attack is None else attack.cast(Lineup(spec.num_stages, spec.replicas, num_attackers), plot)
    name = "none" if attack is None else attack.name
    swarm = Swarm(Scenario(name, spec, VIRTUAL_S_MAX, cheats=cheats, replay_s=replay_s), seed)
    watch = Watch(swarm, plot)
    swarm.world.observers.append(watch)
    swarm.start()
    assert swarm.run(), f"{name}: not finished after {VIRTUAL_S_MAX:g} virtual seconds"
    watch.note_merges()
    stages = {hotkey: index // spec.replicas for index, hotkey in enumerate(swarm.hotkeys)}
    attackers = [swarm.hotkeys[index] for index in cheats]
    pay = _Pay(watch.pay, stages, frozenset(attackers))
    found = [watch.found[hotkey] for hotkey in attackers if hotkey in watch.found]
    is_found = bool(attackers) and len(found) == len(attackers)
    loss = held_out_loss(swarm)
    of_honest = [verdict for (miner, _, _), verdict in watch.verdicts.items() if miner not in attackers]
    # Hotkeys of one machine are paid together.
    num_purses = 1 if attack is not None and attack.is_one_machine else max(1, len(attackers))
    scale = len(attackers) / num_purses
    luck = {} if without is None else without.luck
    return Trial(
        name=name,
        share=max((sum(stages[each] == stage for each in attackers) for stage in range(spec.num_stages)), default=0)
        / spec.replicas,
        num_attacks=plot.attacks.total(),
        effort=plot.effort,
        detected_after_outer_steps=max(1, max(found) - (watch.attacked_step or 0) + 1) if is_found else None,
        earnings_before=pay.earnings(luck, scale, after=False),
        earnings_after=pay.earnings(luck, scale, after=True),
        honest_spread=pay.honest_spread(),
        honest_punished=len({verdict.miner for verdict in of_honest if not verdict.passed}),
        honest_checks=len(of_honest),
        honest_failed=sum(not verdict.passed for verdict in of_honest),
        loss=loss,
        loss_effect=0.0 if without is None else loss - without.loss,
        reasons=tuple(
            sorted(
                {
                    verdict.reason
                    for (miner, _, _), verdict in watch.verdicts.items()
                    if miner in attackers and not verdict.passed
                }
            )
        ),
        outvoted=sum(hotkey in watch.outvoted for hotkey in attackers),
        pay=tuple(day.weights for day in watch.pay),
        luck={hotkey: [pay.share(hotkey, day) for day in pay.days] for hotkey in swarm.hotkeys}
        if not attackers
        else {},
    )


@dataclass(frozen=True, slots=True)
class _Pay:
    """Everybody's pay in one trial."""

    days: Sequence[PaySet]
    stages: Mapping[Hotkey, int]
    attackers: frozenset[Hotkey]

    def share(self, hotkey: Hotkey, day: PaySet) -> float:
        """A miner's weight ÷ the mean of the honest miners of its stage; 0 while they have none either."""
        mean = fmean(day.weights.get(peer, 0) for peer in self._honest(self.stages[hotkey]))
        return day.weights.get(hotkey, 0) / mean if mean > 0 else 0.0

    def _honest(self, stage_index: int) -> list[Hotkey]:
        """The honest miners of a stage."""
        return [peer for peer, stage in self.stages.items() if stage == stage_index and peer not in self.attackers]

    def honest_spread(self) -> float | None:
        """How unlike honest miners beside the attackers were paid until all of these were found; None without a pay
        day, or where nobody attacks."""
        days = [day for day in self.days if not self.attackers <= day.found]
        if not days or not self.attackers:
            return None
        stages = sorted({self.stages[attacker] for attacker in self.attackers})
        earned = [fmean(self.share(peer, day) for day in days) for stage in stages for peer in self._honest(stage)]
        return pstdev(earned)

    def earnings(self, luck: Mapping[Hotkey, Sequence[float]], scale: float, *, after: bool) -> float | None:
        """Mean over the attackers who had a pay day before (or after) they were found; None when nobody had."""
        earned = []
        for attacker in sorted(self.attackers):
            places = [place for place, day in enumerate(self.days) if (attacker in day.found) is after]
            if places:
                # The last day: before it, who was drawn early counts for more than who is well placed.
                usual = luck[attacker][-1]
                earned.append(scale * fmean(self.share(attacker, self.days[place]) for place in places) / usual)
        return fmean(earned) if earned else None


def _outvoted(record: MergeRecord) -> set[Hotkey]:
    standing = {
        merged.partition_index: merged.object.digest
        for merged in record.manifest.partitions
        if merged.object is not None
    }
    return {
        copy.reducer
        for partition in record.partitions
        for copy in partition.copies
        if standing.get(partition.partition_index, copy.object.digest) != copy.object.digest
    }


@torch.no_grad()
def held_out_loss(swarm: Swarm) -> float:
    """Mean loss per token of the final anchors on data that nobody trained on."""
    spec = swarm.scenario.spec
    engines = [_engine(swarm, stage_index) for stage_index in range(spec.num_stages)]
    losses = []
    for data_id in range(HELD_OUT_FROM, HELD_OUT_FROM + HELD_OUT_MICROBATCHES):
        ids_BU = torch.from_numpy(swarm.world.tokens.microbatch(spec.seed, data_id))
        x_BTC = None
        for engine in engines:
            result = engine.evaluate(x_BTC, ids_BU)
            x_BTC = result.output_BTC
        assert result.loss is not None
        losses.append(result.loss)
    return fmean(losses)


def _engine(swarm: Swarm, stage_index: int) -> StageEngine:
    """An engine on the newest anchor that an honest replica of the stage holds."""
    spec = swarm.scenario.spec
    states = [
        miner.worker.outer_state
        for index, miner in swarm.miners.items()
        if index // spec.replicas == stage_index and index not in swarm.scenario.cheats
    ]
    state = max((state for state in states if state is not None), key=lambda each: each.outer_step)
    engine = StageEngine(
        Stage(spec.model, spec.layouts[stage_index]),
        inner=spec.inner,
        outer=spec.outer,
        total_params=sum(spec.stage_sizes),
        device=HOST_DEVICE,
        compute_dtype=torch.float32,
        wire_dtype=torch.float32,
        graphs_max=0,
    )
    engine.load(state)
    return engine
