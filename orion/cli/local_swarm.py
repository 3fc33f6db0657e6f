"""A whole swarm as processes on this machine: keys, ports, start, watch, stop. Trains nothing itself."""

import asyncio
import shutil
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from orion.cli.chain_access import Subnet
from orion.cli.local_subnet import NETUID, answers, set_up
from orion.cli.processes import Child, ProcessGroup, log_tail
from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, OrionError, TransportError
from orion.common.ids import Hotkey
from orion.common.net.http import HttpClient
from orion.common.protocol import routes
from orion.common.protocol.signing import Keypair, create_wallet, hotkey_of, load_coldkey, load_hotkey

START_TIMEOUT_S = 60.0
"""What a server gets until it answers; importing the libraries on a loaded machine takes several seconds."""
DISK_FREE_BYTES_MIN = 1_000_000_000
HOST = "127.0.0.1"
MINER_HOST = "127.0.0.2"
"""Loopback as well; the chain keeps no 127.0.0.1 as an address. Where there is none, miners publish nothing."""
BLOCK_S = 0.5
WALLET_HOTKEY = "default"
RESTARTS_MAX = 3
"""Times that an orchestrator which died is started again; its journal brings it back where it was."""


class SwarmStartError(OrionError):
    """A process of the swarm did not come up; the message says which and shows the end of its log."""


@dataclass(frozen=True, slots=True)
class SwarmPaths:
    """Where one run keeps its things."""

    run: Path
    data: Path

    @property
    def wallets(self) -> Path:
        return self.run / "wallets"

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    @property
    def state(self) -> Path:
        return self.run / "state"

    @property
    def run_file(self) -> Path:
        return self.run / "run.json"

    def make(self) -> None:
        """Raises ConfigError when the disk cannot take a run."""
        try:
            for folder in (self.wallets, self.logs, self.state):
                folder.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self.run).free
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.run}: {error.strerror}; choose another folder with --folder"
            ) from None
        if free_bytes < DISK_FREE_BYTES_MIN:
            raise ConfigError(
                f"only {free_bytes / 1e6:,.0f} MB free under {self.run}; "
                f"a run needs {DISK_FREE_BYTES_MIN / 1e6:,.0f} MB: free some or choose another disk with --folder"
            )


@dataclass(frozen=True, slots=True)
class LocalKeys:
    """The identities of a local swarm."""

    owner: Keypair
    """Hotkey of the subnet's owner."""
    owner_coldkey: Keypair
    """Owns the subnet and pays for everybody's slot."""
    orchestrator: Keypair
    validator: Keypair
    miners: dict[str, Keypair]

    def names(self) -> dict[Hotkey, str]:
        """What people call each hotkey."""
        named = {hotkey_of(key): name for name, key in self.miners.items()}
        return named | {hotkey_of(self.validator): "validator", hotkey_of(self.orchestrator): "orchestrator"}


def make_keys(folder: Path, num_miners: int) -> LocalKeys:
    """Makes a wallet for every process; real keys, without passwords, good for this run alone."""

    def key(name: str) -> Keypair:
        create_wallet(folder, name, WALLET_HOTKEY)
        return load_hotkey(folder, name, WALLET_HOTKEY)

    miners = {name: key(name) for name in (f"miner-{index}" for index in range(num_miners))}
    owner = key("owner")
    return LocalKeys(owner, load_coldkey(folder, "owner"), key("orchestrator"), key("validator"), miners)


class LocalSwarm:
    """The processes of one run. `stop` ends them all, whatever happened before."""

    def __init__(
        self,
        spec: RunSpec,
        paths: SwarmPaths,
        keys: LocalKeys,
        *,
        port: int,
        device: str,
        clock: Clock,
        environment: dict[str, str],
        source: Path | None = None,
        store: str | None = None,
    ) -> None:
        """`port` is the orchestrator's, 0 = any free one; `source` the checkpoint that the run goes on from; `store`
        the address of an object store on S3, None = a folder."""
        self.spec = spec
        self.keys = keys
        chain_port, any_port, *miner_ports = free_ports(2 + len(keys.miners))
        self.subnet = Subnet(f"ws://{HOST}:{chain_port}", NETUID)
        self.url = f"http://{HOST}:{_check_port(port) if port else any_port}"
        self._miner_ports = dict(zip(keys.miners, miner_ports, strict=True))
        self._miner_host = MINER_HOST if _can_listen(MINER_HOST) else HOST
        self._paths = paths
        self._device = device
        self._environment = environment
        self._source = source
        self._store = store
        self._processes = ProcessGroup(paths.logs, clock)
        self._clock = clock
        self._restarts = 0

    async def start(self) -> None:
        """Chain, registrations, orchestrator, then miners and validator. Raises SwarmStartError."""
        chain = self._start("chain", self._chain_arguments())
        orchestrator = self._start_orchestrator()  # it can wait for the chain, and takes as long to come up
        await self._chain_answers(chain)
        keys = self.keys
        await set_up(
            self.subnet,
            owner=keys.owner_coldkey,
            owner_hotkey=hotkey_of(keys.owner),
            validator=hotkey_of(keys.validator),
            others=[hotkey_of(key) for key in (keys.orchestrator, *keys.miners.values())],
        )
        await self._answers(orchestrator, self.url)
        for name in self.keys.miners:
            self._start(name, self._miner_arguments(name))
        self._start("validator", self._validator_arguments())

    def notices(self) -> list[str]:
        """What has happened to processes since the last call; an orchestrator that died is started again.

        Raises SwarmStartError when it has died too often.
        """
        lines = []
        for child in self._processes.newly_ended():
            code = child.process.returncode
            if code == 0:
                continue
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            lines.append(f"{child.name} {how}; its log is {child.log_path}")
            if child.name == "orchestrator":
                if self._restarts >= RESTARTS_MAX:
                    raise SwarmStartError(f"the orchestrator died {self._restarts + 1} times:\n{log_tail(child)}")
                self._restarts += 1
                self._start_orchestrator()
                lines.append("the orchestrator was started again")
        return lines

    @property
    def children(self) -> list[Child]:
        """Every process ever started, in order."""
        return self._processes.children

    def restart_miner(self, name: str) -> None:
        """Starts a miner that has ended again, with the same keys."""
        self._start(name, self._miner_arguments(name))

    def num_miners_alive(self) -> int:
        return sum(
            child.name in self.keys.miners and child.process.poll() is None for child in self._processes.children
        )

    async def validator_ended(self, timeout_s: float) -> bool:
        """Waits for the validator to set its last weights and end."""
        (validator,) = (child for child in self._processes.children if child.name == "validator")
        try:
            await asyncio.to_thread(validator.process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def btcli_commands(self) -> list[str]:
        """What shows this subnet's metagraph and weights."""
        where = f"-n {self.subnet.network}"
        netuid = self.subnet.netuid
        return [f"btcli subnets metagraph {netuid} {where}", f"btcli query weights --netuid {netuid} {where}"]

    def stop(self) -> None:
        self._processes.stop()

    # --- one process each

    def _start(self, name: str, arguments: list[str]) -> Child:
        return self._processes.start(name, arguments, self._environment)

    def _start_orchestrator(self) -> Child:
        paths = self._paths
        return self._start(
            "orchestrator",
            [
                "orchestrator",
                str(paths.run_file),
                *self._wallet("orchestrator"),
                "--host",
                HOST,
                "--port",
                _port(self.url),
                "--state",
                str(paths.state),
                "--data",
                str(paths.data),
                *(() if self._store is None else ("--store", self._store)),
                *self._subnet_arguments(),
                *(() if self._source is None else ("--from", str(self._source))),
            ],
        )

    def _miner_arguments(self, name: str) -> list[str]:
        return [
            "miner",
            "--orchestrator",
            self.url,
            *self._wallet(name),
            *(self._subnet_arguments() if self._miner_host == MINER_HOST else ()),
            "--host",
            self._miner_host,
            "--port",
            str(self._miner_ports[name]),
            "--data",
            str(self._paths.data),
            "--state",
            str(self._paths.state / "miners"),
            "--device",
            self._device,
        ]

    def _validator_arguments(self) -> list[str]:
        return [
            "validator",
            "--orchestrator",
            self.url,
            *self._wallet("validator"),
            "--data",
            str(self._paths.data),
            "--niceness",
            "10",
            *self._subnet_arguments(),
        ]

    def _subnet_arguments(self) -> list[str]:
        return ["--network", self.subnet.network, "--netuid", str(self.subnet.netuid)]

    def _chain_arguments(self) -> list[str]:
        port = _port(self.subnet.network)
        return ["devnet", "--host", HOST, "--port", port, "--block-seconds", str(BLOCK_S)]

    def _wallet(self, name: str) -> list[str]:
        return ["--wallet-path", str(self._paths.wallets), "--wallet", name, "--hotkey", WALLET_HOTKEY]

    async def _chain_answers(self, child: Child) -> None:
        deadline_s = self._clock.monotonic_s() + START_TIMEOUT_S
        while self._clock.monotonic_s() < deadline_s and child.process.poll() is None:
            if await answers(self.subnet):
                return
            await asyncio.sleep(0.1)
        raise SwarmStartError(f"{child.name} did not come up; the end of {child.log_path}:\n{log_tail(child)}")

    async def _answers(self, child: Child, url: str) -> None:
        deadline_s = self._clock.monotonic_s() + START_TIMEOUT_S
        async with HttpClient() as http:
            while self._clock.monotonic_s() < deadline_s and child.process.poll() is None:
                try:
                    await http.read("GET", url + routes.HEALTH, timeout_s=2.0)
                    return
                except TransportError:
                    await asyncio.sleep(0.1)
        raise SwarmStartError(f"{child.name} did not come up; the end of {child.log_path}:\n{log_tail(child)}")


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nobody listens on now."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in sockets]


def _can_listen(host: str) -> bool:
    """Whether this machine has that address: not all have the whole of 127.x.x.x."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _check_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ConfigError(f"port {port} is in use; choose another with --port, or leave it out") from None
    return port


def _port(url: str) -> str:
    return url.rsplit(":", 1)[1]
