"""A simulated network with the semantics of HTTP: a request ends at its caller in an answer or as unreachable.

It owns latency, bandwidth, loss and who is up; it does not read what it carries. Invariants: the caller hears exactly
once about each request; what the receiver did is not undone when the answer gets lost; a process that ended hears
nothing more, not even when its host comes up again as a new process. When a process ends, its machine breaks its
connections off, so callers and the hosts that it called learn it soon; when messages are lost, only time tells them.
All randomness comes from the generator that was passed in.

A host's link is modelled by serialised bytes: what leaves (or reaches) a host queues behind what left (reached) it
before. Where `LinkProfile.bulk_share` is set, what goes to and from a bulk host (the store) queues by itself, with that
share of each link: connections share a link, so a large upload does not hold up small messages.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from orion.simulator.clock import Timer, VirtualClock

Address = str
"""Names a host: a miner's hotkey, or a role's name."""
Respond = Callable[[object, int], None]
"""What a receiver calls with its answer and the answer's size in bytes; calls after the first change nothing."""
Handler = Callable[[Address, object, Respond], None]
"""How a host takes a request: sender, request, and where to put the answer, now or later."""
OnBroken = Callable[["Host"], None]
"""How a host learns that a process has ended which may have had connections to it."""


@dataclass(frozen=True, slots=True)
class ConnectionsBroken:
    """What the machine of a process that has ended tells the other ends of its connections."""


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """What joins the hosts of a simulation."""

    latency_s: float = 0.02
    """One way, median over pairs; each pair has its own, between half and twice this."""
    jitter_s: float = 0.005
    """Up to this much is added to each message, evenly."""
    up_bytes_per_s: float = 100e6
    down_bytes_per_s: float = 100e6
    bulk_share: float | None = None
    """Share of each link that transfers with bulk hosts have for themselves; None: everything is in one queue."""
    timeout_s: float = 5.0
    """A caller gives up on a request after this unless the request itself says otherwise."""


@dataclass(slots=True, eq=False)
class Impairment:
    """Something wrong with part of the network, until it is lifted. `None` stands for every host."""

    source: Address | None = None
    target: Address | None = None
    drop_share: float = 0.0
    duplicate_share: float = 0.0
    delay_s: float = 0.0
    """At most this is added to a message, evenly drawn; so messages overtake each other."""
    carries: type | None = None
    """Only messages of this type; `None` stands for all."""
    num_hits: int = 0
    """Messages it dropped, doubled or delayed so far."""

    def covers(self, source: Address, target: Address, message: object) -> bool:
        return (
            (self.source is None or self.source == source)
            and (self.target is None or self.target == target)
            and (self.carries is None or isinstance(message, self.carries))
        )


@dataclass(slots=True, eq=False)
class Lane:
    """What queues by itself on a host's link."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    up_free_s: float = 0.0
    down_free_s: float = 0.0


@dataclass(slots=True, eq=False)
class Host:
    """One process at an address: a process that starts there later is another `Host`."""

    handler: Handler
    on_broken: OnBroken | None
    lane: Lane
    bulk_lane: Lane
    """The same one where nothing is kept apart."""
    is_bulk: bool
    unanswered: "dict[_Exchange, None]" = field(default_factory=dict)
    """Requests that the process has taken and not answered, in the order in which they came."""


class Network:
    """Carries requests between hosts in virtual time."""

    def __init__(self, clock: VirtualClock, rng: Random, profile: LinkProfile) -> None:
        self._clock = clock
        self._rng = rng
        self._profile = profile
        self._hosts: dict[Address, Host] = {}
        self._latency_s: dict[tuple[Address, Address], float] = {}
        self._impairments: list[Impairment] = []
        self.num_messages = 0
        """Requests and answers that were put on the wire."""

    def attach(
        self,
        address: Address,
        handler: Handler,
        rate_share: float = 1.0,
        on_broken: OnBroken | None = None,
        *,
        is_bulk: bool = False,
    ) -> None:
        """A process starts at this address, with `rate_share` of the profile's rates; one that ran there has ended.
        `on_broken` hears of the end of every other process."""
        bulk_share = self._profile.bulk_share
        lane = self._lane(rate_share * (1.0 if bulk_share is None else 1.0 - bulk_share))
        bulk_lane = lane if bulk_share is None else self._lane(rate_share * bulk_share)
        self._hosts[address] = Host(handler, on_broken, lane, bulk_lane, is_bulk)

    def _lane(self, rate_share: float) -> Lane:
        return Lane(self._profile.up_bytes_per_s * rate_share, self._profile.down_bytes_per_s * rate_share)

    def detach(self, address: Address) -> None:
        """The process at this address ends: its connections break off, new ones are refused, it hears no answers."""
        host = self._hosts.pop(address, None)
        if host is not None:
            for exchange in host.unanswered:
                exchange.break_off()
            for target, other in self._hosts.items():
                if other.on_broken is not None:
                    self.carry(address, target, ConnectionsBroken(), 0, partial(self._tell_broken, target, other, host))

    @property
    def timeout_s(self) -> float:
        """What a request has for its answer that names no limit itself."""
        return self._profile.timeout_s

    def is_up(self, address: Address) -> bool:
        return address in self._hosts

    def impair(self, impairment: Impairment) -> None:
        """The impairment holds from now on."""
        self._impairments.append(impairment)

    def lift(self, impairment: Impairment) -> None:
        """The impairment holds no longer."""
        self._impairments.remove(impairment)

    def request(
        self,
        source: Address,
        target: Address,
        request: object,
        size_bytes: int,
        on_end: Callable[[object | None], None],
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Sends `request`; `on_end` hears the answer, or None once the target turned out to be unreachable."""
        assert source in self._hosts, f"{source} sends but does not run"
        exchange = _Exchange(self, source, target, request, on_end)
        limit_s = self._profile.timeout_s if timeout_s is None else timeout_s
        exchange.give_up = self._clock.schedule(limit_s, exchange.end_unreachable)
        self.carry(source, target, request, size_bytes, exchange.arrive)

    def carry(
        self, source: Address, target: Address, message: object, size_bytes: int, deliver: Callable[[], None], /
    ) -> None:
        """Puts one message on the wire; what the network does with it is drawn here."""
        self.num_messages += 1
        num_copies, extra_s = 1, 0.0
        for impairment in self._impairments:
            if not impairment.covers(source, target, message):
                continue
            if impairment.drop_share and self._rng.random() < impairment.drop_share:
                impairment.num_hits += 1
                return
            if impairment.duplicate_share and self._rng.random() < impairment.duplicate_share:
                impairment.num_hits += 1
                num_copies += 1
            if impairment.delay_s:
                impairment.num_hits += 1
                extra_s += self._rng.random() * impairment.delay_s
        for copy in range(num_copies):
            self._clock.schedule_at(self._arrival_s(source, target, size_bytes) + extra_s * (copy + 1), deliver)

    def latency_s(self, source: Address, target: Address) -> float:
        """One way between this pair, without jitter; drawn when first asked."""
        pair = (source, target) if source < target else (target, source)
        latency_s = self._latency_s.get(pair)
        if latency_s is None:
            latency_s = self._profile.latency_s * 2.0 ** self._rng.uniform(-1.0, 1.0)
            self._latency_s[pair] = latency_s
        return latency_s

    def after_refusal(self, source: Address, target: Address, action: Callable[[], None]) -> None:
        """`action` happens when `source` learns that nobody listens at `target`."""
        self._clock.schedule(self.latency_s(source, target), action)

    def host(self, address: Address) -> "Host | None":
        """The process that runs at this address now."""
        return self._hosts.get(address)

    def _tell_broken(self, target: Address, told: "Host", ended: "Host") -> None:
        if self._hosts.get(target) is told and told.on_broken is not None:
            told.on_broken(ended)

    def _arrival_s(self, source: Address, target: Address, size_bytes: int) -> float:
        """When the last byte is there. Reserves both links, in the order of sending."""
        arrival_s = self._clock.now_s()
        from_host, to_host = self._hosts.get(source), self._hosts.get(target)
        is_bulk = any(host is not None and host.is_bulk for host in (from_host, to_host))
        if from_host is not None:
            sender = from_host.bulk_lane if is_bulk else from_host.lane
            sender.up_free_s = max(arrival_s, sender.up_free_s) + size_bytes / sender.up_bytes_per_s
            arrival_s = sender.up_free_s
        arrival_s += self.latency_s(source, target) + self._rng.random() * self._profile.jitter_s
        if to_host is not None:
            receiver = to_host.bulk_lane if is_bulk else to_host.lane
            arrival_s = max(arrival_s, receiver.down_free_s + size_bytes / receiver.down_bytes_per_s)
            receiver.down_free_s = arrival_s
        return arrival_s


class _Exchange:
    """One request and its answer: the caller hears once, whatever happens to either."""

    __slots__ = ("_caller", "_network", "_on_end", "_request", "_source", "_target", "give_up")

    def __init__(
        self,
        network: Network,
        source: Address,
        target: Address,
        request: object,
        on_end: Callable[[object | None], None],
    ) -> None:
        self._network = network
        self._source = source
        self._target = target
        self._request = request
        self._on_end: Callable[[object | None], None] | None = on_end
        self._caller = network.host(source)
        self.give_up: Timer | None = None

    def arrive(self) -> None:
        """The request reaches its target; a doubled one does so twice."""
        network, target = self._network, self._target
        host = network.host(target)
        if host is None:
            self.break_off()
            return
        host.unanswered[self] = None
        answered = False

        def respond(answer: object, size_bytes: int) -> None:
            nonlocal answered
            if answered or network.host(target) is not host:
                return
            answered = True
            host.unanswered.pop(self, None)
            network.carry(target, self._source, answer, size_bytes, lambda: self._end(answer))

        host.handler(self._source, self._request, respond)

    def break_off(self) -> None:
        """Nobody listens at the target any more; the caller learns it in a moment."""
        self._network.after_refusal(self._source, self._target, self.end_unreachable)

    def end_unreachable(self) -> None:
        """No answer came in time, or nobody listens."""
        self._end(None)

    def _end(self, answer: object | None) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        if self.give_up is not None:
            self.give_up.cancel()
        if self._network.host(self._source) is self._caller:
            on_end(answer)
