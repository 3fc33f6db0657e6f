"""hivemind's averager between the same places: starts the peers with an interpreter that has it, and reads the times.

Optional: hivemind asks for versions of its dependencies that Orion's environment does not have, so it lives in another.
"""

import json
import os
import select
import signal
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from orion.bench.workers import BenchError

_LIMIT_S = 120.0
"""For each answer of a peer: to be imported, to be matched, to have averaged."""
_END_S = 3.0
_PEER = Path(__file__).with_name("hivemind_peer.py")


class HivemindGroup:
    """All peers. Use `seconds`; whatever happens, they have ended then."""

    def __init__(self, interpreter: Path, num_values: int, folder: Path) -> None:
        """`num_values` in fp32; what peers say on standard error is kept in `folder`."""
        self._interpreter = interpreter
        self._num_values = num_values
        self._folder = folder

    def seconds(self, places: Sequence[tuple[str, Path | None]], repetitions: int) -> float:
        """The median of rounds after the first, each from the signal to begin until the last peer has the mean.
        `places`: each peer's address and network namespace. Raises BenchError."""
        with ExitStack() as stack:
            peers = [self._start(stack, rank, len(places), *place) for rank, place in enumerate(places)]
            _tell(peers[:1], "")
            (first,) = _answers(peers[:1])
            _tell(peers[1:], str(first["address"]))
            _answers(peers[1:])
            rounds: list[float] = []
            for _ in range(repetitions + 1):
                _tell(peers, "match")
                _answers(peers)
                _tell(peers, "begin")
                told = _answers(peers)
                if not all(each["is_mean"] for each in told):
                    raise BenchError("hivemind's peers have not averaged all of them")
                rounds.append(max(each["seconds"] for each in told))
            return statistics.median(rounds[1:])

    def _start(
        self, stack: ExitStack, rank: int, num_peers: int, address: str, namespace: Path | None
    ) -> subprocess.Popen[bytes]:
        enter = [] if namespace is None else ["nsenter", f"--net={namespace}", "--"]
        task = {"rank": rank, "num_peers": num_peers, "num_values": self._num_values, "address": address}
        errors = stack.enter_context((self._folder / f"hivemind-{rank}.err").open("wb"))
        process = subprocess.Popen(
            [*enter, str(self._interpreter), str(_PEER), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            process_group=0,
        )
        stack.callback(_end, process)
        return process


def _tell(peers: Sequence[subprocess.Popen[bytes]], line: str) -> None:
    for peer in peers:
        assert peer.stdin is not None
        peer.stdin.write(f"{line}\n".encode())


def _answers(peers: Sequence[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    """A line of each."""
    found = []
    for peer in peers:
        assert peer.stdout is not None
        ready, _, _ = select.select([peer.stdout], (), (), _LIMIT_S)
        line = peer.stdout.readline() if ready else b""
        if not line:
            raise BenchError("a peer of hivemind has ended" if ready else f"hivemind took more than {_LIMIT_S:g} s")
        found.append(json.loads(line))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """The peer and the processes that it has started."""
    with process, suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        os.killpg(process.pid, signal.SIGKILL)
