"""This miner's part in its stage's outer steps: anchor, inner steps, pseudo-gradient, merge. Pure.

Owns which anchor the engine holds, the local outer step (from the first microbatch to the uploaded pseudo-gradient) and
the jobs around it. Level-triggered: `advance` compares what the feed says with what is here and starts at most what is
missing; feeds may be skipped, and every job may fail and is tried again for as long as it matters.

In an overlapped run the next outer step begins as soon as the pseudo-gradient is encoded: where the anchor would be if
the mean were what was encoded, which anybody can compute. It is `unmerged` until the anchor of the next outer step is
there and its device has added the difference. Who was left out of a merge begins the outer step anew, at its anchor.

An upload that was not there when its phase closed goes on: `late`, the contribution of the outer step before, until it
lies in the store or is too old. Uploads go in order, because what follows may count only after what it follows.

Invariants: the engine's state is replaced (load, apply) only while the device is idle and the local outer step is
closed, and what was merged is added only as a job of the device;
a commitment is acknowledged before the pseudo-gradient is uploaded; what the stage no longer waits for is not begun.
"""

from dataclasses import dataclass

from orion.common.config import RunSpec
from orion.common.ids import Digest, Hotkey, MemberState, Operation, Phase
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Contribution,
    Uploaded,
)
from orion.miner.commits import Commits
from orion.miner.effects import (
    ApplyManifest,
    FetchMerged,
    LoadAnchor,
    UploadCheckpoint,
    UploadPseudoGradient,
)
from orion.miner.events import (
    AnchorLoaded,
    ApplyEnded,
    CheckpointEnded,
    EncodePseudoGradient,
    InnerStep,
    InnerStepDone,
    Job,
    MergedFetched,
    MergedNotFetched,
    PseudoGradientEncoded,
    TakeMerged,
    UploadEnded,
)
from orion.miner.local_step import LocalStep, Unmerged
from orion.miner.moment import Emit
from orion.miner.notices import Backoff, Notices
from orion.miner.oplog import OpLog
from orion.miner.reducing import Reductions
from orion.miner.reports import Reports
from orion.miner.view import View


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the engine holds."""

    stage_index: int
    outer_step: int
    """The one that starts from it."""
    digest: Digest


class OuterSteps:
    """Everything between two train phases, and the inner steps within one."""

    def __init__(
        self, spec: RunSpec, hotkey: Hotkey, *, oplog: OpLog, reports: Reports, notices: Notices, emit: Emit
    ) -> None:
        self._spec = spec
        self._hotkey = hotkey
        self._oplog = oplog
        self._reports = reports
        self._notices = notices
        self._emit = emit
        self.commits = Commits(spec.validation.commit_s, oplog, reports, emit)
        self.anchor: Anchor | None = None
        self.local: LocalStep | None = None
        self._unmerged: Unmerged | None = None
        self._late: LocalStep | None = None
        """The outer step before, while its upload goes on."""
        self._is_void = False
        """The anchor must be built anew, although it is the right one by its number."""
        self._last_state: MemberState | None = None
        self._changes_state = False
        """A load or an apply is under way."""
        self._load_backoff = Backoff()
        self._checkpoint_backoff = Backoff()
        self._checkpoint_under_way = False
        self._checkpoint_done = -1
        self.reductions = Reductions(hotkey, notices=notices, emit=emit)

    # --- what holds now -----------------------------------------------------------------------------------------------

    def training_step(self, view: View | None) -> int | None:
        """The outer step for which this miner takes work, None while it takes none."""
        outer_step = None if view is None else view.training_step
        if view is None or outer_step is None or self._changes_state or outer_step != self._standing_step(view):
            return None
        if self.local is None:
            return outer_step if self._oplog.can_begin(outer_step, view.stage_index) else None
        return None if self.local.is_sealed or self.local.outer_step != outer_step else outer_step

    def _standing_step(self, view: View) -> int | None:
        """The outer step that what the engine holds is the beginning of, or a part of; None: of none any more."""
        anchor, unmerged = self.anchor, self._unmerged
        if anchor is None or self._is_void or anchor.stage_index != view.stage_index:
            return None
        if unmerged is None:
            return anchor.outer_step
        return None if unmerged.is_left_out(view.manifest, self._hotkey) else anchor.outer_step + 1

    @property
    def has_merged(self) -> bool:
        """Whether the device should take in what was merged, before anything else."""
        return self._unmerged is not None and self._unmerged.merged_digest is not None

    @property
    def is_changing(self) -> bool:
        """The engine's state is being replaced: the device is not free."""
        return self._changes_state

    def ready_step(self, view: View | None) -> int | None:
        """The outer step whose anchor this miner holds, as it tells in heartbeats."""
        if self.anchor is None or self._changes_state or self._is_void:
            return None
        if view is None or view.stage_index != self.anchor.stage_index:
            return None
        return self.anchor.outer_step

    # --- what happened ------------------------------------------------------------------------------------------------

    def view_changed(self, view: View | None) -> None:
        """Sees when the orchestrator no longer trusts the anchor: a member fell back, or another digest is agreed."""
        state = None if view is None else view.state
        fell_back = (self._last_state is MemberState.ACTIVE and state is not MemberState.ACTIVE) or (
            self._last_state is MemberState.READY and state not in (MemberState.READY, MemberState.ACTIVE)
        )
        self._last_state = state
        if self.anchor is None or self._changes_state:
            return
        if fell_back and (view is None or self.anchor.outer_step == view.target_step):
            self._is_void = True
        checkpoint = None if view is None else view.stage.checkpoint
        if checkpoint is not None and checkpoint.outer_step == self.anchor.outer_step:
            self._is_void = self._is_void or checkpoint.state_digest != self.anchor.digest

    def begin_if_due(self, outer_step: int, now_s: float) -> bool:
        """Opens the local outer step when none is open; whether it did."""
        if self.local is not None:
            return False
        assert self.anchor is not None
        self.local = LocalStep(outer_step)
        self._oplog.begin(outer_step, self.anchor.stage_index, is_ahead=self._unmerged is not None)
        self.commits.begin(now_s)
        return True

    def applied_one(self) -> None:
        """The device accumulated one more gradient."""
        assert self.local is not None
        self.local.num_accumulated += 1

    def inner_step_done(self, done: InnerStepDone) -> None:
        """The device took an inner step, or refused to."""
        local = self.local
        assert local is not None
        local.num_accumulated = 0
        local.inner_steps += 1
        if done.refused_reason is None:
            local.num_stepped += done.num_microbatches

    def encoded(self, result: PseudoGradientEncoded) -> None:
        """The pseudo-gradient lies in the outbox; in an overlapped run the engine has begun the next outer step."""
        local = self.local
        if local is None or local.outer_step != result.outer_step:
            return
        local.objects, local.error_digest = result.objects, result.error_digest
        if result.goes_on:
            self._unmerged, self.local = Unmerged(local), None

    def take_merged(self) -> TakeMerged:
        """The job that adds what was merged."""
        assert self._unmerged is not None
        return TakeMerged(self._unmerged.outer_step)

    def merged_fetch_ended(self, event: MergedFetched | MergedNotFetched, now_s: float) -> None:
        """What was merged lies beside the device; or a mean could not be fetched, and it is tried again later."""
        unmerged = self._unmerged
        if unmerged is None or unmerged.outer_step != event.outer_step:
            return
        unmerged.is_fetching = False
        if isinstance(event, MergedFetched):
            unmerged.merged_digest = event.state_digest
        else:
            unmerged.backoff.failed(now_s)

    def merged_taken(self, view: View | None, now_s: float) -> None:
        """The device has added what was merged: the outer step that trains has its anchor."""
        unmerged, anchor, local = self._unmerged, self.anchor, self.local
        assert unmerged is not None and unmerged.merged_digest is not None and anchor is not None and local is not None
        self._oplog.append(Operation.TAKE_MERGED, inner_step=local.inner_steps)
        self.anchor = Anchor(anchor.stage_index, unmerged.outer_step + 1, unmerged.merged_digest)
        self._late, self._unmerged = unmerged.local, None
        self._tell_applied(self.anchor, view, now_s)

    def upload_ended(self, event: UploadEnded, now_s: float) -> None:
        """The pseudo-gradient lies in the store: now it counts once the orchestrator knows."""
        for local in (self._late, self._contributing):
            if local is None or local.outer_step != event.outer_step or not local.is_uploading:
                continue
            local.is_uploading = False
            local.is_uploaded = event.succeeded
            if event.succeeded:
                self._tell_contribution(local, now_s, is_stored=True)
            else:
                local.backoff.failed(now_s)

    def anchor_loaded(self, event: AnchorLoaded, view: View | None, now_s: float) -> None:
        self._stand_at(Anchor(event.stage_index, event.outer_step, event.state_digest), view, now_s)
        self._is_void = False

    def apply_ended(self, event: ApplyEnded, view: View | None, now_s: float) -> None:
        assert self.anchor is not None
        self._stand_at(Anchor(self.anchor.stage_index, event.outer_step + 1, event.state_digest), view, now_s)

    def state_change_failed(self, now_s: float, *, anchor_is_lost: bool) -> None:
        """A load or an apply came to nothing; it is tried again after a pause."""
        self._changes_state = False
        self._load_backoff.failed(now_s)
        if anchor_is_lost:
            # With the anchor goes what was done on it: it was sealed before the load began.
            self.anchor = self.local = self._unmerged = self._late = None

    def checkpoint_ended(self, event: CheckpointEnded, now_s: float) -> None:
        self._checkpoint_under_way = False
        if event.object is None or self.anchor is None or self.anchor.outer_step != event.outer_step:
            self._checkpoint_backoff.failed(now_s)
            return
        self._checkpoint_done = event.outer_step
        notice = CheckpointUploaded(outer_step=event.outer_step, object=event.object, state_digest=self.anchor.digest)
        self._notices.add(notice, now_s)

    # --- what is to be done -------------------------------------------------------------------------------------------

    def next_job(self, view: View | None) -> Job | None:
        """What the device does outside of the flow of microbatches: the last inner step, and encoding.

        Called while the device is idle and the miner takes no work; seals the log when nothing more comes into it.
        """
        local = self.local
        if local is None or self._changes_state:
            return None
        uploads = view is not None and view.is_in(Phase.UPLOAD, local.outer_step) and self._is_current(view)
        if not local.is_sealed:
            if uploads and local.num_accumulated:
                return self.inner_step()
            if uploads:
                self.commits.seal(local.num_stepped)
            self._oplog.close()
            local.is_sealed = True
        if uploads and local.num_stepped and local.objects is None:
            return EncodePseudoGradient(local.outer_step, adds_error=self._was_merged(view, local.outer_step - 1))
        return None

    def _was_merged(self, view: View | None, outer_step: int) -> bool:
        """Whether this miner's upload of the outer step before is in its merge, or may be in the next: the public rule
        for its error state."""
        manifest = None if view is None else view.manifest
        return manifest is not None and manifest.outer_step == outer_step and manifest.takes(self._hotkey)

    def inner_step(self) -> InnerStep:
        """The inner step over what is accumulated."""
        local = self.local
        assert local is not None and local.num_accumulated
        return InnerStep(
            inner_step_index=local.outer_step * self._spec.inner_steps + local.inner_steps,
            share=min(1.0, local.num_accumulated / self._spec.microbatches_per_step),
        )

    def advance(self, view: View, now_s: float, *, device_is_idle: bool) -> None:
        """Starts what is missing."""
        if device_is_idle and not self._changes_state and (self.local is None or self.local.is_sealed):
            self._follow(view, now_s)
        if self.local is not None and not self.local.is_sealed:
            self.commits.advance(self.local.num_stepped, now_s)
        self._fetch_merged(view, now_s)
        self._upload(view, now_s)
        self.reductions.advance(view, now_s)
        self._checkpoint(view, now_s)

    def wake_times_s(self) -> list[float]:
        """When things that failed may be tried again; times that have passed mean nothing."""
        backoffs = [self._load_backoff, self._checkpoint_backoff]
        if self._unmerged is not None:
            backoffs.append(self._unmerged.backoff)
        backoffs += [local.backoff for local in (self._late, self._contributing) if local is not None]
        times_s = [self.commits.wake_s(), *(backoff.until_s for backoff in backoffs)]
        return times_s + self.reductions.wake_times_s()

    def check_invariants(self, num_computing: int) -> None:
        local = self.local
        assert not (self._changes_state and num_computing), "the device computes while the engine's state changes"
        assert not self._changes_state or local is None or local.is_sealed, "the state changes within an outer step"
        if local is not None:
            assert self.anchor is not None, "an outer step without an anchor"
            assert local.num_accumulated <= self._spec.microbatches_per_step, "more accumulated than a batch"
            ahead = 0 if self._unmerged is None else 1
            assert local.outer_step == self.anchor.outer_step + ahead, "an outer step on another one's anchor"
        if self._unmerged is not None:
            assert self.anchor is not None and self._unmerged.outer_step == self.anchor.outer_step, (
                "merges another step"
            )
        for uploading in (self._late, self._contributing):
            if uploading is not None and uploading.is_uploading:
                assert self._reports.is_committed(uploading.outer_step), "uploads before committing"
        if self._late is not None and self.anchor is not None:
            assert self._late.outer_step < self.anchor.outer_step, "what is under way is late"
        self.reductions.check_invariants()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _is_current(self, view: View) -> bool:
        """Whether the anchor is the one that the stage's outer step starts from."""
        anchor = self.anchor
        return (
            anchor is not None
            and not self._is_void
            and anchor.stage_index == view.stage_index
            and anchor.outer_step == view.stage.outer_step
        )

    def _stand_at(self, anchor: Anchor, view: View | None, now_s: float) -> None:
        self._changes_state = False
        self._load_backoff = Backoff()
        left = self._contributing
        if left is not None and left.objects and left.outer_step < anchor.outer_step:
            self._late = left
        self.anchor = anchor
        self.local = self._unmerged = None
        self._tell_applied(anchor, view, now_s)

    @property
    def _contributing(self) -> LocalStep | None:
        """The local outer step that is uploaded, or will be next."""
        return self.local if self._unmerged is None else self._unmerged.local

    def _tell_applied(self, anchor: Anchor, view: View | None, now_s: float) -> None:
        merged = anchor.outer_step - 1
        if view is not None and view.stage_index == anchor.stage_index and view.is_in(Phase.MERGE, merged):
            self._notices.add(Applied(outer_step=merged, state_digest=anchor.digest), now_s)

    def _follow(self, view: View, now_s: float) -> None:
        """Brings the engine to the anchor that the stage is at, by the shortest way."""
        anchor, target = self.anchor, view.target_step
        is_sound = anchor is not None and not self._is_void and anchor.stage_index == view.stage_index
        if is_sound and anchor is not None and anchor.outer_step == target:
            return
        if not self._load_backoff.is_over(now_s):
            return
        self._changes_state = True
        manifest = view.manifest
        if is_sound and anchor is not None and manifest is not None and anchor.outer_step == manifest.outer_step:
            self._emit(ApplyManifest(manifest))
            return
        checkpoint = view.stage.checkpoint
        if checkpoint is not None and checkpoint.outer_step > target:
            checkpoint = None
        # What is agreed is the anchor of the stage's own outer step; a published manifest is already beyond it.
        agreed = view.stage.anchor_digest if target == view.stage.outer_step else None
        holders = () if agreed is None else view.holders(self._hotkey)
        self._emit(LoadAnchor(view.stage_index, target, checkpoint, agreed if holders else None, holders))

    def _fetch_merged(self, view: View, now_s: float) -> None:
        """Has what was merged brought beside the device, while that goes on with the next outer step."""
        unmerged, local, manifest = self._unmerged, self.local, view.manifest
        if unmerged is None or local is None or local.is_sealed or self._standing_step(view) is None:
            return
        if manifest is None or manifest.outer_step != unmerged.outer_step or unmerged.merged_digest is not None:
            return
        if not unmerged.is_fetching and unmerged.backoff.is_over(now_s):
            unmerged.is_fetching = True
            self._emit(FetchMerged(manifest))

    def _upload(self, view: View, now_s: float) -> None:
        """What is late first; but what this outer step's is, is told at once: later nobody may."""
        if self._late is not None and (self._late.is_uploaded or not self._late.is_awaited(view, self._hotkey)):
            self._late = None
        local = self._contributing
        if local is not None and not local.is_announced and self._may_upload(local, view):
            local.is_announced = True
            self._tell_contribution(local, now_s, is_stored=False)
        due = self._late or local
        if due is None or due.is_uploading or due.is_uploaded or not self._may_upload(due, view):
            return
        if due.is_announced and due.backoff.is_over(now_s):
            assert due.objects
            due.is_uploading = True
            self._emit(UploadPseudoGradient(due.outer_step, due.objects))

    def _may_upload(self, local: LocalStep, view: View) -> bool:
        if not local.objects or not self._reports.is_committed(local.outer_step):
            return False
        return local.is_awaited(view, self._hotkey)

    def _tell_contribution(self, local: LocalStep, now_s: float, *, is_stored: bool) -> None:
        assert local.objects is not None
        contribution = Contribution(
            hotkey=self._hotkey,
            num_microbatches=local.num_stepped,
            objects=local.objects,
            error_digest=local.error_digest,
        )
        uploaded = Uploaded(outer_step=local.outer_step, contribution=contribution, is_stored=is_stored)
        self._notices.add(uploaded, now_s)

    def _checkpoint(self, view: View, now_s: float) -> None:
        anchor = self.anchor
        if view.stage.checkpoint_by != self._hotkey or self._checkpoint_under_way or self._changes_state:
            return
        if anchor is None or self._is_void or anchor.stage_index != view.stage_index:
            return
        newest = -1 if view.stage.checkpoint is None else view.stage.checkpoint.outer_step
        if anchor.outer_step != view.target_step or anchor.outer_step <= max(newest, self._checkpoint_done):
            return
        if self._checkpoint_backoff.is_over(now_s):
            self._checkpoint_under_way = True
            self._emit(UploadCheckpoint(anchor.stage_index, anchor.outer_step))
