"""How fast activations move between two processes, and what that costs each: a miner's way, bare HTTP, a bare socket.

Repetitions of the three ways take turns, so that whatever else the machine does meets all alike; what is reported are
medians over repetitions with their extremes, and ratios of neighbouring repetitions. Every activation of the miner's
way is encoded, hashed, signed, admitted, checked and answered within the time that is counted.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from orion.bench.transport.cargo import make_cargo
from orion.bench.transport.senders import HttpSender, OrionSender, Sender, SocketSender
from orion.common.clock import Clock, process_cpu_s

IN_FLIGHT = (1, 4)
"""Activations on their way at a time: one, which is what the bars are about, and as many as a busy miner sends."""
SHARE_OF_SOCKET_MIN = 0.5
CPU_MS_MAX = 2.0
"""Of processor time for an activation, on each side."""
_WARM_UP = 16
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Repetition:
    """Some hundred activations of one way."""

    mb_per_s: float
    client_cpu_ms: float
    server_cpu_ms: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Study:
    """All repetitions, by in-flight number and way."""

    size_bytes: int
    count: int
    repetitions: Mapping[int, Mapping[str, Sequence[Repetition]]]

    def share_of_socket(self, in_flight: int = IN_FLIGHT[0]) -> float:
        """Median over repetitions of our rate ÷ the bare socket's just before."""
        ways = self.repetitions[in_flight]
        pairs = zip(ways["orion"], ways["socket"], strict=True)
        return median(ours.mb_per_s / bare.mb_per_s for ours, bare in pairs)

    def faults(self) -> list[str]:
        """The bars that do not hold."""
        faults = []
        if self.share_of_socket() < SHARE_OF_SOCKET_MIN:
            faults.append(f"{self.share_of_socket():.2f} of the bare socket's rate, at least {SHARE_OF_SOCKET_MIN}")
        for side, cpu_ms in self._cpu_ms(IN_FLIGHT[0]).items():
            if cpu_ms > CPU_MS_MAX:
                faults.append(f"{cpu_ms:.2f} ms of processor time an activation on the {side}, at most {CPU_MS_MAX}")
        return faults

    def as_json(self) -> dict[str, object]:
        """The report: figures of one activation at a time, then those of several."""
        return {
            **self._figures(IN_FLIGHT[0]),
            "several_at_a_time": {"in_flight": IN_FLIGHT[1], **self._figures(IN_FLIGHT[1])},
            "size_bytes": self.size_bytes,
            "activations": self.count,
            "faults": self.faults(),
        }

    def _figures(self, in_flight: int) -> dict[str, object]:
        ways = self.repetitions[in_flight]
        rates = {name: [each.mb_per_s for each in done] for name, done in ways.items()}
        return {
            **{f"{name}_mb_per_s": round(median(found), 1) for name, found in rates.items()},
            "spread_mb_per_s": {name: [round(min(found), 1), round(max(found), 1)] for name, found in rates.items()},
            "share_of_socket": round(self.share_of_socket(in_flight), 3),
            "cpu_ms_per_activation": self._cpu_ms(in_flight),
            "cpu_ms_per_activation_http": self._cpu_ms(in_flight, "http"),
            "cpu_ms_per_activation_socket": self._cpu_ms(in_flight, "socket"),
            "p50_ms": round(median(each.p50_ms for each in ways["orion"]), 3),
            "p99_ms": round(median(each.p99_ms for each in ways["orion"]), 3),
        }

    def _cpu_ms(self, in_flight: int, way: str = "orion") -> dict[str, float]:
        done = self.repetitions[in_flight][way]
        return {
            "client": round(median(each.client_cpu_ms for each in done), 3),
            "server": round(median(each.server_cpu_ms for each in done), 3),
        }


def measure(clock: Clock, repetitions: int, count: int) -> Study:
    """Sends `count` activations by each way in each repetition; `count` is a multiple of the most in flight."""
    assert count % max(IN_FLIGHT) == 0
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _receiving() as (ports, server_cpu_s), ExitStack() as stack:
            cargo = make_cargo(1)
            senders: dict[str, Sender] = {
                "socket": stack.enter_context(closing(SocketSender(cargo, ports["socket"], clock))),
                "http": stack.enter_context(closing(HttpSender(cargo, ports["http"], clock))),
                "orion": stack.enter_context(closing(OrionSender(cargo, ports["orion"], clock))),
            }
            found: dict[int, dict[str, list[Repetition]]] = {}
            for in_flight in IN_FLIGHT:
                found[in_flight] = {name: [] for name in senders}
                for sender in senders.values():
                    sender.send(_WARM_UP, in_flight)
                for _ in range(repetitions):
                    for name, sender in senders.items():
                        done = _repetition(
                            sender,
                            count,
                            in_flight,
                            size_bytes=cargo.size_bytes,
                            clock=clock,
                            server_cpu_s=server_cpu_s,
                        )
                        found[in_flight][name].append(done)
            return Study(cargo.size_bytes, count, found)
    finally:
        torch.set_num_threads(num_threads)


def _repetition(
    sender: Sender, count: int, in_flight: int, *, size_bytes: int, clock: Clock, server_cpu_s: Callable[[], float]
) -> Repetition:
    server_before_s, client_before_s = server_cpu_s(), process_cpu_s()
    began_s = clock.monotonic_s()
    taken_s = sorted(sender.send(count, in_flight))
    seconds = clock.monotonic_s() - began_s
    client_s, server_s = process_cpu_s() - client_before_s, server_cpu_s() - server_before_s
    return Repetition(
        mb_per_s=size_bytes * count / seconds / 1e6,
        client_cpu_ms=1e3 * client_s / count,
        server_cpu_ms=1e3 * server_s / count,
        p50_ms=1e3 * median(taken_s),
        p99_ms=1e3 * taken_s[int(0.99 * (count - 1))],
    )


@contextmanager
def _receiving() -> Iterator[tuple[dict[str, int], Callable[[], float]]]:
    """The receiving process while the block runs: its ports, and its processor time so far in seconds."""
    command = [sys.executable, "-m", "orion.bench.transport.receiver"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    asking, answers = process.stdin, process.stdout

    def cpu_s() -> float:
        asking.write("\n")
        asking.flush()
        return float(answers.readline())

    try:
        yield json.loads(answers.readline()), cpu_s
    finally:
        asking.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        answers.close()
