"""What Prometheus can read at `/metrics`. Names are part of the interface: dashboards and alerts use them.

- `orion_outer_step`, `orion_outer_steps`: the furthest stage behind, and the run's length.
- `orion_finished`: 1 once the run is over.
- `orion_stage_outer_step{stage}`, `orion_stage_phase{stage,phase}`: 1 for the phase that a stage is in.
- `orion_members{stage,state}`: miners by stage and state.
- `orion_microbatches_total{outcome}`: trips started, applied, cancelled.
- `orion_tokens_total`: tokens of applied microbatches.
- `orion_staleness{stage}`: a histogram of backward passes by the inner steps since their forward.
- `orion_loss`: the newest loss.
- `orion_anchors_equal`: 1 while all replicas agreed in every outer step.
- `orion_checks_total{passed}`: verdicts of validators.
- `orion_repairs_total{kind}`: microbatches that outlived a lost miner: rerouted, spliced, released.
- `orion_notices_total`: what went wrong or changed, as the status and the dashboard tell it.
- `orion_tokens_per_second`, `orion_flops_per_second`: of applied microbatches over the last 20 seconds.
- `orion_busy_share`: mean share of the time in which active miners' devices computed; left out while nobody has said.
- `orion_mfu`: achieved ÷ peak operations of the devices whose peak is known; left out when there is none.
- `orion_microbatches_in_flight`: trips under way.
- `orion_upload_seconds{stage,which}`: of the newest outer step that is through: the usual (`median`) and the slowest
  (`max`) miner's time from the upload phase's beginning until all was stored.
- `orion_dashboard_listeners`: browsers that are told of changes.
- `orion_queue_events`: events that wait to be decided.
- `orion_events_total`, `orion_journal_seconds`: events decided, and how long their commits took.
- `orion_snapshot_seconds`, `orion_snapshot_bytes`: how long snapshots of the state took, and how large the newest is
  before it is compressed. Nothing is decided meanwhile.
- `orion_requests_total{route,status}`, `orion_request_seconds{route}`: requests answered.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from orion.common.ids import MemberState, Phase
from orion.common.protocol.records import RunStatus
from orion.orchestrator.dashboard.live import LivePage

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STALENESS_BUCKETS = (0, 1, 2, 4, 8, 16, 32)


class LoopMetrics:
    """What the loop counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.events = Counter("orion_events", "Events decided", registry=registry)
        self.journal_seconds = Histogram(
            "orion_journal_seconds", "Time of a commit", registry=registry, buckets=_SECONDS_BUCKETS
        )
        self.snapshot_seconds = Histogram(
            "orion_snapshot_seconds", "Time of a snapshot", registry=registry, buckets=_SECONDS_BUCKETS
        )
        self.snapshot_bytes = Gauge("orion_snapshot_bytes", "Size of the newest snapshot", registry=registry)


class RequestMetrics:
    """What the API counts. Routes are patterns, never paths, so that nobody can make new series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("orion_requests", "Requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "orion_request_seconds", "Time to answer", ["route"], registry=registry, buckets=_SECONDS_BUCKETS
        )


class RunCollector(Collector):
    """Reads the run's status whenever somebody asks for the metrics."""

    def __init__(self, status: Callable[[], RunStatus], num_queued: Callable[[], int]) -> None:
        self._status = status
        self._num_queued = num_queued

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield _gauge("orion_outer_step", "Outer step of the stage furthest behind", status.outer_step)
        yield _gauge("orion_outer_steps", "Outer steps of the run", status.outer_steps)
        yield _gauge("orion_finished", "Whether the run is over", status.finished)
        yield _gauge("orion_anchors_equal", "Whether all replicas always agreed", status.anchors_equal)
        yield _gauge("orion_queue_events", "Events that wait to be decided", self._num_queued())
        if status.recent_losses:
            yield _gauge("orion_loss", "Newest loss", status.recent_losses[-1].loss)
        yield from self._by_stage(status)
        yield _staleness(status)
        microbatches = CounterMetricFamily("orion_microbatches", "Trips of microbatches", labels=["outcome"])
        microbatches.add_metric(["started"], status.microbatches_started)
        microbatches.add_metric(["applied"], status.microbatches_applied)
        microbatches.add_metric(["cancelled"], status.microbatches_cancelled)
        yield microbatches
        repairs = CounterMetricFamily("orion_repairs", "Microbatches that outlived a lost miner", labels=["kind"])
        for kind, number in status.microbatches_repaired:
            repairs.add_metric([kind], number)
        yield repairs
        yield CounterMetricFamily("orion_tokens", "Tokens of applied microbatches", value=status.tokens)
        checks = CounterMetricFamily("orion_checks", "Verdicts of validators", labels=["passed"])
        checks.add_metric(["true"], status.num_checks - status.num_verdicts_failed)
        checks.add_metric(["false"], status.num_verdicts_failed)
        yield checks

    def _by_stage(self, status: RunStatus) -> Iterator[Metric]:
        outer_steps = GaugeMetricFamily("orion_stage_outer_step", "Outer step of a stage", labels=["stage"])
        phases = GaugeMetricFamily("orion_stage_phase", "Phase of a stage", labels=["stage", "phase"])
        for stage in status.stages:
            outer_steps.add_metric([str(stage.stage_index)], stage.outer_step)
            for phase in Phase:
                phases.add_metric([str(stage.stage_index), phase.value], float(stage.phase is phase))
        yield outer_steps
        yield phases
        tally = Tally((miner.stage_index, miner.state) for miner in status.miners)
        members = GaugeMetricFamily("orion_members", "Miners", labels=["stage", "state"])
        for stage in status.stages:
            for state in MemberState:
                members.add_metric([str(stage.stage_index), state.value], tally[(stage.stage_index, state)])
        yield members


class WatchCollector(Collector):
    """Reads what the dashboard knows beside the status."""

    def __init__(self, page: LivePage) -> None:
        self._page = page

    def collect(self) -> Iterator[Metric]:
        head = self._page.head()
        yield _gauge("orion_tokens_per_second", "Tokens of applied microbatches, lately", head.tokens_per_s)
        yield _gauge("orion_flops_per_second", "Operations of applied microbatches, lately", head.flops_per_s)
        yield _gauge("orion_microbatches_in_flight", "Trips under way", head.in_flight)
        if head.busy is not None:
            yield _gauge("orion_busy_share", "Mean share of the time in which devices computed", head.busy)
        if head.mfu is not None:
            yield _gauge("orion_mfu", "Achieved share of the known devices' peak", head.mfu)
        yield CounterMetricFamily("orion_notices", "Things that went wrong or changed", value=self._page.num_notices)
        uploads = GaugeMetricFamily(
            "orion_upload_seconds", "Miners' uploads in the newest outer step", labels=["stage", "which"]
        )
        for stage_index, median_s, max_s in self._page.uploads():
            uploads.add_metric([str(stage_index), "median"], median_s)
            uploads.add_metric([str(stage_index), "max"], max_s)
        yield uploads
        yield _gauge("orion_dashboard_listeners", "Browsers that are told of changes", self._page.num_listeners)


def _staleness(status: RunStatus) -> HistogramMetricFamily:
    histogram = HistogramMetricFamily(
        "orion_staleness", "Inner steps between a microbatch's forward and its backward", labels=["stage"]
    )
    for stage, staleness in zip(status.stages, status.staleness, strict=False):
        counts = staleness.counts
        buckets = [(str(bound), float(sum(counts[: bound + 1]))) for bound in _STALENESS_BUCKETS]
        buckets.append(("+Inf", float(sum(counts))))
        histogram.add_metric([str(stage.stage_index)], buckets, sum(steps * num for steps, num in enumerate(counts)))
    return histogram


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
