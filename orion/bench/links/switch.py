"""The process that is the network: makes a namespace with one TAP device for each peer, and moves frames between them.

`python -m orion.bench.links.switch PLAN` with the plan as JSON; prints a line once it is ready, and another for each
command (a JSON line on standard input) that it has followed. It ends when standard input closes, when it is told to
(SIGTERM) or when its time is up, and takes its namespaces with it; so nothing is left behind when whoever started it
dies, however it dies.

Frames keep the kernel's offload header (`IFF_VNET_HDR`), so that up to 64 KB of a stream cross at once, unsegmented and
without checksums: that is what makes a switch in Python fast enough.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from orion.bench.links.profile import LinkProfile, Way
from orion.bench.links.shaping import Shaper
from orion.common.clock import Clock, SystemClock

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_OFFLOADS = 0x1 | 0x2 | 0x4
"""Checksums and segments of TCP over IPv4 and IPv6."""
_HEADER_BYTES = 10
"""Of the offload header before each frame."""
_FRAME_BYTES_MAX = 70_000
_READS_AT_ONCE = 16
_PRIORITY = -10
"""A link doesn't get slower because the processors are busy: the switch goes first."""
_RING_FRAMES = 1000


@dataclass(frozen=True, slots=True)
class Plan:
    """What the switch is to make."""

    prefix: str
    """Of the namespaces' names; peer i lives in `PREFIX-i`."""
    profiles: tuple[LinkProfile, ...]
    seed: int
    lifetime_s: float

    def as_json(self) -> str:
        """For the command line."""
        profiles = [profile.as_json() for profile in self.profiles]
        return json.dumps(
            {"prefix": self.prefix, "profiles": profiles, "seed": self.seed, "lifetime_s": self.lifetime_s}
        )

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """What `as_json` has written."""
        tree = json.loads(text)
        return cls(**{**tree, "profiles": tuple(LinkProfile(**profile) for profile in tree["profiles"])})

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}-{index}" for index in range(len(self.profiles)))


def address(index: int) -> str:
    """Of a peer, within every emulated network: these addresses exist in its namespaces alone."""
    return f"10.77.0.{index + 1}"


def remove_namespaces(names: Sequence[str]) -> None:
    """Those that there are; processes in them go on without a network."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=10)


def _mac(index: int) -> bytes:
    return bytes([2, 0, 0, 0, 77, index + 1])


def _open_tap(name: str) -> int:
    handle = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(handle, _TUNSETOFFLOAD, _OFFLOADS)
    return handle


def _ip(lines: Sequence[str], namespace: str | None = None) -> None:
    """Runs lines of `ip` in one process; stops at the first that fails."""
    where = [] if namespace is None else ["-n", namespace]
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(["ip", *where, "-batch", "-"], input=text, text=True, check=True, capture_output=True, timeout=30)


def _set_up(plan: Plan) -> list[int]:
    """Makes the namespaces; the TAP device of each peer."""
    taps = []
    for index, (namespace, profile) in enumerate(zip(plan.namespaces, plan.profiles, strict=True)):
        device = f"ot{os.getpid() % 100_000}.{index}"
        taps.append(_open_tap(device))
        _ip([f"netns add {namespace}", f"link set {device} netns {namespace}"])
        others = [other for other in range(len(plan.profiles)) if other != index]
        neighbours = [
            f"neigh replace {address(other)} lladdr {_mac(other).hex(':')} dev eth0 nud permanent" for other in others
        ]
        _ip(
            [
                f"link set {device} name eth0 address {_mac(index).hex(':')} txqueuelen {_RING_FRAMES}",
                f"addr add {address(index)}/24 dev eth0",
                "link set eth0 up",
                "link set lo up",
                *neighbours,
            ],
            namespace,
        )
        if profile.upload_mbit is not None:
            _limit_upload(namespace, profile.upload_mbit)
    return taps


def _limit_upload(namespace: str, upload_mbit: float) -> None:
    # A burst of two full frames at least, so that no frame must be cut up, and of 2 ms, so that the rate is reached.
    burst_bytes = max(140_000, int(upload_mbit * 1e6 / 8 * 2e-3))
    arguments = f"root tbf rate {round(upload_mbit * 1e6)}bit burst {burst_bytes} limit 16000000".split()
    subprocess.run(
        ["tc", "-n", namespace, "qdisc", "replace", "dev", "eth0", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )


class Switch:
    """Moves frames until it is told to stop."""

    def __init__(self, taps: Sequence[int], shaper: Shaper, clock: Clock) -> None:
        self._taps = tuple(taps)
        self._shaper = shaper
        self._clock = clock
        self._peers = {_mac(index): index for index in range(len(taps))}
        self._commands = b""
        self._is_told_to_stop = False

    def stop(self) -> None:
        """Ends `run` soon."""
        self._is_told_to_stop = True

    def run(self, lifetime_s: float) -> None:
        """Returns when standard input has closed, after `stop`, or when the time is up."""
        end_s = self._clock.monotonic_s() + lifetime_s
        index_of = {tap: index for index, tap in enumerate(self._taps)}
        while not self._is_told_to_stop:
            now_s = self._clock.monotonic_s()
            for receiver, frame in self._shaper.due(now_s):
                # A device that is down or full loses the frame, as a network does.
                with contextlib.suppress(OSError):
                    os.write(self._taps[receiver], frame)
            if now_s >= end_s:
                return
            next_s = self._shaper.next_s()
            wait_s = 1.0 if next_s is None else min(1.0, max(0.0, next_s - self._clock.monotonic_s()))
            readable = [tap for tap, index in index_of.items() if self._shaper.is_open(index)]
            ready, _, _ = select.select([0, *readable], (), (), wait_s)
            for handle in ready:
                if handle != 0:
                    self._read_frames(index_of[handle])
                elif not self._read_commands():
                    return

    def _read_frames(self, sender: int) -> None:
        for _ in range(_READS_AT_ONCE):
            try:
                frame = os.read(self._taps[sender], _FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            receiver = self._peers.get(frame[_HEADER_BYTES : _HEADER_BYTES + 6])
            if receiver is not None:
                self._shaper.offer(self._clock.monotonic_s(), sender, receiver, frame)

    def _read_commands(self) -> bool:
        """Follows what has come in; whether more may come."""
        received = os.read(0, 65_536)
        *lines, self._commands = (self._commands + received).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "cut" in command:
                self._shaper.cut(command["cut"], Way(command["way"]))
            else:
                self._shaper.heal(command["heal"])
            _say({"done": command})
        return bool(received)


def _say(line: dict[str, Any]) -> None:
    # Whoever started this may be gone.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(line).encode() + b"\n")


def main() -> None:
    """Runs one network."""
    plan = Plan.parse(sys.argv[1])
    clock = SystemClock()
    try:
        taps = _set_up(plan)
        shaper = Shaper(plan.profiles, Random(plan.seed))
        switch = Switch(taps, shaper, clock)
        signal.signal(signal.SIGTERM, lambda *_: switch.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for whoever started this
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
        _say({"ready": True})
        switch.run(plan.lifetime_s)
        times = os.times()
        _say(
            {
                "num_delivered": shaper.num_delivered,
                "num_dropped": shaper.num_dropped,
                "cpu_s": times.user + times.system,
            }
        )
    except subprocess.CalledProcessError as error:
        _say({"error": f"{' '.join(error.cmd)}: {error.stderr.strip()}"})
        sys.exit(1)
    except OSError as error:
        _say({"error": str(error)})
        sys.exit(1)
    finally:
        remove_namespaces(plan.namespaces)


if __name__ == "__main__":
    main()
