"""Simulated processes: coroutines driven from the heap, and nothing left of a process that ended."""

from random import Random

from orion.simulator.clock import VirtualClock
from orion.simulator.host import Ask, AskAll, Host, Pause
from orion.simulator.network import Address, LinkProfile, Network, Respond


class Echo(Host):
    """Answers with what it was asked, and remembers what its own work heard."""

    def __init__(self, address: Address, clock: VirtualClock, network: Network) -> None:
        super().__init__(address, clock, network)
        self.heard: list[object] = []

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        respond(f"{self.address}: {request}", 10)

    async def work(self) -> None:
        self.heard.append(await Ask("b", "one"))
        await Pause(5.0)
        self.heard.append(await AskAll([Ask("b", "two"), Ask("nobody", "three"), Ask("b", "four")]))
        self.heard.append(await AskAll([]))


def pair() -> tuple[VirtualClock, Echo, Echo]:
    clock = VirtualClock()
    network = Network(clock, Random(1), LinkProfile())
    hosts = (Echo("a", clock, network), Echo("b", clock, network))
    for host in hosts:
        host.start()
    return clock, *hosts


def test_work_goes_on_by_itself_to_its_end() -> None:
    clock, a, _ = pair()
    a.spawn(a.work())
    while clock.step():
        pass
    assert a.heard == ["b: one", ["b: two", None, "b: four"], []]


def test_nothing_of_a_process_that_ended_goes_on() -> None:
    clock, a, _ = pair()
    happened: list[str] = []
    a.after(1.0, lambda: happened.append("timer"))
    a.spawn(a.work())
    clock.schedule(0.5, a.kill)
    while clock.step():
        pass
    assert a.heard == ["b: one"]
    assert happened == []


def test_cancelled_work_stops_where_it_waits() -> None:
    clock, a, _ = pair()
    work = a.work()
    a.spawn(work)
    clock.schedule(1.0, lambda: a.cancel(work))
    while clock.step():
        pass
    a.cancel(work)
    assert a.heard == ["b: one"]
