"""`orion up`: a whole swarm on this machine, from nothing to a trained model that has checked itself."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from orion.cli.audit import audit_run
from orion.cli.chain_access import open_chain
from orion.cli.live_view import SwarmView, with_names
from orion.cli.local_subnet import after_next_epoch, weights_by_hotkey
from orion.cli.local_swarm import LocalSwarm, SwarmPaths, SwarmStartError, make_keys
from orion.cli.loss_plot import save_loss_plot
from orion.cli.merged_model import evaluate, fetch_trained, heldout_loss, merged_model, save_merged_model
from orion.cli.outcome import SwarmOutcome, loss_ends, problems
from orion.cli.progress import ProgressTracker, run_flops_per_token, run_microbatches
from orion.cli.resolve import resolve
from orion.cli.resume_source import find_checkpoint
from orion.cli.single_process import train_single_process
from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, TransportError
from orion.common.ids import Hotkey
from orion.common.ledger.scoring import scores
from orion.common.net.checkpoint_folder import CheckpointFiles, write_checkpoint
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.net.s3_address import below
from orion.common.protocol.records import (
    Ledger,
    LossPoint,
    RunStatus,
)
from orion.common.protocol.signing import hotkey_of
from orion.common.protocol.start import continued
from orion.common.train.data import TokenDataset, prepare

POLL_S = 0.5
VALIDATOR_GRACE_S = 60.0
"""What the validator gets after the run's end for its last check and its last weights."""
UNREACHABLE_S_MAX = 60.0
"""Silence of the orchestrator after which the run is given up."""


Report = Callable[[SwarmOutcome, list[str]], None]
"""Shows the outcome, and every reason for which it is not good."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line says."""

    run_file: Path | None
    """None: the run that left the checkpoint."""
    overrides: dict[str, Any]
    folder: Path
    port: int
    device: str
    compare: bool
    keep: bool
    source: Path | None = None
    """The checkpoint to go on from."""
    store: str | None = None
    """Address of an object store on S3; the run gets a prefix of its own below it."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What the orchestrator and the chain say at the end."""

    status: RunStatus
    losses: tuple[LossPoint, ...]
    ledger: Ledger
    chain_weights: dict[Hotkey, float]
    """That the validator has set."""
    incentives: dict[Hotkey, float]
    """After an epoch with these weights."""
    differences: tuple[str, ...]
    """What does not follow from the signed ledger."""


async def up(options: UpOptions, console: Console, clock: Clock, environment: dict[str, str], report: Report) -> bool:
    """Runs the swarm to its end and reports it; returns whether it is good. With `keep` it goes on serving after the
    report, until it is cancelled.

    Raises ConfigError and DataError before anything is started, SwarmStartError when a process does not come up.
    """
    if options.compare and options.keep:
        raise ConfigError("--compare needs the machine for itself, and --keep goes on serving: choose one of them")
    if options.compare and options.source is not None:
        raise ConfigError("--compare trains from the very beginning, and --from does not: choose one of them")
    found = None if options.source is None else await asyncio.to_thread(find_checkpoint, options.source)
    spec = _wanted(options, found)
    paths = _paths(options, spec, clock)
    store = None if options.store is None else below(options.store, paths.run.name)
    paths.make()
    console.print("preparing the data …", highlight=False)
    index = await asyncio.to_thread(prepare, spec.data, paths.data)
    spec = resolve(spec, index)
    if found is not None:
        spec = continued(spec, found.spec, found.checkpoint)
        console.print(f"going on from outer step {found.checkpoint.outer_step}", highlight=False)
    await asyncio.to_thread(paths.run_file.write_text, json.dumps(spec.model_dump(mode="json"), indent=1))
    keys = await asyncio.to_thread(make_keys, paths.wallets, spec.num_stages * spec.replicas)
    swarm = LocalSwarm(
        spec,
        paths,
        keys,
        port=options.port,
        device=options.device,
        clock=clock,
        environment=environment,
        source=options.source,
        store=store,
    )
    try:
        console.print(f"starting {len(keys.miners) + 3} processes; logs in {paths.logs}", highlight=False)
        await swarm.start()
        finished, seconds = await _watch(swarm, spec, console, clock)
        outcome, dataset = await _conclude(swarm, spec, paths, finished, seconds)
        if options.keep:
            is_good = _report(spec, finished, outcome, report)
            await _serve_until_cancelled(swarm, console)
            return is_good
    finally:
        await asyncio.to_thread(swarm.stop)
    if options.compare:
        outcome = await asyncio.to_thread(
            _compared, outcome, finished, spec=spec, dataset=dataset, console=console, clock=clock
        )
    return _report(spec, finished, outcome, report)


def _wanted(options: UpOptions, found: CheckpointFiles | None) -> RunSpec:
    """The run that is asked for, its data not pinned yet."""
    if options.run_file is not None:
        return RunSpec.load(options.run_file, options.overrides)
    if found is None:
        raise ConfigError("name a run file, or a checkpoint to go on from")
    return found.spec.with_values({**options.overrides, "start": None})


def _report(spec: RunSpec, finished: FinishedRun, outcome: SwarmOutcome, report: Report) -> bool:
    _draw(spec, finished, outcome)
    found = [*problems(outcome, finished.status), *finished.differences]
    report(outcome, found)
    return not found


async def _serve_until_cancelled(swarm: LocalSwarm, console: Console) -> None:
    """Ctrl-C and SIGTERM arrive as a cancellation; here it is how things are meant to end."""
    console.print(f"still serving at {swarm.url} (Ctrl-C ends it); the chain, with the SDK's own tool:")
    for command in swarm.btcli_commands():
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    task = asyncio.current_task()
    assert task is not None
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        task.uncancel()


def _paths(options: UpOptions, spec: RunSpec, clock: Clock) -> SwarmPaths:
    stamp = datetime.fromtimestamp(clock.now_s(), UTC).strftime("%Y%m%d-%H%M%S")
    folder = options.folder.absolute()
    return SwarmPaths(run=folder / "runs" / f"{spec.run_id}-{stamp}", data=folder / "data" / spec.data.folder_name())


async def _watch(swarm: LocalSwarm, spec: RunSpec, console: Console, clock: Clock) -> tuple[FinishedRun, float]:
    """Shows the run until it has ended; returns what it ended with, and its seconds from the first lease on."""
    tracker = ProgressTracker(run_microbatches(spec), spec.first_outer_step, run_flops_per_token(spec))
    reached_s = clock.monotonic_s()
    async with HttpClient() as http:
        with SwarmView(console, swarm.keys.names()) as view:
            while True:
                for line in swarm.notices():
                    view.say(line)
                try:
                    status = await OrchestratorClient.status(http, swarm.url)
                except TransportError as error:
                    if clock.monotonic_s() - reached_s > UNREACHABLE_S_MAX:
                        raise SwarmStartError(
                            f"the orchestrator has not answered for {UNREACHABLE_S_MAX:.0f} s: {error}"
                        ) from None
                else:
                    reached_s = clock.monotonic_s()
                    view.show(status, tracker.update(status))
                    if status.finished:
                        break
                if swarm.num_miners_alive() == 0:
                    raise SwarmStartError("every miner has died; their logs say why")
                await asyncio.sleep(POLL_S)
            seconds = status.now_s - (status.started_s or status.now_s)
            view.say("training is over; waiting for the validator's last weights, and for the epoch that they count in")
            await swarm.validator_ended(VALIDATOR_GRACE_S)
        return await _ask(swarm, http), seconds


async def _ask(swarm: LocalSwarm, http: HttpClient) -> FinishedRun:
    status = await OrchestratorClient.status(http, swarm.url)
    losses: list[LossPoint] = []
    while True:
        batch = await OrchestratorClient.losses(http, swarm.url, len(losses))
        losses.extend(batch.points)
        if len(losses) >= batch.total or not batch.points:
            break
    async with RpcClient(swarm.keys.owner, swarm.spec.digest) as rpc:
        client = OrchestratorClient(rpc, swarm.url, hotkey_of(swarm.keys.orchestrator))
        ledger = await client.ledger(0)
    async with open_chain(swarm.subnet) as chain:
        weights = await weights_by_hotkey(chain, hotkey_of(swarm.keys.validator))
        metagraph = await after_next_epoch(chain)
    incentives = {neuron.hotkey: neuron.incentive for neuron in metagraph.neurons if neuron.incentive > 0}
    report = await audit_run(swarm.url)
    differences = tuple(f"audit: {difference}" for difference in report.differences)
    return FinishedRun(status, tuple(losses), ledger, weights, incentives, differences)


async def _conclude(
    swarm: LocalSwarm, spec: RunSpec, paths: SwarmPaths, finished: FinishedRun, seconds: float
) -> tuple[SwarmOutcome, TokenDataset]:
    """Fetches the merged model, measures it, and puts everything together."""
    trained = await fetch_trained(spec, swarm.keys.owner, swarm.url, hotkey_of(swarm.keys.orchestrator))
    model = await asyncio.to_thread(merged_model, spec, trained.states)
    dataset = await asyncio.to_thread(TokenDataset.open, paths.data, spec.data_digest)
    evaluation = await asyncio.to_thread(evaluate, spec, model, dataset)
    checkpoint = paths.run / "checkpoint"
    await asyncio.to_thread(save_merged_model, checkpoint, spec, model, dataset)
    if trained.checkpoint is not None:
        await asyncio.to_thread(write_checkpoint, checkpoint, spec, trained.checkpoint, trained.bodies())
    status, names = finished.status, swarm.keys.names()
    ends = loss_ends([point.loss for point in finished.losses])

    def named(figures: Mapping[Hotkey, float]) -> dict[str, float]:
        return {names.get(hotkey, hotkey): figure for hotkey, figure in figures.items()}

    outcome = SwarmOutcome(
        run_id=spec.run_id,
        tokens=status.tokens,
        tokens_per_s=status.tokens / seconds if seconds else 0.0,
        tokens_per_s_single_process=None,
        loss_first=ends.first,
        loss_last=ends.last,
        heldout_loss=evaluation.heldout_loss,
        heldout_loss_untrained=evaluation.heldout_loss_untrained,
        heldout_loss_single_process=None,
        outer_steps=status.outer_step,
        first_outer_step=spec.first_outer_step,
        anchors_equal=status.anchors_equal,
        microbatches_started=status.microbatches_started,
        microbatches_applied=status.microbatches_applied,
        microbatches_cancelled=status.microbatches_cancelled,
        microbatches_repaired=status.microbatches_repaired,
        checks=status.num_checks,
        verdicts_failed=status.num_verdicts_failed,
        scores=named(scores(finished.ledger, spec)),
        chain_weights=named(finished.chain_weights),
        incentives=named(finished.incentives),
        checkpoint=str(checkpoint),
        plot=str(paths.run / "loss.png"),
        seconds=seconds,
        notices=[with_names(notice, names) for notice in status.notices],
        sample=evaluation.sample,
    )
    return outcome, dataset


def _compared(
    outcome: SwarmOutcome,
    finished: FinishedRun,
    *,
    spec: RunSpec,
    dataset: TokenDataset,
    console: Console,
    clock: Clock,
) -> SwarmOutcome:
    """The outcome beside plain training on the same tokens, with as many optimizer steps as a miner took."""
    num_steps = finished.status.outer_step * spec.inner_steps
    microbatches_per_step = max(1, round(finished.status.microbatches_applied / num_steps))
    console.print("training the same model on the same tokens in one process …", highlight=False)
    single = train_single_process(
        spec,
        dataset,
        microbatches_per_step=microbatches_per_step,
        num_steps=num_steps,
        clock=clock,
        threads=torch.get_num_threads(),
    )
    return outcome.model_copy(
        update={
            "tokens_per_s_single_process": single.tokens_per_s,
            "heldout_loss_single_process": heldout_loss(single.model, dataset),
        }
    )


def _draw(spec: RunSpec, finished: FinishedRun, outcome: SwarmOutcome) -> None:
    levels = {"held-out, merged model": outcome.heldout_loss}
    if outcome.heldout_loss_single_process is not None:
        levels["held-out, one process"] = outcome.heldout_loss_single_process
    save_loss_plot(
        Path(outcome.plot),
        finished.losses,
        tokens_per_microbatch=spec.tokens_per_microbatch,
        title=f"{spec.run_id}: {spec.num_stages} stages × {spec.replicas} replicas, {outcome.tokens:,} tokens",
        levels=levels,
    )
