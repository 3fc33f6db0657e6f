"""`EmulatedNetwork`: peers on one machine behind links like those of the open internet, for benchmarks and fault tests.

Owns the process that is the network, and the names of its namespaces. Whoever uses it starts processes with `command`
and ends them itself. Links that are only slow are the kernel's, a switch in user space is there only where a
profile asks for more. Needs root, `ip` and `tc`, and for the switch /dev/net/tun; says so where they are missing.
"""

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orion.bench.links.bridge import download_queue_bytes, port_of
from orion.bench.links.namespaces import (
    DEVICE,
    UPLOAD_QUEUE_BYTES,
    Plan,
    address,
    limit_rate,
    remove_namespaces,
)
from orion.bench.links.profile import LinkProfile, Way
from orion.common.errors import OrionError

PEERS_MAX = 200
LIFETIME_S = 4 * 3600.0
"""After which a network ends by itself, whatever its owner does."""
_NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"orion-(?P<pid>\d+)-(?P<number>\d+)-(\d+|hub)")
_ANSWER_S = 30.0
_STOP_S = 10.0


class LinkError(OrionError):
    """There is no emulated network here, or it has gone; the message says why."""


@dataclass(frozen=True, slots=True)
class NetworkFigures:
    """What a network did."""

    num_delivered: int
    """Frames, of up to 64 KB each."""
    num_dropped: int
    cpu_s: float
    """Processor time of the process that is the network, once it was made. The kernel's own part is in nobody's time:
    frames cross while it serves interrupts."""


class EmulatedNetwork:
    """Use it as a context manager; peers are known by their index among `profiles`."""

    _made = 0

    def __init__(self, profiles: Sequence[LinkProfile], *, seed: int = 0, lifetime_s: float = LIFETIME_S) -> None:
        if not 1 <= len(profiles) <= PEERS_MAX:
            raise ValueError(f"{len(profiles)} peers; there may be 1 to {PEERS_MAX}")
        EmulatedNetwork._made += 1
        prefix = f"orion-{os.getpid()}-{EmulatedNetwork._made}"
        self._plan = Plan(prefix, tuple(profiles), seed, lifetime_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self.figures: NetworkFigures | None = None
        """Once the network has been left."""

    def __enter__(self) -> Self:
        """Makes the network. Raises LinkError."""
        _require_tools(needs_switch=self._plan.needs_switch)
        remove_namespaces(_left_behind())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orion.bench.links.host", self._plan.as_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            answer = self._answer()
            if "error" in answer:
                raise LinkError(f"no emulated links can be made here: {answer['error']}")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Names of the peers' namespaces."""
        return self._plan.namespaces

    def address(self, peer: int) -> str:
        """The peer's IPv4 address, for all peers."""
        return address(range(len(self._plan.profiles))[peer])

    def namespace_path(self, peer: int) -> Path:
        """What a process enters to be behind that peer's link."""
        return _NAMESPACES / self.namespaces[peer]

    def command(self, peer: int, arguments: Sequence[str]) -> list[str]:
        """What runs a program behind that peer's link."""
        return ["nsenter", f"--net={self.namespace_path(peer)}", "--", *arguments]

    def cut(self, peer: int, way: Way = Way.BOTH) -> None:
        """From its return on nothing passes that way. Raises LinkError."""
        self._tell({"cut": range(len(self._plan.profiles))[peer], "way": way.value})

    def slow_down(self, peer: int, factor: float) -> None:
        """From its return on the peer's rates are so many times smaller, until a cut of its link is healed. Raises
        LinkError, also where the switch joins the links."""
        profile = self._plan.profiles[range(len(self._plan.profiles))[peer]]
        if self._plan.needs_switch:
            raise LinkError("rates are changed only where the kernel joins the links")
        for mbit, namespace, device in (
            (profile.upload_mbit, self.namespaces[peer], DEVICE),
            (profile.download_mbit, self._plan.hub, port_of(peer)),
        ):
            if mbit is None:
                continue
            queue_bytes = UPLOAD_QUEUE_BYTES if device == DEVICE else download_queue_bytes(mbit / factor)
            try:
                limit_rate(namespace, device, mbit / factor, queue_bytes)
            except subprocess.CalledProcessError as error:
                raise LinkError(f"a link's rate could not be changed: {error.stderr.strip()}") from error

    def heal(self, peer: int) -> None:
        """Ends every cut of the peer's link. Raises LinkError."""
        self._tell({"heal": range(len(self._plan.profiles))[peer]})

    def _tell(self, command: dict[str, Any]) -> None:
        process = self._running
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise LinkError("the emulated network has ended") from None
        answer = self._answer()
        if "error" in answer:
            raise LinkError(f"the emulated network has ended: {answer['error']}")

    def _answer(self) -> dict[str, Any]:
        process = self._running
        assert process.stdout is not None
        while b"\n" not in self._received:
            ready, _, _ = select.select([process.stdout], (), (), _ANSWER_S)
            received = os.read(process.stdout.fileno(), 65_536) if ready else b""
            if not received:
                raise LinkError("the emulated network has ended" if ready else "the emulated network does not answer")
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            output, _ = process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        mine = (*self.namespaces, self._plan.hub)
        remove_namespaces([name for name in mine if (_NAMESPACES / name).exists()])
        for line in (self._received + output).splitlines():
            figures = json.loads(line)
            if "cpu_s" in figures:
                self.figures = NetworkFigures(**figures)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LinkError("the emulated network is not running")
        return self._process


def _require_tools(*, needs_switch: bool) -> None:
    missing = [tool for tool in ("ip", "tc", "nsenter") if not _finds(tool)]
    if missing:
        raise LinkError(f"emulated links need {', '.join(missing)}: install iproute2 and util-linux")
    if os.geteuid() != 0:
        raise LinkError("emulated links need root, for network namespaces; measure unshaped without")
    if needs_switch and not Path("/dev/net/tun").exists():
        raise LinkError("emulated delays need /dev/net/tun; in a container pass it with --device /dev/net/tun")


def _finds(tool: str) -> bool:
    folders = os.get_exec_path()
    return any(os.access(Path(folder) / tool, os.X_OK) for folder in folders)


def _left_behind() -> list[str]:
    """Namespaces of processes that are no more."""
    if not _NAMESPACES.is_dir():
        return []
    matches = [_NAME.fullmatch(path.name) for path in _NAMESPACES.iterdir()]
    return [match[0] for match in matches if match is not None and not Path(f"/proc/{match['pid']}").exists()]
