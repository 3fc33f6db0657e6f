"""The way through user space: one TAP device for each peer, and `Switch`, which moves frames between them.

Used only where a link has what the kernel here may lack (`LinkProfile.needs_switch`), because it takes processor time
from what is measured. Frames keep the kernel's offload header (`IFF_VNET_HDR`), so that up to 64 KB of a stream cross
at once, unsegmented and without checksums: that is what makes a switch in Python fast enough.
"""

import contextlib
import fcntl
import os
import select
import struct
from random import Random

from orion.bench.links.commands import Commands
from orion.bench.links.namespaces import DEVICE, Plan, mac, run_ip, set_up_end
from orion.bench.links.profile import Way
from orion.bench.links.shaping import Shaper
from orion.common.clock import Clock

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_OFFLOADS = 0x1 | 0x2 | 0x4
"""Checksums and segments of TCP over IPv4 and IPv6."""
_HEADER_BYTES = 10
"""Of the offload header before each frame."""
_FRAME_BYTES_MAX = 70_000
_READS_AT_ONCE = 16


class Switch:
    """Moves the frames of one network until it is told to stop."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        """Makes all namespaces. Raises CalledProcessError and OSError."""
        self._clock = clock
        self._shaper = Shaper(plan.profiles, Random(plan.seed))
        self._peers = {mac(index): index for index in range(len(plan.profiles))}
        self._is_told_to_stop = False
        self._taps: list[int] = []
        for index, namespace in enumerate(plan.namespaces):
            device = f"ot{os.getpid() % 100_000}.{index}"
            self._taps.append(_open_tap(device))
            run_ip([f"netns add {namespace}", f"link set {device} netns {namespace}"])
            run_ip([f"link set {device} name {DEVICE}"], namespace)
            set_up_end(plan, index)

    @property
    def num_delivered(self) -> int:
        """Frames that arrived."""
        return self._shaper.num_delivered

    @property
    def num_dropped(self) -> int:
        """Frames that did not."""
        return self._shaper.num_dropped

    def stop(self) -> None:
        """Ends `run` soon."""
        self._is_told_to_stop = True

    def cut(self, peer: int, way: Way) -> None:
        """From its return on nothing passes that way."""
        self._shaper.cut(peer, way)

    def heal(self, peer: int) -> None:
        """The peer's link works again, both ways."""
        self._shaper.heal(peer)

    def run(self, lifetime_s: float, commands: Commands) -> None:
        """Returns when there are no more commands, after `stop`, or when the time is up."""
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
            ready, _, _ = select.select([commands.fileno(), *readable], (), (), wait_s)
            for handle in ready:
                if handle != commands.fileno():
                    self._read_frames(index_of[handle])
                elif not commands.follow(self.cut, self.heal):
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


def _open_tap(name: str) -> int:
    handle = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(handle, _TUNSETOFFLOAD, _OFFLOADS)
    return handle
