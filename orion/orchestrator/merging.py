"""Upload and merge of one stage: from the end of training to the next anchor.

UPLOAD(k): contributors announce what they stand by; once all have, reducers are drawn and may fetch what has arrived;
the contributors' objects become durable, or are late (`late`). MERGE(k): reducers' means are settled partition by
partition (`merge` decides each), then the manifest is out and members apply it. A stage where nobody contributed gets a
manifest that changes nothing.

Invariants: a manifest names only durable objects and every partition once; no phase waits beyond its deadline or for
anybody who is gone or suspected of it; all who are active afterwards reported the same anchor, or could not report in
time.
"""

import math
from collections import Counter
from collections.abc import Collection
from statistics import median_low

from orion.common.ids import Digest, Hotkey, MemberState
from orion.common.protocol.entries import ContributionOutcome, MergeSettled, ReductionOutcome
from orion.common.protocol.keys import outer_step_prefix
from orion.common.protocol.messages import (
    Contribution,
    Manifest,
    MergedPartition,
)
from orion.common.protocol.records import MergeRecord, PartitionRecord, ReducedCopy
from orion.common.train.partition import assign_reducers, partition_bounds
from orion.orchestrator import late
from orion.orchestrator.checkpoints import begin_finishing, leave_anchor
from orion.orchestrator.leases import REPORT_SLACK_S
from orion.orchestrator.merge import COPIES_TO_SETTLE, Ask, PartitionMerge, Situation, Write, decide, unchanged, votes
from orion.orchestrator.retention import forget_old
from orion.orchestrator.stages import NEVER_S, Applying, Reducing, StageProgress, Training, Uploading
from orion.orchestrator.state import RunState

_NAMED_MAX = 5
"""Hotkeys spelled out in a notice."""


def begin_upload(state: RunState, stage: StageProgress) -> None:
    """Training has ended: whoever trained in this outer step is awaited."""
    trained = state.memory.membership.of_stage(stage.stage_index, MemberState.ACTIVE)
    now_s = state.memory.now_s
    stage.activity = Uploading(
        awaited=[member.hotkey for member in trained],
        began_s=now_s,
        due_s=_due_s(state, stage, [member.hotkey for member in trained]),
    )
    stage.deadline_s = now_s + state.figures[stage.stage_index].upload_s
    late.look_for(state, stage)
    state.changed()


def _due_s(state: RunState, stage: StageProgress, awaited: Collection[Hotkey]) -> dict[Hotkey, float]:
    """Until when each is waited for, once there is a quorum: what its link needs, and no longer than the usual peer's
    does, because what comes later goes into the next merge, where there is one. Each time has the grace in it."""
    figures = state.figures[stage.stage_index]
    rates = {hotkey: _rates(state, hotkey)[0] for hotkey in awaited}
    usual_s = [figures.upload_s_at(rate) for rate in rates.values() if rate is not None]
    is_last = stage.outer_step + 1 >= state.memory.final_outer_step
    longest_s = median_low(usual_s) if usual_s and not is_last else figures.upload_s
    return {hotkey: state.memory.now_s + min(longest_s, figures.upload_s_at(rate)) for hotkey, rate in rates.items()}


def advance_merge(state: RunState, stage: StageProgress) -> bool:
    """Moves the stage on if it is time; whether it was."""
    match stage.activity:
        case Uploading() as uploading:
            return _advance_upload(state, stage, uploading)
        case Reducing() as reducing:
            return _advance_reduce(state, stage, reducing)
        case Applying() as applying:
            return _advance_apply(state, stage, applying)
        case _:
            return False


# --- upload -----------------------------------------------------------------------------------------------------------


def _advance_upload(state: RunState, stage: StageProgress, uploading: Uploading) -> bool:
    awaited = [hotkey for hotkey in uploading.awaited if not _is_barred(state, hotkey)]
    there = [hotkey for hotkey in awaited if _is_uploaded(state, stage, uploading, hotkey)]
    missing = [hotkey for hotkey in awaited if hotkey not in there and _may_come(state, stage, uploading, hotkey)]
    if missing and state.memory.now_s < stage.deadline_s and not _is_closed(state, uploading, there, missing):
        if uploading.partitions is None and all(hotkey in uploading.uploads for hotkey in missing):
            uploading.partitions = _assigned(state, stage)
            state.changed()
        return False
    if missing:
        state.notice(f"{_where(stage)}: upload cut short, without {_named(missing)}")
    overdue = late.those_there(state, stage)
    voices = {*there, *(each.hotkey for each in overdue)}
    num_needed = max(1, math.ceil(state.spec.quorum * len(voices.union(missing))))
    if voices and len(voices) < num_needed:
        state.notice(f"{_where(stage)}: {len(voices)} of {num_needed} needed contributions are there; anchor kept")
        there, overdue = [], []
    if stage.stage_index == 0:
        unended = state.memory.leases.live_trips_in(stage.outer_step)
        state.end_trips(unended, "the outer step ended before it")
    in_time = [uploading.uploads[hotkey] for hotkey in sorted(there)]
    merged = tuple(_weighed(state, stage, contribution) for contribution in (*overdue, *in_time))
    rest = {hotkey: each for hotkey, each in uploading.uploads.items() if hotkey in awaited and hotkey not in there}
    late.close(state, stage, overdue, rest)
    _begin_reduce(state, stage, merged, uploading.partitions or _assigned(state, stage))
    return True


def _is_closed(state: RunState, uploading: Uploading, there: list[Hotkey], missing: list[Hotkey]) -> bool:
    """Whether a quorum is there, and who is missing has had the time that its own link needs, and the grace."""
    if len(there) < max(1, math.ceil(state.spec.quorum * (len(there) + len(missing)))):
        return False
    return all(state.memory.now_s >= uploading.due_s[hotkey] for hotkey in missing)


def _rates(state: RunState, hotkey: Hotkey) -> tuple[float | None, float | None]:
    """What a member's link has been seen to do, up and down, in bytes per second; None where it is not known."""
    member = state.memory.membership.get(hotkey)
    if member is None or member.heartbeat is None:
        return None, None
    return member.heartbeat.upload_bytes_per_s, member.heartbeat.download_bytes_per_s


def _is_barred(state: RunState, hotkey: Hotkey) -> bool:
    """Whether a contribution is not wanted, although it is there: a failed check has barred its miner since."""
    member = state.memory.membership.members.get(hotkey)
    return member is not None and member.is_barred


def _is_uploaded(state: RunState, stage: StageProgress, uploading: Uploading, hotkey: Hotkey) -> bool:
    contribution = uploading.uploads.get(hotkey)
    if contribution is None or late.comes_before(state, stage, hotkey):
        return False
    return late.is_durable(state, contribution)


def _may_come(state: RunState, stage: StageProgress, uploading: Uploading, hotkey: Hotkey) -> bool:
    """Whether a contribution that is not there is worth waiting for: it was announced, or its miner still has its
    parameters and has done something with them as far as one can tell."""
    member = state.memory.membership.get(hotkey)
    if hotkey in uploading.uploads:
        heard = state.memory.membership.heard(stage.stage_index)
        return hotkey in uploading.stored or (member is not None and member in heard)
    if member is None or member not in state.memory.membership.heard(stage.stage_index, MemberState.ACTIVE):
        return False
    commitment = state.memory.ledger.commitment(stage.outer_step, hotkey)
    if commitment is not None and commitment.is_final:
        return commitment.num_contributed > 0
    has_told = state.memory.ledger.has_told(stage.outer_step, hotkey)
    has_leased = state.memory.leases.has_leased(stage.outer_step, hotkey)
    return has_told or has_leased or state.memory.now_s < uploading.began_s + REPORT_SLACK_S


def _weighed(state: RunState, stage: StageProgress, contribution: Contribution) -> Contribution:
    """A contribution weighs what its miner was credited for, whatever it claims; at least one microbatch, because
    receipts of a partner that died may never come."""
    trained_in = stage.outer_step - contribution.age
    credited = state.memory.ledger.num_credited(trained_in, contribution.hotkey, stage.stage_index)
    weight = min(contribution.num_microbatches, max(1, credited))
    return contribution.model_copy(update={"num_microbatches": weight})


# --- reduce -----------------------------------------------------------------------------------------------------------


def _assigned(state: RunState, stage: StageProgress) -> list[PartitionMerge]:
    """Every partition with two reducers, of whom the first is to write; none where there is nobody to reduce."""
    candidates = _reducers(state, stage)
    if not candidates:
        return []
    assignments = assign_reducers(
        partition_bounds(state.figures[stage.stage_index].num_params, state.spec.num_partitions),
        candidates,
        state.draw(f"reducers {stage.stage_index} {stage.outer_step}"),
    )
    now_s = state.memory.now_s
    return [
        PartitionMerge(
            partition_index=assignment.partition.index,
            reducers=list(assignment.reducers),
            asked_s=dict.fromkeys(assignment.reducers, now_s),
            writers={assignment.reducers[0]: now_s},
        )
        for assignment in assignments
    ]


def _begin_reduce(
    state: RunState, stage: StageProgress, contributions: tuple[Contribution, ...], partitions: list[PartitionMerge]
) -> None:
    candidates = _reducers(state, stage)
    if not contributions or not candidates or not partitions:
        why = "nobody is there to reduce" if contributions else "no contribution"
        state.notice(f"{_where(stage)}: {why}; anchor kept")
        late.keep(stage, contributions)
        kept = [unchanged(index) for index in range(state.spec.num_partitions)]
        _settle(state, stage, (), kept, [])
        _publish(state, stage, kept, ())
        return
    now_s = state.memory.now_s
    figures = state.figures[stage.stage_index]
    allowance_s = figures.reduce_s(len(contributions), len(candidates))
    allowances_s = {
        hotkey: figures.reduce_s(len(contributions), len(candidates), *_rates(state, hotkey)) for hotkey in candidates
    }
    for partition, anew in zip(partitions, _assigned(state, stage), strict=True):
        # Who has gone, was barred or is late since it was drawn has done nothing yet: there is nothing to decide on it.
        partition.reducers = [hotkey for hotkey in partition.reducers if hotkey in candidates] or anew.reducers
        partition.asked_s = dict.fromkeys(partition.reducers, now_s)
        partition.writers = {partition.reducers[0]: now_s}
    stage.activity = Reducing(contributions, partitions, allowance_s, allowances_s)
    # Twice: once for those who are asked first, once for those who replace the late ones among them.
    stage.deadline_s = now_s + 2 * allowance_s
    state.changed()


def _candidates(state: RunState, stage: StageProgress) -> list[Hotkey]:
    """Who may reduce; those who are still fetching an anchor have better things to do."""
    members = state.memory.membership.heard(stage.stage_index, MemberState.ACTIVE, MemberState.READY)
    return [member.hotkey for member in members]


def _reducers(state: RunState, stage: StageProgress) -> list[Hotkey]:
    """Who is to reduce: not who is late with an upload, where two others are there. Its link has enough to carry, and
    everybody would wait for its means."""
    candidates = _candidates(state, stage)
    timely = [hotkey for hotkey in candidates if hotkey not in stage.late]
    return timely if len(timely) >= COPIES_TO_SETTLE else candidates


def _advance_reduce(state: RunState, stage: StageProgress, reducing: Reducing) -> bool:
    situation = Situation(
        now_s=state.memory.now_s,
        deadline_s=stage.deadline_s,
        allowance_of=lambda hotkey: reducing.allowances_s.get(hotkey, reducing.allowance_s),
        candidates=_candidates(state, stage),
        is_durable=state.memory.objects.is_durable,
    )
    for partition in reducing.partitions:
        _advance_partition(state, stage, reducing, partition, situation)
    outcomes = [partition.outcome for partition in reducing.partitions if partition.outcome is not None]
    if len(outcomes) < len(reducing.partitions):
        return False
    _settle(state, stage, reducing.contributions, outcomes, reducing.partitions)
    _publish(state, stage, outcomes, reducing.contributions)
    return True


def _advance_partition(
    state: RunState, stage: StageProgress, reducing: Reducing, partition: PartitionMerge, situation: Situation
) -> None:
    """Asks as many further reducers as are needed, and settles the partition when it can be."""
    where = f"{_where(stage)}, partition {partition.partition_index}"
    while partition.outcome is None:
        decision = decide(partition, situation)
        if decision is None:
            return
        if isinstance(decision, Ask):
            substitute = _substitute(state, stage, reducing, partition, situation)
            state.notice(f"{where}: {decision.reason}; {substitute} reduces it too")
            partition.reducers.append(substitute)
            partition.asked_s[substitute] = partition.writers[substitute] = situation.now_s
        elif isinstance(decision, Write):
            partition.writers[decision.hotkey] = situation.now_s
        else:
            if decision.dissenters:
                state.notice(f"{where}: other bytes from {_named(decision.dissenters)}")
            if decision.reason:
                state.notice(f"{where}: {decision.reason}")
            for exclusion in decision.outcome.excluded:
                state.notice(f"{where}: {exclusion.hotkey} left out: {exclusion.reason}")
            partition.outcome = decision.outcome
            partition.votes = votes(partition, decision, situation)
        state.changed()


def _substitute(
    state: RunState, stage: StageProgress, reducing: Reducing, partition: PartitionMerge, situation: Situation
) -> Hotkey:
    """The candidate with the fewest partitions to reduce, who is late only where nobody else is there; among equals a
    draw decides."""
    fresh = [hotkey for hotkey in situation.candidates if hotkey not in partition.reducers]
    return min(
        fresh,
        key=lambda hotkey: (
            hotkey in stage.late,
            sum(hotkey in other.reducers for other in reducing.partitions),
            state.draw(f"substitute {partition.partition_index} {hotkey}"),
        ),
    )


def _settle(
    state: RunState,
    stage: StageProgress,
    contributions: tuple[Contribution, ...],
    outcomes: list[MergedPartition],
    partitions: list[PartitionMerge],
) -> None:
    """Puts into the public ledger what became of contributions and reductions."""
    settled = [outcome for outcome in outcomes if outcome.object is not None]
    left_out = Counter(exclusion.voice for outcome in settled for exclusion in outcome.excluded)
    state.record(
        MergeSettled(
            stage_index=stage.stage_index,
            outer_step=stage.outer_step,
            num_partitions=len(outcomes),
            num_settled=len(settled),
            contributions=tuple(
                ContributionOutcome(
                    hotkey=contribution.hotkey,
                    num_microbatches=contribution.num_microbatches,
                    age=contribution.age,
                    num_merged=len(settled) - left_out[contribution.voice],
                )
                for contribution in contributions
            ),
            reductions=tuple(
                ReductionOutcome(partition_index=partition.partition_index, hotkey=hotkey, vote=vote)
                for partition in partitions
                for hotkey, vote in partition.votes.items()
            ),
        )
    )


def _publish(
    state: RunState,
    stage: StageProgress,
    partitions: list[MergedPartition],
    contributions: tuple[Contribution, ...],
) -> None:
    """The outer step's result is final; members apply it."""
    manifest = Manifest(
        stage_index=stage.stage_index,
        outer_step=stage.outer_step,
        partitions=tuple(partitions),
        contributors=tuple(contribution.hotkey for contribution in contributions if not contribution.age),
        total_microbatches=sum(contribution.num_microbatches for contribution in contributions),
        late=tuple(sorted(stage.late)),
    )
    stage.manifests[stage.outer_step] = manifest
    merged = stage.activity.partitions if isinstance(stage.activity, Reducing) else []
    stage.merges[stage.outer_step] = MergeRecord(
        stage_index=stage.stage_index,
        outer_step=stage.outer_step,
        contributions=contributions,
        partitions=tuple(_record(partition) for partition in merged),
        manifest=manifest,
        late=tuple(each.contribution for _, each in sorted(stage.late.items())),
    )
    # Suspects too: one that is heard again in time applies the manifest like any other.
    members = state.memory.membership.of_stage(stage.stage_index, MemberState.ACTIVE, MemberState.READY)
    stage.activity = Applying([member.hotkey for member in members])
    stage.deadline_s = state.memory.now_s + state.figures[stage.stage_index].apply_s
    state.changed()


def _record(partition: PartitionMerge) -> PartitionRecord:
    """What is known of a settled partition, the copies that lost and those that were only told included."""
    copies = [(hotkey, partition.copies[hotkey]) for hotkey in partition.reducers if hotkey in partition.copies]
    return PartitionRecord(
        partition_index=partition.partition_index,
        asked=tuple(partition.reducers),
        copies=tuple(
            ReducedCopy(
                reducer=hotkey,
                object=copy.object,
                excluded=tuple(exclusion.hotkey for exclusion in copy.excluded if not exclusion.age),
                excluded_late=tuple(exclusion.hotkey for exclusion in copy.excluded if exclusion.age),
            )
            for hotkey, copy in copies
        ),
    )


# --- apply ------------------------------------------------------------------------------------------------------------


def _advance_apply(state: RunState, stage: StageProgress, applying: Applying) -> bool:
    awaited = set(applying.awaited) - applying.digests.keys()
    missing = [hotkey for hotkey in _candidates(state, stage) if hotkey in awaited]
    if missing and state.memory.now_s < stage.deadline_s:
        return False
    agreed = _majority(applying.digests)
    if len(set(applying.digests.values())) > 1:
        state.memory.anchors_equal = False
        dissenters = sorted(hotkey for hotkey, digest in applying.digests.items() if digest != agreed)
        state.notice(f"{_where(stage)}: anchors differ; {_named(dissenters)} must build theirs anew")
    _enter_next(state, stage, applying.digests, agreed)
    return True


def _majority(digests: dict[Hotkey, Digest]) -> Digest | None:
    """The digest that most replicas reported; of equals the one of the first hotkey; None when nobody reported."""
    votes = list(digests.values())
    if not votes:
        return None
    first_with = {digest: min(hotkey for hotkey in digests if digests[hotkey] == digest) for digest in votes}
    return min(first_with, key=lambda digest: (-votes.count(digest), first_with[digest]))


def _enter_next(state: RunState, stage: StageProgress, digests: dict[Hotkey, Digest], agreed: Digest | None) -> None:
    """The stage stands at the next anchor; members are what they showed themselves to be."""
    memory = state.memory
    stage.outer_step += 1
    stage.anchor_digest = agreed
    for member in memory.membership.of_stage(stage.stage_index):
        if member.is_barred:
            continue
        told = digests.get(member.hotkey)
        if told is not None and told == agreed:
            member.ready_outer_step = stage.outer_step
            state.set_state(member, MemberState.ACTIVE)
        elif told is not None:
            member.distrusted_until_s = memory.now_s + state.spec.time_limits.member_s
            state.send_back(member, "its anchor differs")
        elif member.trusts_ready(stage.outer_step, memory.now_s):
            if member.state is MemberState.JOINING:
                state.set_state(member, MemberState.READY)
        elif member.state is not MemberState.JOINING:
            state.send_back(member, "it did not apply the outer step in time")
    late.stop_looking(state, stage)
    memory.objects.stop_watching(f"{outer_step_prefix(stage.outer_step - 1)}stage/{stage.stage_index}/reduced/")
    leave_anchor(state, stage)
    if stage.outer_step >= memory.final_outer_step:
        begin_finishing(state, stage)
    else:
        stage.activity = Training()
        stage.deadline_s = memory.train.deadline_s if memory.train.is_open else NEVER_S
    forget_old(state)
    state.changed()


def _where(stage: StageProgress) -> str:
    return f"outer step {stage.outer_step}, stage {stage.stage_index}"


def _named(hotkeys: list[Hotkey] | tuple[Hotkey, ...]) -> str:
    rest = len(hotkeys) - _NAMED_MAX
    return ", ".join(hotkeys[:_NAMED_MAX]) + (f" and {rest} more" if rest > 0 else "")
