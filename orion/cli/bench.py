"""`orion bench`: one subcommand for each benchmark.

Parses, and hands over to the module that measures. That module is imported only once its benchmark is asked for.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of standard output.")]

bench_app = typer.Typer(help="Measures what docs/RESULTS.md reports.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measures what docs/RESULTS.md reports."""


@bench_app.command()
def clasp(
    trials: Annotated[int, typer.Option(min=1, max=10_000, help="Trials of each setting.")] = 200,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """How surely CLASP finds miners that raise their paths' losses, and how often it accuses others."""
    from orion.bench.clasp_study import format_row, run_study, study_report

    rows = run_study(trials, seed)
    if as_json:
        print(json.dumps(study_report(rows, seed)))
        return
    for row in rows:
        print(format_row(row))


@bench_app.command()
def suspicion(
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Simulated swarms for each attack.")] = 4,
    as_json: Json = False,
) -> None:
    """How much earlier suspicion has attackers checked than turns alone would."""
    from orion.bench.suspicion_study import ATTACKS, format_row, suspicion_report, suspicion_row

    rows = []
    for attack in ATTACKS:
        rows.append(suspicion_row(attack, range(seeds)))
        if not as_json:
            print(format_row(rows[-1]))
    if as_json:
        print(json.dumps(suspicion_report(rows, seeds)))


@bench_app.command(name="split-machine")
def split_machine(
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Worlds of each setting.")] = 4,
    as_json: Json = False,
) -> None:
    """What one machine earns under several hotkeys, in pipelines of queues with production's routing."""
    from orion.bench.split_machine import SETTINGS, format_split_row, split_report, split_row

    rows = []
    for setting in SETTINGS:
        rows.append(split_row(setting, range(seeds)))
        if not as_json:
            print(format_split_row(rows[-1]))
    if as_json:
        print(json.dumps(split_report(rows, seeds)))


@bench_app.command()
def monitor(as_json: Json = False) -> None:
    """What watching its boundaries costs a miner for each tensor that it is sent."""
    from orion.bench.monitor_cost import monitor_costs
    from orion.common.clock import SystemClock

    costs = monitor_costs(SystemClock())
    if as_json:
        print(json.dumps({"costs": [asdict(cost) for cost in costs]}))
        return
    for cost in costs:
        shape = " × ".join(map(str, cost.shape))
        print(
            f"{shape} {cost.dtype}, {cost.size_bytes} bytes: {cost.median_ms:.2f} ms (p90 {cost.ninth_decile_ms:.2f})"
        )


@bench_app.command()
def archive(
    folder: Annotated[Path, typer.Option(help="On the disk that is meant; 700 MB are written there and removed.")],
    as_json: Json = False,
) -> None:
    """What keeping logs and tensors for validators costs a miner."""
    from orion.bench.archive_cost import archive_cost
    from orion.common.clock import SystemClock

    cost = archive_cost(folder, SystemClock())
    if as_json:
        print(json.dumps(asdict(cost)))
        return
    print(f"bodies of {cost.body_bytes} bytes: {cost.add_us:.0f} µs of the device's thread for an operation")
    print(f"{cost.persist_s:.2f} s for a commitment over {cost.persist_bytes / 1e6:.0f} MB")
    print(f"{cost.open_s:.2f} s to find {cost.open_bytes / 1e6:.0f} MB again; {cost.entry_us:.0f} µs a log entry")


@bench_app.command()
def routing(
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Worlds; every rule runs through each.")] = 20,
    activations: Annotated[int, typer.Option(min=1, max=100_000, help="Of an epoch; five epochs a world.")] = 500,
    as_json: Json = False,
) -> None:
    """How long routing rules take through simulated worlds of miners that come and go. Exits 1 when a bar does not
    hold."""
    from orion.bench.routing.study import format_world, routing_study

    on_world = None if as_json else lambda times: print(format_world(times), flush=True)
    study = routing_study(range(seeds), activations, on_world)
    for line in study.summary():
        print(line, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(study.as_json()))
    if study.faults():
        raise typer.Exit(1)


@bench_app.command()
def simulator(
    stages: Annotated[int, typer.Option(min=1, max=64, help="Pipeline stages.")] = 3,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Miners per stage.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Runs of three outer steps.")] = 5,
    as_json: Json = False,
) -> None:
    """What simulating a swarm costs."""
    from orion.bench.simulator_cost import simulator_cost

    cost = simulator_cost(stages, replicas, repetitions)
    if as_json:
        print(json.dumps(asdict(cost)))
        return
    print(
        f"{stages} stages × {replicas} replicas: {cost.cpu_s_per_outer_step:.2f} s of processor time for an outer step "
        f"({cost.cpu_s_per_outer_step_least:.2f} to {cost.cpu_s_per_outer_step_most:.2f}), "
        f"{cost.virtual_s_per_cpu_s:.0f} virtual seconds in one"
    )


@bench_app.command()
def engine(
    repetitions: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each way.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model; says nothing about cost.")] = False,
    as_json: Json = False,
) -> None:
    """What a stage costs the device's thread, beside plain PyTorch."""
    from orion.bench.engine_cost import Workload, engine_costs

    workload = Workload.quick() if quick else Workload.usual()
    costs = engine_costs(workload, repetitions)
    if as_json:
        print(json.dumps({"workload": workload.as_json(), "stages": [asdict(cost) for cost in costs]}))
        return
    for cost in costs:
        for way in cost.ways:
            print(
                f"stage {cost.stage}, {way.way:>11}: forward {way.forward_ms:7.1f} ms, "
                f"backward {way.backward_ms:7.1f}, inner step {way.step_ms:6.1f}; ratio {way.ratio:.3f} "
                f"({way.ratio_quarter:.3f} to {way.ratio_three_quarters:.3f})"
            )


@bench_app.command()
def adversaries(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="A few attacks, each made by one miner.")] = False,
    seed: Annotated[int, typer.Option(help="Of the simulated swarms.", min=0)] = 1,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="So many of them from --seed on; figures are means.")] = 1,
    attack: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
    replay_s: Annotated[
        float, typer.Option(min=0.0, max=60.0, help="Virtual seconds that a validator's replay takes.")
    ] = 0.02,
    processes: Annotated[int, typer.Option(min=1, max=256, help="That share the trials.")] = 1,
    as_json: Json = False,
) -> None:
    """What attackers earn, when they are found, and what they do to the loss. Exits 1 when a bar does not hold."""
    from orion.cli.adversary_table import print_end, printer
    from orion.simulator.adversaries.catalogue import ATTACKS
    from orion.simulator.adversaries.table import Setting, measure

    unknown = set(attack or ()) - {each.name for each in ATTACKS}
    if unknown:
        known = ", ".join(each.name for each in ATTACKS)
        raise typer.BadParameter(f"no attack is called {', '.join(sorted(unknown))}; there are {known}")
    seed_range = range(seed, seed + seeds)
    on_trial = printer(is_quiet=as_json)
    setting = Setting(replay_s=replay_s)
    table = measure(
        seed_range, quick=quick, only=attack or (), num_processes=processes, setting=setting, on_trial=on_trial
    )
    print_end(table, is_quiet=as_json)
    if as_json:
        print(json.dumps(table.as_json()))
    if table.faults():
        raise typer.Exit(1)


@bench_app.command()
def churn(
    *,
    blows: Annotated[int, typer.Option(min=3, max=1000, help="Miners that are killed, stopped or cut off.")] = 6,
    every_s: Annotated[float, typer.Option(min=2.0, help="Seconds between two of them.")] = 20.0,
    sync: Annotated[str, typer.Option(help="Of the run: blocking or overlapped.")] = "blocking",
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Stretches that the blows are spread over.")] = 2,
    undisturbed_s: Annotated[float, typer.Option(min=5.0, help="Seconds of each calm stretch around them.")] = 30.0,
    data: Annotated[Path, typer.Option(help="Folder for prepared data.")] = Path(".orion/data"),
    seed: Annotated[int, typer.Option(min=0, help="Of who is struck.")] = 0,
    as_json: Json = False,
) -> None:
    """What losing a miner again and again costs a swarm of real processes. Exits 1 when a bar does not hold."""
    import asyncio
    import os

    from orion.bench.churn.study import Settings, run_study
    from orion.common.clock import SystemClock

    settings = Settings(
        num_blows=blows, every_s=every_s, num_rounds=rounds, undisturbed_s=undisturbed_s, sync=sync, seed=seed
    )
    tell = partial(typer.echo, err=True)
    figures = asyncio.run(run_study(settings, data, SystemClock(), dict(os.environ), tell))
    faults = figures.faults()
    if as_json:
        print(json.dumps(figures.as_json() | {"settings": asdict(settings), "faults": faults}))
    else:
        for name, value in figures.as_json().items():
            print(f"{name}: {value}")
        for fault in faults:
            print(fault)
    if faults:
        raise typer.Exit(1)


@bench_app.command()
def replay_noise(
    *,
    preset: Annotated[str, typer.Option(help="Model.")] = "local",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Outer steps that are repeated.")] = 3,
    inner_steps: Annotated[int, typer.Option(min=2, max=1000, help="Of each outer step.")] = 6,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens.")] = 64,
    sequences: Annotated[int, typer.Option(min=1, help="In a microbatch.")] = 4,
    as_json: Json = False,
) -> None:
    """How far honest replays lie from what a miner did, and how far the smallest useful cheats do."""
    from dataclasses import asdict

    import torch

    from orion.bench.replay_noise import format_row, measure, noise_spec, validators_of

    spec = noise_spec(
        preset, inner_steps=inner_steps, sequence_length=sequence_length, sequences_per_microbatch=sequences
    )
    rows = measure(spec, seeds, validators_of(with_cuda=torch.cuda.is_available()))
    if as_json:
        settings = {"preset": preset, "seeds": seeds, "inner_steps": inner_steps, "torch": torch.__version__}
        print(json.dumps({**settings, "rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        print(format_row(row))


@bench_app.command()
def pipeline(
    *,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Of everything, in turn.")] = 3,
    settings: Annotated[
        str, typer.Option(help="Names with commas; empty = unshaped,856,100,20,856_rtt60,20_rtt60.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="A toy model, unshaped, once: no bar is held against it.")
    ] = False,
    staleness_max: Annotated[
        int | None, typer.Option(min=0, max=64, help="Inner steps that Orion's gradients may come late; 0 = none.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where data is kept.", envvar="ORION_FOLDER")] = Path(".orion"),
    as_json: Json = False,
) -> None:
    """Orion's pipeline beside one process and torch's 1F1B, over emulated links (root). Exits 1 below the bar, and when
    it is broken off, after telling what was measured until then."""
    from orion.bench.pipeline.drive import PipelineBench
    from orion.bench.pipeline.plan import UNSHAPED, workload
    from orion.bench.pipeline.table import Study
    from orion.cli.pipeline_table import ending_like_ctrl_c, print_measurement, print_table, settings_named
    from orion.common.clock import SystemClock

    wanted = (UNSHAPED,) if quick else settings_named(settings)
    work = workload(quick=quick, staleness_max=staleness_max)
    bench = PipelineBench(work, folder.absolute() / "data", SystemClock(), dict(os.environ))
    study = Study(work, wanted, 1 if quick else repetitions)
    try:
        with ending_like_ctrl_c(), contextlib.suppress(KeyboardInterrupt), bench:
            study.run(bench, print_measurement)
    finally:
        table = study.table()
        if as_json:
            print(json.dumps(table.as_json()))
        else:
            print_table(table)
    if not table.is_whole or (table.misses() and not quick):
        raise typer.Exit(1)


@bench_app.command()
def transport(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Few activations: no bar is held against it.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="Of each way, taking turns.")] = 9,
    as_json: Json = False,
) -> None:
    """How fast signed, checked activations move between two processes. Exits 1 when a bar does not hold."""
    from orion.bench.transport.study import measure
    from orion.common.clock import SystemClock

    study = measure(SystemClock(), 1 if quick else repetitions, 8 if quick else 200)
    report = study.as_json()
    if as_json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")
    if study.faults() and not quick:
        raise typer.Exit(1)


@bench_app.command()
def overlap(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model: no bar is held against it.")] = False,
    outer_steps: Annotated[int, typer.Option(min=2, max=1000, help="Of each mode's run.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each mode, with seeds 1, 2, …")] = 3,
    up_mbyte: Annotated[
        float | None, typer.Option(min=0.01, help="Megabytes a second that a miner sends; as the workload says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How idle devices are, and what the loss is, with merging that blocks, that is overlapped, and with less to send.

    A simulated swarm: real tensors, virtual time. Exits 1 when a bar does not hold.
    """
    from orion.bench.overlap_study import Workload, format_result, overlap_study, with_links

    workload = Workload.quick() if quick else Workload.usual(outer_steps)
    if up_mbyte is not None:
        workload = with_links(workload, up_mbyte * 1e6)
    study = overlap_study(
        workload,
        range(1, 1 + (1 if quick else seeds)),
        lambda result: print(format_result(result), file=sys.stderr if as_json else sys.stdout, flush=True),
    )
    if as_json:
        print(json.dumps(study.as_json()))
    else:
        print(f"merging takes {study.merging_share:.1%} of the blocking run")
        for mode in study.modes[1:]:
            print(f"{mode}: loss ÷ blocking's {', '.join(f'{ratio:.4f}' for ratio in study.loss_ratios(mode))}")
        for fault in study.faults():
            print(fault)
    if study.faults() and not quick:
        raise typer.Exit(1)


@bench_app.command()
def sync(
    *,
    settings: Annotated[str, typer.Option(help="Names with commas (unshaped,856,100); empty = all.")] = "",
    faults: Annotated[str, typer.Option(help="With commas (none,slow,killed_upload, …); empty = all.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=12, help="Outer steps that are timed in each setting.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small stage, unshaped, one outer step: no bar is held against it.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where data is kept.", envvar="ORION_FOLDER")] = Path(".orion"),
    hivemind_python: Annotated[
        Path | None, typer.Option(help="An interpreter that has hivemind, to measure its averager beside.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What an outer step's synchronisation takes, beside the links' floor and gloo (root). Exits 1 below the bar."""
    from orion.bench.sync.drive import SyncBench, memory_folder
    from orion.bench.sync.plan import SETTINGS, UNSHAPED, misses, sync_spec
    from orion.cli.sync_table import format_row, report
    from orion.common.clock import SystemClock

    names, wanted_faults = [item.split(",") if item else [] for item in (settings, faults)]
    wanted = [
        setting
        for setting in SETTINGS
        if (not names or setting.name in names) and (not wanted_faults or setting.fault in wanted_faults)
    ]
    bench = SyncBench(
        sync_spec(quick=quick),
        folder.absolute() / "data",
        SystemClock(),
        dict(os.environ),
        num_timed=1 if quick else steps,
        scratch=memory_folder(),
        hivemind=hivemind_python,
    )
    rows = []
    with bench:
        for setting in (UNSHAPED,) if quick else wanted:
            rows.append(bench.measure(setting))
            print(format_row(rows[-1]), file=sys.stderr if as_json else sys.stdout, flush=True)
    missed = misses(rows, bench.spec.time_limits.transfer_grace_s, bench.stage_bytes)
    for line in missed:
        print(line, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(report(rows, bench)))
    if missed and not quick:
        raise typer.Exit(1)
