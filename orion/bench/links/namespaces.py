"""The peers' ends of a network: a namespace each, with one device `eth0`, its address, and its upload limit.

Owns the plan, the names, and how `ip` and `tc` are called. Must not know how the ends are joined.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from orion.bench.links.profile import LinkProfile

DEVICE = "eth0"
"""A peer's end of its link, in its namespace."""
RING_FRAMES = 1000
UPLOAD_QUEUE_BYTES = 16_000_000
"""More than the kernel lets sockets have waiting in their own machine, so nothing is lost."""
TOOL_S = 30.0
_REMOVE_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What network is to be made."""

    prefix: str
    """Of the namespaces' names; peer i lives in `PREFIX-i`, the kernel's bridge in `PREFIX-hub`."""
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
        """The peers'."""
        return tuple(f"{self.prefix}-{index}" for index in range(len(self.profiles)))

    @property
    def hub(self) -> str:
        """The namespace that no peer lives in."""
        return f"{self.prefix}-hub"

    @property
    def needs_switch(self) -> bool:
        """Whether a link asks for more than the kernel does by itself."""
        return any(profile.needs_switch for profile in self.profiles)


def address(index: int) -> str:
    """Of a peer, within every emulated network: these addresses exist in its namespaces alone."""
    return f"10.77.0.{index + 1}"


def mac(index: int) -> bytes:
    """Of a peer's device."""
    return bytes([2, 0, 0, 0, 77, index + 1])


def remove_namespaces(names: Sequence[str]) -> None:
    """Those that there are; processes in them go on without a network."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=_REMOVE_S)


def run_ip(lines: Sequence[str], namespace: str | None = None) -> None:
    """Runs lines of `ip` in one process; stops at the first that fails, with CalledProcessError."""
    where = [] if namespace is None else ["-n", namespace]
    text = "".join(f"{line}\n" for line in lines)
    subprocess.run(
        ["ip", *where, "-batch", "-"], input=text, text=True, check=True, capture_output=True, timeout=TOOL_S
    )


def run_tc(namespace: str, *arguments: str) -> str:
    """Runs one `tc`; what it says. Raises CalledProcessError."""
    command = ["tc", "-n", namespace, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TOOL_S).stdout


def set_up_end(plan: Plan, index: int) -> None:
    """Gives the device that lies in a peer's namespace its addresses and its limit, and starts it."""
    namespace, profile = plan.namespaces[index], plan.profiles[index]
    others = [other for other in range(len(plan.profiles)) if other != index]
    run_ip(
        [
            f"link set {DEVICE} address {mac(index).hex(':')} txqueuelen {RING_FRAMES} addrgenmode none",
            f"addr add {address(index)}/24 dev {DEVICE}",
            f"link set {DEVICE} up",
            "link set lo up",
            *(
                f"neigh replace {address(other)} lladdr {mac(other).hex(':')} dev {DEVICE} nud permanent"
                for other in others
            ),
        ],
        namespace,
    )
    if profile.upload_mbit is not None:
        limit_rate(namespace, DEVICE, profile.upload_mbit, UPLOAD_QUEUE_BYTES)


def limit_rate(namespace: str, device: str, mbit: float, queue_bytes: int) -> None:
    """Lets no more out of a device; what finds `queue_bytes` waiting before it is lost."""
    # A burst of two full frames at least, so that no frame must be cut up, and of 2 ms, so that the rate is reached.
    burst_bytes = max(140_000, int(mbit * 1e6 / 8 * 2e-3))
    arguments = f"tbf rate {round(mbit * 1e6)}bit burst {burst_bytes} limit {queue_bytes}".split()
    run_tc(namespace, "qdisc", "replace", "dev", device, "root", *arguments)
