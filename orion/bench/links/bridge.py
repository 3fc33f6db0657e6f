"""The kernel's way of joining the ends: a veth pair for each peer, all on one bridge in a namespace of its own.

Nothing runs in user space while frames cross, whole segments of up to 64 KB each. What a peer can receive is limited at
the bridge's port, whose queue loses what it has no room for, as a router's does. A cut puts a queue that loses
everything (`blackhole`) in the way: at the peer's own device for what it sends, at the bridge's port for what it is
sent.
"""

import json
import select
import subprocess
from typing import Any

from orion.bench.links.commands import Commands
from orion.bench.links.namespaces import (
    DEVICE,
    TOOL_S,
    UPLOAD_QUEUE_BYTES,
    Plan,
    limit_rate,
    run_ip,
    run_tc,
    set_up_end,
)
from orion.bench.links.profile import Way
from orion.bench.links.shaping import DOWNLOAD_QUEUE_S_MAX
from orion.common.clock import Clock

_BRIDGE = "joined"
_LOOK_S = 1.0
_QUEUE_BYTES_MIN = 300_000
"""For a download: a few full frames."""


class Bridge:
    """Joins the ends of one network until it is told to stop."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        """Makes all namespaces. Raises CalledProcessError."""
        self._plan = plan
        self._clock = clock
        self._num_dropped = 0
        """By queues that are there no more."""
        self._is_told_to_stop = False
        run_ip([f"netns add {name}" for name in (plan.hub, *plan.namespaces)])
        run_ip(
            [
                f"link add {_BRIDGE} type bridge mcast_snooping 0",
                f"link set {_BRIDGE} addrgenmode none up",
                *(
                    line
                    for index, namespace in enumerate(plan.namespaces)
                    for line in (
                        f"link add {port_of(index)} type veth peer name {DEVICE} netns {namespace}",
                        f"link set {port_of(index)} master {_BRIDGE} addrgenmode none up",
                    )
                ),
            ],
            plan.hub,
        )
        for index in range(len(plan.profiles)):
            set_up_end(plan, index)
            self._limit_download(index)

    @property
    def num_delivered(self) -> int:
        """Frames that left the bridge."""
        devices = _said(["ip", "-n", self._plan.hub, "-json", "-statistics", "link", "show"])
        ports = {port_of(index) for index in range(len(self._plan.profiles))}
        return sum(one["stats64"]["tx"]["packets"] for one in devices if one["ifname"] in ports)

    @property
    def num_dropped(self) -> int:
        """Frames that were cut off, or found a full queue."""
        queues = [(namespace, DEVICE) for namespace in self._plan.namespaces]
        queues += [(self._plan.hub, port_of(index)) for index in range(len(self._plan.profiles))]
        return self._num_dropped + sum(_lost_by(namespace, device) for namespace, device in queues)

    def stop(self) -> None:
        """Ends `run` soon."""
        self._is_told_to_stop = True

    def run(self, lifetime_s: float, commands: Commands) -> None:
        """Returns when there are no more commands, after `stop`, or when the time is up."""
        end_s = self._clock.monotonic_s() + lifetime_s
        while not self._is_told_to_stop and (left_s := end_s - self._clock.monotonic_s()) > 0:
            ready, _, _ = select.select([commands], (), (), min(_LOOK_S, left_s))
            if ready and not commands.follow(self.cut, self.heal):
                return

    def cut(self, peer: int, way: Way) -> None:
        """From its return on nothing passes that way."""
        if way in (Way.OUT, Way.BOTH):
            self._lose_all(self._plan.namespaces[peer], DEVICE)
        if way in (Way.IN, Way.BOTH):
            self._lose_all(self._plan.hub, port_of(peer))

    def heal(self, peer: int) -> None:
        """The peer's link works again, both ways."""
        upload_mbit = self._plan.profiles[peer].upload_mbit
        for namespace, device in ((self._plan.namespaces[peer], DEVICE), (self._plan.hub, port_of(peer))):
            if not _loses_all(namespace, device):
                continue
            self._num_dropped += _lost_by(namespace, device)
            run_tc(namespace, "qdisc", "delete", "dev", device, "root")
            if device != DEVICE:
                self._limit_download(peer)
            elif upload_mbit is not None:
                limit_rate(namespace, device, upload_mbit, UPLOAD_QUEUE_BYTES)

    def _limit_download(self, peer: int) -> None:
        mbit = self._plan.profiles[peer].download_mbit
        if mbit is not None:
            limit_rate(self._plan.hub, port_of(peer), mbit, download_queue_bytes(mbit))

    def _lose_all(self, namespace: str, device: str) -> None:
        if not _loses_all(namespace, device):
            self._num_dropped += _lost_by(namespace, device)
            run_tc(namespace, "qdisc", "replace", "dev", device, "root", "blackhole")


def download_queue_bytes(mbit: float) -> int:
    """What may wait for a peer's download before it is lost."""
    return max(_QUEUE_BYTES_MIN, int(mbit * 1e6 / 8 * DOWNLOAD_QUEUE_S_MAX))


def port_of(index: int) -> str:
    """The bridge's end of a peer's link."""
    return f"port{index}"


def _queues(namespace: str, device: str) -> list[dict[str, Any]]:
    return _said(["tc", "-n", namespace, "-json", "-statistics", "qdisc", "show", "dev", device])


def _loses_all(namespace: str, device: str) -> bool:
    return any(queue["kind"] == "blackhole" for queue in _queues(namespace, device))


def _lost_by(namespace: str, device: str) -> int:
    """Frames that the device's queue has lost."""
    return sum(queue.get("drops", 0) for queue in _queues(namespace, device))


def _said(command: list[str]) -> list[dict[str, Any]]:
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TOOL_S).stdout
    tree: list[dict[str, Any]] = json.loads(text)
    return tree
