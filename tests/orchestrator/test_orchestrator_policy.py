"""What every signed route of the orchestrator answers to whom it must not serve, and that a nonce is good once."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from fastapi.routing import APIRoute
from orchestrator_http import (
    MINER_KEYS,
    ORCHESTRATOR_KEY,
    STRANGER_KEY,
    make_chain,
    make_config,
    orchestrator,
)
from orchestrator_world import make_spec
from prometheus_client import CollectorRegistry

from orion.common.clock import SystemClock
from orion.common.ids import PROTOCOL_VERSION, Phase
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.gate import Gate
from orion.common.net.object_routes import ObjectRoutes
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol import routes
from orion.common.protocol.messages import Heartbeat, Refusal, RefusalCode, RunInfo
from orion.common.protocol.signing import Keypair, NonceSource, Verifier, hotkey_of, sign_request
from orion.orchestrator.api import ApiParts, build_app
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.dashboard.live import LivePage
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.journal import SECRET_BYTES, Header, MemoryJournal
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.loop import OrchestratorLoop
from orion.orchestrator.metrics import LoopMetrics

SPEC = make_spec(num_stages=1, replicas=1)
UNSIGNED = {
    routes.RUN,
    routes.STATUS,
    routes.LOSSES,
    routes.PATHWAYS,
    routes.ENTRIES,
    routes.MINERS + "/{hotkey}",
    routes.BOUNDARIES,
    routes.HEALTH,
    routes.METRICS,
    routes.DASHBOARD,
    routes.DASHBOARD + "assets/{name:path}",
    routes.DASHBOARD + "page",
    routes.OBJECTS + "/{key:path}",
}
"""Open to anyone; an object's URL carries its own signature."""
NONCES = NonceSource()


def signed_routes(folder: Path) -> list[tuple[str, str]]:
    """Method and path of every route of the real application that is not open to anyone."""
    registry, clock = CollectorRegistry(), SystemClock()
    signer = UrlSigner(b"x" * 32)
    store = DirectoryStore(folder, signer)
    core = OrchestratorCore(SPEC, random.Random(1))
    journal = MemoryJournal(Header(SPEC.digest, bytes(SECRET_BYTES)))
    ledger = MemoryLedger(SPEC.digest)
    loop = OrchestratorLoop(
        core,
        journal,
        ledger,
        store,
        clock,
        metrics=LoopMetrics(registry),
        tick_s=1.0,
        queue_max=8,
        snapshot_events=1000,
    )
    gate = Gate(Verifier(hotkey_of(ORCHESTRATOR_KEY)), SPEC.digest, clock)
    run_info = RunInfo(orchestrator=gate.hotkey, spec=SPEC.model_dump(mode="json"))
    served = ObjectRoutes(store, signer, clock)
    page = LivePage(RunWatch(core), clock)
    app = build_app(
        ApiParts(run_info, ledger, loop, gate, store, served, clock, 1.0, {}, registry, page, lambda _: None)
    )
    found = [(method, route) for route in app.routes if isinstance(route, APIRoute) for method in sorted(route.methods)]
    assert {route.path for _, route in found} >= UNSIGNED
    return [(method, route.path.replace("{name}", "x")) for method, route in found if route.path not in UNSIGNED]


@dataclass(frozen=True)
class Ask:
    """A request that is wrong in one way, and what must come of it."""

    status: int
    code: RefusalCode
    key: Keypair = MINER_KEYS[0]
    protocol: int = PROTOCOL_VERSION
    run: str = SPEC.digest
    headers: Callable[[dict[str, str]], dict[str, str]] = lambda headers: headers
    named: tuple[str, ...] = ()
    """What the answer must say."""


def with_other_signature(headers: dict[str, str]) -> dict[str, str]:
    return headers | {"X-Bittensor-Signature": "0x" + "ab" * 64}


CASES = {
    "unsigned": Ask(401, RefusalCode.BAD_SIGNATURE, headers=lambda _: {}),
    "wrong signature": Ask(401, RefusalCode.BAD_SIGNATURE, headers=with_other_signature),
    "unknown hotkey": Ask(403, RefusalCode.FORBIDDEN, key=STRANGER_KEY),
    "other run": Ask(409, RefusalCode.RUN_MISMATCH, run="ab" * 32, named=("ab" * 32, SPEC.digest)),
    "other protocol": Ask(409, RefusalCode.PROTOCOL_MISMATCH, protocol=99, named=("99", str(PROTOCOL_VERSION))),
}


@pytest.mark.parametrize("case", CASES)
async def test_every_signed_route_refuses_alike(tmp_path: Path, case: str) -> None:
    ask = CASES[case]
    asked = signed_routes(tmp_path / "list")
    assert len(asked) >= 16
    async with (
        orchestrator(make_config(tmp_path), SPEC, make_chain()) as url,
        aiohttp.ClientSession() as session,
    ):
        for method, path in asked:
            target = f"{path}?protocol={ask.protocol}&run={ask.run}"
            body = b"" if method == "GET" else b"{}"
            nonce_ns = NONCES.next_ns(SystemClock().now_s())
            headers = sign_request(ask.key, method, target, body, hotkey_of(ORCHESTRATOR_KEY), nonce_ns=nonce_ns)
            async with session.request(method, url + target, data=body, headers=ask.headers(headers)) as answer:
                refusal = Refusal.model_validate_json(await answer.read())
            assert (path, answer.status, refusal.code) == (path, ask.status, ask.code)
            assert all(name in refusal.message for name in ask.named), refusal.message


async def test_a_request_that_was_taken_is_refused_by_an_orchestrator_that_was_started_again(tmp_path: Path) -> None:
    """Recorded and sent again, byte for byte, to the next process, which has no memory of nonces."""
    chain, skew_s = make_chain(), 0.5
    heartbeat = Heartbeat(
        outer_step=0,
        phase=Phase.TRAIN,
        ready_outer_step=None,
        inner_step=0,
        queued=0,
        in_flight=0,
        applied=0,
        tokens_per_s=0,
        busy_share=0,
    )
    body = heartbeat.model_dump_json().encode()
    target = f"{routes.HEARTBEAT}?protocol={PROTOCOL_VERSION}&run={SPEC.digest}"

    async def send(url: str, headers: dict[str, str]) -> tuple[int, Refusal | None]:
        async with aiohttp.ClientSession() as session, session.post(url + target, data=body, headers=headers) as answer:
            text = await answer.read()
            return answer.status, None if answer.status == 200 else Refusal.model_validate_json(text)

    def signed() -> dict[str, str]:
        nonce_ns = NONCES.next_ns(SystemClock().now_s())
        return sign_request(MINER_KEYS[0], "POST", target, body, hotkey_of(ORCHESTRATOR_KEY), nonce_ns=nonce_ns)

    config = make_config(tmp_path, clock_skew_s=skew_s)
    async with orchestrator(config, SPEC, chain) as url:
        recorded = signed()
        status, refusal = await send(url, recorded)
        assert refusal is not None and (status, refusal.code) == (409, RefusalCode.NOT_MEMBER), "it reached the core"
        status, refusal = await send(url, recorded)
        assert refusal is not None and (status, refusal.code) == (401, RefusalCode.BAD_SIGNATURE)
    async with orchestrator(config, SPEC, chain) as url:
        status, refusal = await send(url, recorded)
        assert refusal is not None and (status, refusal.code) == (429, RefusalCode.BUSY)
        # A new request is refused as well, but told when to come again; what is signed after that is taken.
        status, refusal = await send(url, signed())
        while refusal is not None and refusal.code is RefusalCode.BUSY:
            assert refusal.retry_after_s is not None and refusal.retry_after_s <= skew_s
            await asyncio.sleep(refusal.retry_after_s)
            status, refusal = await send(url, signed())
        assert refusal is not None and (status, refusal.code) == (409, RefusalCode.NOT_MEMBER)
        status, refusal = await send(url, recorded)
        assert refusal is not None and refusal.code is not RefusalCode.NOT_MEMBER, "still refused"
