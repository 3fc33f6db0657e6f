"""What the page shows follows from the run's state and from what was handled, in bounded lists."""

import json
import random
from functools import partial

import pytest
from dashboard_story import WHY, Recording, states, tell_story
from orchestrator_world import World, make_spec

from orion.common.clock import SystemClock
from orion.common.ids import Hotkey, MemberState
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.dashboard import trust, view
from orion.orchestrator.dashboard.chronicle import LINES_KEPT, STEPS_KEPT, Level, Part
from orion.orchestrator.dashboard.live import SECTIONS, LivePage
from orion.orchestrator.dashboard.page import Head, Page, Timeline
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.journal import Header, MemoryJournal
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.replay import replay


@pytest.fixture(scope="module")
def story() -> Recording:
    return tell_story()


def watched(story: Recording, num_records: int | None = None) -> RunWatch:
    core = story.core()
    watch = RunWatch(core)
    for record in story.records[:num_records]:
        watch.handled(record.event, core.handle(record.event, record.now_s))
    return watch


def head(watch: RunWatch) -> Head:
    return watch.core.look(partial(view.head, watch=watch))


def timeline(watch: RunWatch) -> Timeline:
    return watch.core.look(partial(view.timeline, watch=watch))


def test_figures_are_those_of_the_status(story: Recording) -> None:
    watch = watched(story)
    now_s = story.records[-1].now_s
    status, shown = watch.core.status(now_s), head(watch)
    assert (shown.tokens, shown.applied, shown.started) == (
        status.tokens,
        status.microbatches_applied,
        status.microbatches_started,
    )
    assert (shown.num_checks, shown.num_failed) == (status.num_checks, status.num_verdicts_failed)
    assert shown.anchors_equal and shown.outer_step == status.outer_step
    newest = [point.loss for point in status.recent_losses[-view.LOSSES_AVERAGED :]]
    assert shown.loss == pytest.approx(sum(newest) / len(newest), rel=1e-3)


def test_compute_is_what_was_applied_and_shares_of_a_peak_only_where_it_is_known(story: Recording) -> None:
    watch = watched(story)
    shown, first, last = head(watch), watch.recent[0], watch.recent[-1]
    rate = (last.applied - first.applied) / (last.time_s - first.time_s)
    flops = sum(watch.core.look(lambda state: [figures.microbatch_flops for figures in state.figures]))
    assert shown.flops_per_s == pytest.approx(rate * flops, rel=1e-3) and rate > 0
    assert shown.mfu is not None and 0 < shown.num_peaks < shown.num_active, "some say that they are CPUs"
    cells = [
        cell for column in watch.core.look(partial(view.pipeline_map, watch=watch)).stages for cell in column.miners
    ]
    assert all((cell.mfu is None) == (cell.device == "cpu" or cell.flops_per_s is None) for cell in cells)


def test_every_miner_has_the_health_that_the_core_gives_it(story: Recording) -> None:
    watch = watched(story)
    shown = watch.core.look(partial(view.pipeline_map, watch=watch))
    health = {cell.hotkey: cell.health for column in shown.stages for cell in column.miners}
    assert health.keys() == states(watch.core).keys()
    assert health.pop(story.silent) == "gone" and health.pop(story.liar) == "barred"
    assert set(health.values()) == {"good"}
    assert states(watch.core)[story.silent] is MemberState.GONE


def test_the_flow_is_that_of_the_newest_trips(story: Recording) -> None:
    shown = watched(story).core.look(partial(view.pipeline_map, watch=watched(story)))
    stage_of = {cell.hotkey: column.stage_index for column in shown.stages for cell in column.miners}
    for boundary in range(story.spec.num_stages - 1):
        crossing = [edge for edge in shown.edges if stage_of[edge.source] == boundary]
        assert all(stage_of[edge.target] == boundary + 1 for edge in crossing)
        assert sum(edge.share for edge in crossing) == pytest.approx(1.0, abs=0.01)


def test_phases_follow_each_other_and_the_slow_upload_stands_out(story: Recording) -> None:
    rows = timeline(watched(story)).rows
    assert {row.stage_index for row in rows} == set(range(story.spec.num_stages))
    for row in rows:
        ends = [span.end_s for span in row.spans[:-1]]
        assert ends == [span.begin_s for span in row.spans[1:]], "no gap and no overlap"
        if row.spans[-1].end_s is not None:
            parts = [span.part for span in row.spans if span.part is not Part.WAIT]
            assert parts == [Part.TRAIN, Part.UPLOAD, Part.REDUCE, Part.APPLY]
    slow = {bar.hotkey for row in rows for bar in row.miners if bar.is_straggler}
    assert slow == {story.straggler}
    took = [bar.upload_s for row in rows for bar in row.miners if bar.hotkey == story.straggler and bar.upload_s]
    assert took and took == pytest.approx([5.5] * len(took), abs=0.3)


def test_a_straggler_is_much_slower_than_its_like() -> None:
    a, b, c = (Hotkey(name) for name in "abc")
    assert view.stragglers({}) == set()
    assert view.stragglers({a: 9.0}) == set(), "there is nobody to compare it with"
    assert view.stragglers({a: 0.1, b: 0.9}) == set(), "less than a second longer"
    assert view.stragglers({a: 1.0, b: 1.1, c: 2.3}) == {c}


def test_replicas_that_differ_are_shown() -> None:
    world = World(make_spec())
    core = OrchestratorCore(world.spec, random.Random(7))
    twin = RunWatch(core)
    world.start()
    world.upload_all(world.train())
    world.reduce_all(0)
    first, second = world.members(0, "active")
    world.apply(first)
    world.apply(second, "something else")
    for now_s, event in world.events:
        twin.handled(event, core.handle(event, now_s))
    (found,) = core.look(partial(trust.trust, watch=twin, ranking=())).agreement
    assert (found.stage_index, found.outer_step, found.num_told, found.num_equal) == (0, 0, 2, 1)
    assert not head(twin).anchors_equal


def test_the_ranking_is_that_of_the_pay(story: Recording) -> None:
    watch = watched(story)
    ranking = watch.core.look(trust.rank)
    assert [row.rank for row in ranking] == list(range(1, len(ranking) + 1))
    for row in ranking:
        pay = watch.core.pay(row.hotkey)
        assert row.score == pytest.approx(pay.score, rel=1e-5)
        assert row.failed == (pay.paid_again_from is not None) and row.verified_step == pay.verified_outer_step
        if pay.counted_flops:
            assert row.waits == pytest.approx(pay.waiting_flops / pay.counted_flops, abs=1e-3)
    assert ranking[-1].hotkey == story.liar and ranking[-1].score == 0.0
    assert sum(row.share for row in ranking) == pytest.approx(1.0, abs=1e-3)


def test_the_log_gives_reasons(story: Recording) -> None:
    watch = watched(story)
    lines = view.log(watch).lines
    assert [line.number for line in lines] == list(range(len(lines)))
    (failed,) = [line for line in lines if line.level is Level.BAD]
    assert WHY in failed.text and failed.hotkey == story.liar
    assert [line for line in lines if "is gone: silent for" in line.text and story.silent in line.text]
    assert sum("joins stage" in line.text for line in lines) == 9
    status = watch.core.status(story.records[-1].now_s)
    assert [line.text for line in lines if line.level is Level.WARNING] == list(status.notices)


def test_a_restart_has_the_same_histories(story: Recording) -> None:
    journal = MemoryJournal(Header(story.spec.digest, b"s" * 32))
    journal.append(story.records)
    core = story.core()
    watch = RunWatch(core)
    replay(core, journal, MemoryLedger(story.spec.digest), watch)
    before = watched(story)
    assert timeline(watch) == timeline(before) and head(watch) == head(before)
    assert view.log(watch) == view.log(before)
    assert watch.core.look(partial(view.curves, watch=watch)) == before.core.look(partial(view.curves, watch=before))


def test_what_is_kept_and_shown_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    story = tell_story(num_stages=1, replicas=3, outer_steps=STEPS_KEPT + 4, inner_steps=1, microbatches_per_step=1)
    watch = watched(story)
    assert len(watch.chronicle.steps[0]) == STEPS_KEPT and len(watch.chronicle.lines) <= LINES_KEPT
    monkeypatch.setattr(view, "MINERS_SHOWN_MAX", 2)
    shown = watch.core.look(partial(view.pipeline_map, watch=watch))
    assert (len(shown.stages[0].miners), shown.stages[0].num_hidden) == (2, 1)
    assert all(len(row.miners) <= 2 for row in timeline(watch).rows)
    assert len(timeline(watch).rows) == view.STEPS_SHOWN


def test_the_whole_page_is_what_its_models_say(story: Recording) -> None:
    page = json.loads(LivePage(watched(story), SystemClock()).whole())
    assert set(page) == {"now_s", *SECTIONS}
    Page.model_validate(page)
    text = json.dumps(page)
    assert "http://" not in text, "nobody's address is shown"


def test_a_run_that_has_not_begun_has_a_page_too() -> None:
    core = OrchestratorCore(make_spec(), random.Random(7))
    page = Page.model_validate(json.loads(LivePage(RunWatch(core), SystemClock()).whole()))
    assert page.head.loss is None and page.head.busy is None and page.head.mfu is None
    assert page.curves.loss == () and page.timeline.rows == () and page.trust.ranking == ()


def test_in_an_overlapped_run_training_is_shown_beside_the_merge_before() -> None:
    rows = {(row.stage_index, row.outer_step): row for row in timeline(watched(tell_story(sync="overlapped"))).rows}
    spans = {key: {span.part: span for span in row.spans} for key, row in rows.items()}
    for stage_index in range(3):
        former, later = spans[stage_index, 1], spans[stage_index, 2]
        assert later[Part.TRAIN].begin_s == former[Part.TRAIN].end_s == former[Part.UPLOAD].begin_s
        assert later[Part.TRAIN].end_s == later[Part.UPLOAD].begin_s
