"""Emulated links between real processes. Where namespaces can't be made, what is tested is that this is said."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orion.bench.links.network import EmulatedNetwork, LinkError
from orion.bench.links.profile import LinkProfile, Way

pytestmark = pytest.mark.xdist_group("processes")

NAMESPACES = Path("/run/netns")

ECHO = """
import socket, sys
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind((sys.argv[1], 7))
print("listening", flush=True)
while True:
    data, sender = link.recvfrom(2048)
    print(data.decode(), flush=True)
    link.sendto(data, sender)
"""

ASK = """
import socket, sys, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.settimeout(float(sys.argv[3]))
began_s = time.monotonic()
link.sendto(sys.argv[2].encode(), (sys.argv[1], 7))
try:
    link.recv(2048)
    print(time.monotonic() - began_s)
except TimeoutError:
    print("nothing")
"""

STREAM = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 80))
print("listening", flush=True)
stream, _ = listener.accept()
received, began_s = 0, time.monotonic()
while chunk := stream.recv(1 << 16):
    received += len(chunk)
print(received, time.monotonic() - began_s)
"""

SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 80)) as stream:
    stream.sendall(bytes(int(sys.argv[2])))
"""


@contextlib.contextmanager
def network_of(*profiles: LinkProfile) -> Iterator[EmulatedNetwork]:
    """Where this machine allows no network, the test is skipped, and says why."""
    network = EmulatedNetwork(profiles)
    try:
        network.__enter__()
    except LinkError as error:
        assert str(error).startswith(
            ("emulated links need", "emulated delays need", "no emulated links can be made here: ")
        )
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        stack.push(network.__exit__)
        yield network


@contextlib.contextmanager
def listening(network: EmulatedNetwork, peer: int, program: str) -> Iterator[subprocess.Popen[str]]:
    """A program that listens behind a peer's link."""
    command = network.command(peer, [sys.executable, "-c", program, network.address(peer)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        try:
            yield process
        finally:
            process.kill()


def ask(network: EmulatedNetwork, peer: int, other: int, text: str, wait_s: float = 10.0) -> str:
    arguments = [sys.executable, "-c", ASK, network.address(other), text, str(wait_s)]
    return subprocess.run(network.command(peer, arguments), capture_output=True, text=True, check=True).stdout.strip()


def wait_until_gone(names: list[str]) -> None:
    deadline_s = time.monotonic() + 20.0
    while any((NAMESPACES / name).exists() for name in names):
        assert time.monotonic() < deadline_s, "namespaces were left behind"
        time.sleep(0.02)


def test_a_round_trip_takes_at_least_both_delays_and_leaves_nothing_behind() -> None:
    with network_of(LinkProfile(delay_ms=40), LinkProfile(delay_ms=20)) as network:
        names = list(network.namespaces)
        with listening(network, 1, ECHO):
            assert 0.06 <= float(ask(network, 0, 1, "hello")) < 5.0
    assert network.figures is not None
    assert network.figures.num_delivered >= 2
    assert not any((NAMESPACES / name).exists() for name in names)


@pytest.mark.parametrize("delay_ms", [0.0, 1.0], ids=["bridge", "switch"])
def test_no_more_is_uploaded_than_the_link_allows(delay_ms: float) -> None:
    with network_of(LinkProfile(upload_mbit=16.0, delay_ms=delay_ms), LinkProfile()) as network:
        with listening(network, 1, STREAM) as receiver:
            sending = [sys.executable, "-c", SEND, network.address(1), "1500000"]
            subprocess.run(network.command(0, sending), check=True)
            assert receiver.stdout is not None
            received, seconds = receiver.stdout.readline().split()
        assert int(received) == 1_500_000
        # The burst, 140 kB, passes at once; the rest takes its time.
        assert float(seconds) >= (1_500_000 - 200_000) / 2e6


@pytest.mark.parametrize("delay_ms", [0.0, 1.0], ids=["bridge", "switch"])
def test_no_more_is_downloaded_than_the_link_allows_also_after_a_cut(delay_ms: float) -> None:
    with network_of(LinkProfile(delay_ms=delay_ms), LinkProfile(download_mbit=16.0)) as network:
        network.cut(1)
        network.heal(1)
        with listening(network, 1, STREAM) as receiver:
            sending = [sys.executable, "-c", SEND, network.address(1), "1500000"]
            subprocess.run(network.command(0, sending), check=True)
            assert receiver.stdout is not None
            received, seconds = receiver.stdout.readline().split()
    assert int(received) == 1_500_000
    assert float(seconds) >= (1_500_000 - 200_000) / 2e6


def test_a_link_can_be_slowed_down_where_the_kernel_joins_it() -> None:
    with network_of(LinkProfile(upload_mbit=160.0), LinkProfile()) as network:
        network.slow_down(0, 10.0)
        with listening(network, 1, STREAM) as receiver:
            subprocess.run(network.command(0, [sys.executable, "-c", SEND, network.address(1), "700000"]), check=True)
            assert receiver.stdout is not None
            received, seconds = receiver.stdout.readline().split()
    assert int(received) == 700_000
    assert float(seconds) >= (700_000 - 200_000) / 2e6
    with network_of(LinkProfile(delay_ms=1.0)) as network, pytest.raises(LinkError, match="kernel"):
        network.slow_down(0, 2.0)


@pytest.mark.parametrize("delay_ms", [0.0, 1.0], ids=["bridge", "switch"])
def test_a_link_that_is_cut_one_way_works_the_other_way_until_it_is_healed(delay_ms: float) -> None:
    profile = LinkProfile(upload_mbit=100.0, delay_ms=delay_ms)
    with network_of(profile, profile) as network, listening(network, 1, ECHO) as echo:
        assert echo.stdout is not None
        network.cut(1, Way.OUT)
        assert ask(network, 0, 1, "heard, not answered", wait_s=0.3) == "nothing"
        assert echo.stdout.readline() == "heard, not answered\n"
        network.heal(1)
        network.cut(1, Way.IN)
        network.cut(1, Way.IN)
        assert ask(network, 0, 1, "not heard", wait_s=0.3) == "nothing"
        network.heal(1)
        assert float(ask(network, 0, 1, "healed")) < 5.0
        assert echo.stdout.readline() == "healed\n"
    assert network.figures is not None
    assert network.figures.num_dropped >= 2
    assert network.figures.num_delivered >= 3


def test_a_link_that_was_healed_has_its_limit_again() -> None:
    with network_of(LinkProfile(upload_mbit=16.0), LinkProfile()) as network:
        network.cut(0)
        network.heal(0)
        with listening(network, 1, STREAM) as receiver:
            subprocess.run(network.command(0, [sys.executable, "-c", SEND, network.address(1), "700000"]), check=True)
            assert receiver.stdout is not None
            received, seconds = receiver.stdout.readline().split()
    assert int(received) == 700_000
    assert float(seconds) >= (700_000 - 200_000) / 2e6


def test_only_what_the_kernel_cannot_do_needs_the_switch() -> None:
    assert not LinkProfile(upload_mbit=20.0, download_mbit=9.0).needs_switch
    slower = [LinkProfile(delay_ms=1), LinkProfile(jitter_ms=1), LinkProfile(stall_every_s=1, stall_ms=1)]
    assert all(profile.needs_switch for profile in slower)


def test_a_network_ends_with_its_owner_however_that_ends() -> None:
    with network_of(LinkProfile()):
        pass
    program = """
import json, time
from orion.bench.links.network import EmulatedNetwork
from orion.bench.links.profile import LinkProfile
with EmulatedNetwork([LinkProfile()] * 2) as network:
    print(json.dumps(network.namespaces), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        names = json.loads(owner.stdout.readline())
        assert all((NAMESPACES / name).exists() for name in names)
        owner.send_signal(signal.SIGKILL)
    wait_until_gone(names)


def test_what_a_crash_of_everything_left_is_removed_by_the_next_network() -> None:
    with network_of(LinkProfile()):
        pass
    with subprocess.Popen(["true"]) as ended:
        pass
    left = f"orion-{ended.pid}-1-0"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with network_of(LinkProfile()) as network:
        assert network is not None
        wait_until_gone([left])


def test_without_root_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LinkError, match="need"):
        EmulatedNetwork([LinkProfile()]).__enter__()


def test_a_network_that_has_ended_says_so() -> None:
    with network_of(LinkProfile()) as network:
        pass
    with pytest.raises(LinkError, match="not running"):
        network.cut(0)
