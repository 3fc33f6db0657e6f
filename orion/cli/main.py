"""The `orion` command: parses, and hands over to the module that does the work.

Heavy libraries are imported after parsing, so that `--help` and mistakes answer at once. This package is the only place
that reads the environment; every role gets a config object.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from orion.cli.bench import bench_app
from orion.cli.compute_dtype import ComputeDtype
from orion.common.clock import SystemClock
from orion.common.errors import OrionError

app = typer.Typer(
    name="orion",
    help="Trains large language models over the open internet, one pipeline stage a GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")

ResultT = TypeVar("ResultT")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of standard output.")]
StopWithStdin = Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)]
Host = Annotated[str, typer.Option(help="Address to listen on.", envvar="ORION_HOST")]
WalletPath = Annotated[Path, typer.Option(help="Folder of the Bittensor wallets.", envvar="BT_WALLET_PATH")]
Wallet = Annotated[str, typer.Option(help="Wallet name.", envvar="BT_WALLET")]
HotkeyName = Annotated[
    str, typer.Option("--hotkey", help="Name of the hotkey in the wallet.", envvar="BT_WALLET_HOTKEY")
]
Network = Annotated[str, typer.Option(help="Chain: finney, test, local, or a ws:// URL.", envvar="BT_NETWORK")]
Netuid = Annotated[int, typer.Option(help="Number of the subnet.", min=0, max=65535, envvar="ORION_NETUID")]
Fallback = Annotated[
    list[str] | None, typer.Option(help="Another endpoint of the same chain, for when one is lost; repeatable.")
]
OrchestratorUrl = Annotated[
    str, typer.Option("--orchestrator", help="URL of the orchestrator.", envvar="ORION_ORCHESTRATOR")
]

JournalAddress = Annotated[
    str | None,
    typer.Option(
        "--journal",
        help="Where the journal is: postgresql://USER@HOST/NAME or sqlite:///PATH; without: in the state folder.",
        envvar="ORION_JOURNAL",
    ),
]
StateFolder = Annotated[Path, typer.Option(help="The orchestrator's state folder.")]
Store = Annotated[
    str | None,
    typer.Option(
        help="Object store on S3: s3://BUCKET/PREFIX?endpoint=URL&region=NAME; else a folder.", envvar="ORION_STORE"
    ),
]
DataFolder = Annotated[Path, typer.Option("--data", help="Folder of the prepared data; fetched when it is empty.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto = cuda where there is one.")]
Threads = Annotated[int, typer.Option(help="CPU threads to compute with.", min=1)]

GoOnFrom = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Go on from a checkpoint: the folder `checkpoint` of a run, or an orchestrator's state folder, whose "
        "objects may lie on S3.",
    ),
]
DEFAULT_RUN = Path("runs/local.toml")
DEFAULT_FOLDER = Path(".orion")
DEFAULT_WALLETS = Path("~/.bittensor/wallets")


def main() -> None:
    """Entry point: every expected error becomes one line on standard error and exit code 1."""
    try:
        app()
    except OrionError as error:
        print(f"orion: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def up(
    run_file: Annotated[
        Path | None, typer.Argument(help="The run, a TOML file; runs/local.toml, or with --from the run that left it.")
    ] = None,
    source: GoOnFrom = None,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages.", min=1)] = None,
    replicas: Annotated[int | None, typer.Option(help="Miners per stage.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Outer steps.", min=1)] = None,
    minutes: Annotated[
        float | None, typer.Option(help="End after the outer step during which this passes.", min=0.05)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model preset instead of the run's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto = cuda where there is one.")] = "auto",
    port: Annotated[int, typer.Option(help="Port of the orchestrator; 0 = any free one.", min=0, max=65535)] = 0,
    folder: Annotated[Path, typer.Option(help="Where data and runs are kept.", envvar="ORION_FOLDER")] = DEFAULT_FOLDER,
    compare: Annotated[bool, typer.Option("--compare", help="Train the same model in one process afterwards.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving after the report, until Ctrl-C.")] = False,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Trains a model through a whole swarm on this machine, and checks the result."""
    from rich.console import Console

    from orion.cli.outcome import SwarmOutcome
    from orion.cli.resolve import tokenizer_for
    from orion.cli.summary import print_summary
    from orion.cli.up import UpOptions
    from orion.cli.up import up as run_swarm

    if run_file is None and source is None:
        run_file = DEFAULT_RUN
    wanted = {
        "num_stages": stages,
        "replicas": replicas,
        "outer_steps": steps,
        "time_limits.run_s": None if minutes is None else minutes * 60,
        "model": None if model is None else {"preset": model},
        "data.tokenizer": None if model is None or run_file is None else tokenizer_for(run_file, model),
    }
    overrides = {key: value for key, value in wanted.items() if value is not None}
    console = Console(stderr=as_json)
    # The SDK keeps every chain's metadata in the home folder; those of chains that live for one run don't belong there.
    os.environ.setdefault("BITTENSOR_RUNTIME_CACHE_DIR", str(folder.absolute() / "chain-metadata"))
    options = UpOptions(
        run_file,
        overrides,
        folder,
        port=port,
        device=device,
        compare=compare,
        keep=keep,
        source=source,
        store=store,
    )

    def report(outcome: SwarmOutcome, found: list[str]) -> None:
        print_summary(console, outcome, found)
        if as_json:
            print(outcome.model_dump_json(), flush=True)

    if not _run(run_swarm(options, console, SystemClock(), dict(os.environ), report)):
        raise typer.Exit(1)


@app.command()
def status(
    orchestrator: OrchestratorUrl,
    miner: Annotated[str | None, typer.Option(help="A miner's hotkey: shows what it is paid, and why.")] = None,
    netuid: Annotated[
        int | None, typer.Option(help="Subnet, for the miner's incentive.", min=0, max=65535, envvar="ORION_NETUID")
    ] = None,
    network: Network = "finney",
    as_json: Json = False,
) -> None:
    """Shows how a run is doing, or one of its miners."""
    from rich.console import Console

    if miner is not None:
        from orion.cli.chain_access import Subnet
        from orion.cli.miner_pay import fetch_pay, print_pay
        from orion.common.ids import Hotkey

        subnet = None if netuid is None else Subnet(network, netuid)
        pay, incentive = _run(fetch_pay(orchestrator.rstrip("/"), Hotkey(miner), subnet))
        if as_json:
            print(json.dumps(pay.model_dump(mode="json") | {"incentive": incentive}))
        else:
            print_pay(Console(width=None if sys.stdout.isatty() else 140), pay, incentive)
        return
    from orion.cli.live_view import picture
    from orion.cli.progress import ProgressTracker, run_flops_per_token, run_microbatches
    from orion.cli.remote import fetch_run

    spec, run_status = _run(fetch_run(orchestrator.rstrip("/")))
    if as_json:
        print(run_status.model_dump_json())
        return
    progress = ProgressTracker(run_microbatches(spec), spec.first_outer_step, run_flops_per_token(spec)).update(
        run_status
    )
    Console().print(picture(run_status, progress, {}))
    Console().print(f"more: {orchestrator.rstrip('/')}/dashboard/", highlight=False)


@app.command()
def plan(
    run_file: Annotated[Path, typer.Argument(help="The run, a TOML file.")],
    dtype: Annotated[
        ComputeDtype, typer.Option(help="What devices compute in: bfloat16 on GPUs, float32 on CPUs.")
    ] = ComputeDtype.BFLOAT16,
    tflops: Annotated[
        float, typer.Option(help="What a device really achieves, in 1e12 operations a second.", min=1e-6)
    ] = 100.0,
    evidence_gb: Annotated[float, typer.Option(help="A miner's budget for evidence, in 1e9 bytes.", min=0)] = 8.0,
    as_json: Json = False,
) -> None:
    """Shows what each stage of a run takes at most: memory by kind, bandwidth, and on which devices it fits."""
    from rich.console import Console

    from orion.cli.run_plan import plan_run, print_plan

    run_plan = plan_run(run_file, dtype, flops_per_s=tflops * 1e12, evidence_bytes_max=int(evidence_gb * 1e9))
    if as_json:
        print(run_plan.model_dump_json())
    else:
        print_plan(Console(width=None if sys.stdout.isatty() else 160), run_plan)


@app.command()
def audit(
    run: Annotated[str, typer.Argument(help="URL of the orchestrator, a run's folder, or an exported ledger.")],
    export: Annotated[
        Path | None, typer.Option(help="New folder to write the ledger to as Parquet tables; needs pyarrow.")
    ] = None,
    netuid: Annotated[
        int | None, typer.Option(help="Subnet whose weights are compared too.", min=0, max=65535, envvar="ORION_NETUID")
    ] = None,
    network: Network = "finney",
    as_json: Json = False,
) -> None:
    """Computes every credit, score and weight of a run again from its signed ledger; exits with 1 on any difference."""
    from rich.console import Console

    from orion.cli.audit import audit_run, print_report
    from orion.cli.chain_access import Subnet

    report = _run(audit_run(run, export, None if netuid is None else Subnet(network, netuid)))
    if as_json:
        print(report.model_dump_json())
    else:
        print_report(Console(), report)
    if report.differences:
        raise typer.Exit(1)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Option(help="An Orion checkpoint or a Hugging Face Llama folder.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws above temperature 0.", min=0)] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json instead of the folder's.")] = None,
    as_json: Json = False,
) -> None:
    """Samples text from a trained model."""
    from orion.cli.text_commands import generate_text

    generated = generate_text(
        checkpoint, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, tokenizer=tokenizer
    )
    print(json.dumps(asdict(generated)) if as_json else prompt + generated.text)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="An Orion checkpoint, or the state folder of an orchestrator.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    outer_step: Annotated[int | None, typer.Option(help="Of a run's checkpoints, this one.", min=0)] = None,
    resumable: Annotated[
        bool, typer.Option("--resumable", help="Orion's layout, with all that a run needs to go on from it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Writes a checkpoint for others: Hugging Face's layout where the model allows it, else Orion's documented one."""
    from orion.cli.text_commands import export_checkpoint

    layout = export_checkpoint(checkpoint, out, resumable=resumable, outer_step=outer_step)
    print(json.dumps({"folder": str(out), "layout": layout}) if as_json else f"{out}: {layout} layout")


@app.command()
def register(
    netuid: Netuid,
    network: Network = "finney",
    fallback: Fallback = None,
    wallet_path: WalletPath = DEFAULT_WALLETS,
    wallet: Wallet = "default",
    hotkey: HotkeyName = "default",
    password: Annotated[
        bool, typer.Option("--password/--no-password", help="Encrypt a coldkey that is made now.")
    ] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Spend without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Gives a hotkey its slot on a subnet: shows what it costs, asks, pays. Makes the wallet where there is none."""
    from rich.console import Console

    from orion.cli.registration import RegisterOptions
    from orion.cli.registration import register as register_hotkey

    options = RegisterOptions(
        network=network,
        netuid=netuid,
        fallbacks=tuple(fallback or ()),
        wallet_path=wallet_path.expanduser(),
        wallet=wallet,
        hotkey=hotkey,
        has_password=password,
        password=os.environ.get("BT_WALLET_PASSWORD"),
    )
    done = _run(register_hotkey(options, Console(stderr=as_json), lambda text: yes or typer.confirm(text, err=as_json)))
    if done is None:
        raise typer.Exit(1)
    if as_json:
        print(json.dumps(asdict(done)))


@app.command()
def devnet(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 = a free one.", min=0, max=65535)] = 9944,
    block_seconds: Annotated[float, typer.Option(help="Seconds from block to block.", min=0.02, max=3600)] = 1.0,
    state: Annotated[Path | None, typer.Option(help="File that keeps the chain; without one it ends with it.")] = None,
    stop_with_stdin: StopWithStdin = False,
) -> None:
    """Serves a development chain, which the Bittensor SDK and btcli take for a subtensor node."""
    from orion.cli.devnet import run_devnet
    from orion.cli.log_lines import log_lines

    log_lines()
    _run(run_devnet(host, port, block_seconds, state), stop_with_stdin=stop_with_stdin)


@app.command()
def orchestrator(
    run_file: Annotated[Path, typer.Argument(help="The run, a TOML file (or the JSON that `orion up` writes).")],
    netuid: Netuid,
    network: Network = "finney",
    fallback: Fallback = None,
    state: Annotated[
        Path,
        typer.Option(help="Folder of the public ledger, and of the journal and objects if they are not elsewhere."),
    ] = DEFAULT_FOLDER / "orchestrator",
    data: DataFolder = DEFAULT_FOLDER / "data",
    source: GoOnFrom = None,
    store: Store = None,
    journal: JournalAddress = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.", min=0, max=65535, envvar="ORION_PORT")] = 8700,
    wallet_path: WalletPath = DEFAULT_WALLETS,
    wallet: Wallet = "default",
    hotkey: HotkeyName = "default",
    stop_with_stdin: StopWithStdin = False,
) -> None:
    """Runs the orchestrator of one run; started again, it goes on where its journal ends."""
    from orion.cli.chain_access import Subnet
    from orion.cli.log_lines import log_lines
    from orion.cli.orchestrator_role import run_orchestrator
    from orion.common.protocol.signing import load_hotkey
    from orion.orchestrator.config import OrchestratorConfig

    log_lines()
    config = OrchestratorConfig(
        state_folder=state, data_folder=data, host=host, port=port, store=store, journal=journal
    )
    keypair = load_hotkey(wallet_path.expanduser(), wallet, hotkey)
    subnet = Subnet(network, netuid, tuple(fallback or ()))
    _run(run_orchestrator(run_file, config, keypair, subnet, source), stop_with_stdin=stop_with_stdin)


@app.command()
def backup(
    to: Annotated[Path, typer.Argument(help="New folder to write to. It will hold the run's secret: guard it.")],
    state: StateFolder = DEFAULT_FOLDER / "orchestrator",
    journal: JournalAddress = None,
    as_json: Json = False,
) -> None:
    """Copies an orchestrator's journal and public ledger, also while it runs; not the objects of its store."""
    from orion.orchestrator.backup import back_up
    from orion.orchestrator.config import OrchestratorConfig

    config = OrchestratorConfig(state_folder=state, journal=journal)
    done = back_up(config.state_folder, config.journal_address, to)
    print(json.dumps(asdict(done)) if as_json else f"{to}: {done.num_events} events, {done.num_entries} ledger entries")


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="Folder that `orion backup` wrote.")],
    state: StateFolder = DEFAULT_FOLDER / "orchestrator",
    journal: JournalAddress = None,
    as_json: Json = False,
) -> None:
    """Puts a backup where `orion orchestrator` then goes on from: an empty journal, a folder without a ledger."""
    from orion.orchestrator import backup
    from orion.orchestrator.config import OrchestratorConfig

    config = OrchestratorConfig(state_folder=state, journal=journal)
    done = backup.restore(source, config.state_folder, config.journal_address)
    where = f"{state}: {done.num_events} events, {done.num_entries} ledger entries"
    print(json.dumps(asdict(done)) if as_json else where)


@app.command()
def miner(
    orchestrator: OrchestratorUrl,
    data: DataFolder = DEFAULT_FOLDER / "miner-data",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 = a free one.", min=0, max=65535, envvar="ORION_PORT")] = 0,
    url: Annotated[
        str | None, typer.Option(help="How other miners reach this one: http://ADDRESS:PORT.", envvar="ORION_URL")
    ] = None,
    stage: Annotated[int | None, typer.Option(help="Stage to take when it lacks miners.", min=0)] = None,
    state: Annotated[
        Path, typer.Option(help="Folder for logs and tensors that validators ask for; losing it costs pay.")
    ] = DEFAULT_FOLDER / "miner-state",
    evidence_gb: Annotated[float, typer.Option(help="Disk for these tensors, in 1e9 bytes.", min=0)] = 8.0,
    netuid: Annotated[
        int | None,
        typer.Option(help="Subnet to publish the address on.", min=0, max=65535, envvar="ORION_NETUID"),
    ] = None,
    network: Network = "finney",
    fallback: Fallback = None,
    wallet_path: WalletPath = DEFAULT_WALLETS,
    wallet: Wallet = "default",
    hotkey: HotkeyName = "default",
    device: Device = "auto",
    device_gb: Annotated[
        float | None, typer.Option(help="Of the device's memory, what may be used, in 1e9 bytes.", min=0.001)
    ] = None,
    threads: Threads = 1,
    stop_with_stdin: StopWithStdin = False,
) -> None:
    """Hosts one stage of a run on this machine, until the run is over."""
    from orion.cli.chain_access import Subnet, with_chain
    from orion.cli.log_lines import log_lines
    from orion.common.protocol.signing import load_hotkey
    from orion.miner.config import MinerConfig
    from orion.miner.service import serve

    log_lines()
    config = MinerConfig(
        orchestrator_url=orchestrator.rstrip("/"),
        data_folder=data,
        host=host,
        port=port,
        public_url=url,
        stage_index=stage,
        state_folder=state,
        evidence_bytes_max=int(evidence_gb * 1e9),
        device=device,
        device_memory_bytes=None if device_gb is None else int(device_gb * 1e9),
        num_threads=threads,
    )
    keypair = load_hotkey(wallet_path.expanduser(), wallet, hotkey)
    if netuid is None:
        mining = serve(config, keypair)
    else:
        subnet = Subnet(network, netuid, tuple(fallback or ()))
        mining = with_chain(subnet, keypair, lambda chain: serve(config, keypair, chain=chain))
    _run(mining, stop_with_stdin=stop_with_stdin)


@app.command()
def validator(
    orchestrator: OrchestratorUrl,
    netuid: Netuid,
    network: Network = "finney",
    fallback: Fallback = None,
    data: DataFolder = DEFAULT_FOLDER / "validator-data",
    wallet_path: WalletPath = DEFAULT_WALLETS,
    wallet: Wallet = "default",
    hotkey: HotkeyName = "default",
    device: Device = "cpu",
    threads: Threads = 1,
    niceness: Annotated[int, typer.Option(help="Gives way to other work on this machine; 0 to 19.", min=0, max=19)] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Stay after the run has finished.")] = False,
    bundles: Annotated[
        Path | None, typer.Option(help="Folder for the evidence of failed replays (`orion replay`).")
    ] = DEFAULT_FOLDER / "bundles",
    stop_with_stdin: StopWithStdin = False,
) -> None:
    """Checks a run's miners and sets chain weights."""
    from orion.cli.chain_access import Subnet, with_chain
    from orion.cli.log_lines import log_lines
    from orion.common.protocol.signing import load_hotkey
    from orion.validator.config import ValidatorConfig
    from orion.validator.service import serve

    log_lines()
    config = ValidatorConfig(
        orchestrator_url=orchestrator.rstrip("/"),
        data_folder=data,
        device=device,
        num_threads=threads,
        niceness=niceness,
        follow=follow,
        bundle_folder=bundles,
    )
    keypair = load_hotkey(wallet_path.expanduser(), wallet, hotkey)
    subnet = Subnet(network, netuid, tuple(fallback or ()))
    validating = with_chain(subnet, keypair, lambda chain: serve(config, keypair, chain))
    _run(validating, stop_with_stdin=stop_with_stdin)


@app.command()
def replay(
    bundle: Annotated[Path, typer.Argument(help="Folder that a validator left of a replay that failed.")],
    as_json: Json = False,
) -> None:
    """Repeats a failed replay from its evidence. Exits 1 when it is not confirmed."""
    from orion.validator.bundle import confirm

    found = confirm(bundle)
    word = "confirmed" if found.confirms else "not confirmed"
    print(json.dumps(asdict(found)) if as_json else f"{word}: {found.finding}")
    if not found.confirms:
        raise typer.Exit(1)


def _run(work: Coroutine[Any, Any, ResultT], *, stop_with_stdin: bool = False) -> ResultT:
    """Runs a coroutine to its end. SIGTERM and Ctrl-C cancel it, so that it can tidy up; the exit code is then 130."""
    from orion.cli.processes import stop_when_stdin_closes

    async def until_told_to_stop() -> ResultT:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        if stop_with_stdin:
            stop_when_stdin_closes()
        return await work

    try:
        return asyncio.run(until_told_to_stop())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None


if __name__ == "__main__":
    main()
