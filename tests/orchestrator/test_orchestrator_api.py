"""The real server on loopback, with real signatures: a whole run, restarts, and what is refused."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from orchestrator_http import (
    MINER_KEYS,
    ORCHESTRATOR_KEY,
    STRANGER_KEY,
    VALIDATOR_KEY,
    client,
    make_chain,
    make_config,
    orchestrator,
)
from orchestrator_miner import HttpMiner, body_of
from orchestrator_world import make_spec

from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.errors import ConfigError
from orion.common.ids import PROTOCOL_VERSION, Phase
from orion.common.ledger.book import LedgerBook
from orion.common.ledger.work import microbatch_flops
from orion.common.net.http import HttpClient
from orion.common.net.object_client import ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol import routes
from orion.common.protocol.entries import Said, chained, entry_to_json, first_digest
from orion.common.protocol.keys import pseudo_gradient_key
from orion.common.protocol.messages import (
    Done,
    GrantRequest,
    Join,
    LeaseRequest,
    ObjectRef,
    Refusal,
    RefusalCode,
    Report,
    UploadRequest,
)
from orion.common.protocol.records import (
    Ledger,
    RunStatus,
    Verdict,
)
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import hotkey_of, is_proven, sign_request


@pytest.fixture
def spec() -> RunSpec:
    return make_spec(num_stages=1, replicas=1)


@contextlib.asynccontextmanager
async def ready_miner(url: str, spec: RunSpec, number: int = 0) -> AsyncIterator[HttpMiner]:
    async with client(MINER_KEYS[number], url, spec) as api:
        miner = HttpMiner(MINER_KEYS[number], spec, api)
        await miner.join()
        yield miner


async def status_of(url: str) -> RunStatus:
    async with HttpClient() as http:
        return await OrchestratorClient.status(http, url)


async def text_of(url: str) -> str:
    async with HttpClient() as http:
        return (await http.read("GET", url, timeout_s=5.0)).decode()


async def check_public_ledger(url: str, spec: RunSpec, told: Ledger) -> None:
    """Anybody can read it, verify every word in it, and come to what the orchestrator says follows from it."""
    book, digest, num_said = LedgerBook(spec.num_stages), first_digest(spec.digest), 0
    async with HttpClient() as http:
        page = await OrchestratorClient.read_entries(http, url, 0)
    assert page.num_entries == len(page.entries)
    for entry in page.entries:
        digest = chained(digest, entry_to_json(entry))
        assert book.take(entry.sequence, entry.fact).changed
        if isinstance(entry.fact, Said):
            num_said += 1
            assert entry.fact.proof is not None
            assert is_proven(entry.fact.proof, entry.fact.hotkey, hotkey_of(ORCHESTRATOR_KEY), entry.fact.message)
            assert spec.digest in entry.fact.proof.target
    assert num_said >= 9
    assert digest == page.head
    assert book.summary(0, page.num_entries, digest, microbatch_flops(spec)) == told


async def test_a_report_in_another_spelling_is_malformed(tmp_path: Path, spec: RunSpec) -> None:
    """Nobody else could rebuild what was signed."""
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url, aiohttp.ClientSession() as session:
        for body, status in ((b'{"sequence": 0}', 400), (Report(sequence=0).model_dump_json().encode(), 409)):
            target = f"{routes.REPORT}?protocol={PROTOCOL_VERSION}&run={spec.digest}"
            nonce_ns = int(SystemClock().now_s() * 1e9)
            headers = sign_request(MINER_KEYS[0], "POST", target, body, hotkey_of(ORCHESTRATOR_KEY), nonce_ns=nonce_ns)
            async with session.post(url + target, data=body, headers=headers) as answer:
                assert answer.status == status
                code = Refusal.model_validate_json(await answer.read()).code
                assert code is (RefusalCode.MALFORMED if status == 400 else RefusalCode.NOT_MEMBER)


async def test_a_whole_run_over_http(tmp_path: Path, spec: RunSpec) -> None:
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url:
        async with HttpClient() as http:
            told, hotkey = await OrchestratorClient.run_spec(http, url)
        assert told == spec and hotkey == hotkey_of(ORCHESTRATOR_KEY)
        assert await text_of(url + routes.HEALTH) == "ok"
        async with ready_miner(url, spec) as miner:
            for _ in range(spec.outer_steps):
                await miner.outer_step()
            feed = await miner.until(lambda feed: feed.finished)
            assert feed.stages[0].phase is Phase.DONE
            ledger = await miner.api.ledger(0)
            assert [record.num_microbatches for record in ledger.work] == [4, 4, 4]
            assert len((await miner.api.manifests(0, 0)).manifests) == 3
            assert [r.commitment.num_applied for r in (await miner.api.commitments(1)).records] == [4]
            pathways = await miner.api.pathways(2, 1)
            assert (pathways.miners, pathways.total, len(pathways.pathways)) == ((miner.hotkey,), 4, 3)
            assert (await miner.api.boundaries(None)).records == ()
            async with HttpClient() as http:
                losses = await OrchestratorClient.losses(http, url, 10)
            assert (losses.total, len(losses.points)) == (12, 2)
            await check_public_ledger(url, spec, ledger)
            async with HttpClient() as http:
                pay = await OrchestratorClient.miner(http, url, miner.hotkey)
                assert [(step.num_credited, step.num_committed) for step in pay.steps] == [(4, 4)] * 3
                total = sum(record.flops for record in ledger.work)
                assert pay.score == pytest.approx(total * spec.validation.unverified_factor)
                assert pay.verified_outer_step is None
                assert pay.waiting_flops == pay.counted_flops == total
                with pytest.raises(RefusedError, match="no such miner"):
                    await OrchestratorClient.miner(http, url, hotkey_of(STRANGER_KEY))
        status = await status_of(url)
        assert status.finished and status.microbatches_applied == 12 and status.anchors_equal
        metrics = await text_of(url + routes.METRICS)
        for line in (
            "orion_finished 1.0",
            'orion_microbatches_total{outcome="applied"} 12.0',
            'orion_stage_phase{phase="done",stage="0"} 1.0',
            'orion_members{stage="0",state="active"} 1.0',
            "orion_loss 2.0",
            'orion_requests_total{route="/v1/lease",status="200"} 3.0',
        ):
            assert line in metrics.splitlines()


async def test_a_run_goes_on_after_the_orchestrator_was_stopped_and_started_in_every_phase(
    tmp_path: Path, spec: RunSpec
) -> None:
    chain = make_chain()
    steps = ["join", "train", "upload", "reduce", "apply", "checkpoint"]
    num_applied = 0
    for number, step in enumerate(steps):
        async with (
            orchestrator(make_config(tmp_path), spec, chain) as url,
            client(MINER_KEYS[0], url, spec) as api,
        ):
            miner = HttpMiner(MINER_KEYS[0], spec, api, sequence=10 * number)
            if step == "join":
                async with ready_miner(url, spec):
                    continue
            if step == "train":
                await miner.until(lambda feed: feed.peers[0].state == "active")
                num_applied = await miner.train()
            elif step == "upload":
                await miner.upload(num_applied)
            else:
                await getattr(miner, step)()
    async with orchestrator(make_config(tmp_path), spec, chain) as url, ready_miner(url, spec) as miner:
        feed = await miner.feed()
        assert (feed.stages[0].phase, feed.stages[0].outer_step) == (Phase.TRAIN, 1)
        assert feed.stages[0].checkpoint is not None
        await miner.outer_step()
        status = await status_of(url)
        assert status.microbatches_applied == 8 and status.outer_step == 2
        assert sum("away" in notice for notice in status.notices) == len(steps)


async def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, spec: RunSpec) -> None:
    async with orchestrator(make_config(tmp_path), spec, make_chain()):
        pass
    with pytest.raises(ConfigError, match="belongs to the run"):
        async with orchestrator(make_config(tmp_path), make_spec(), make_chain()):
            pass


async def test_a_taken_port_is_told_in_one_line(tmp_path: Path, spec: RunSpec) -> None:
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with orchestrator(make_config(tmp_path / "other", port=port), spec, make_chain()):
                pass


async def test_who_is_not_registered_gets_nothing(tmp_path: Path, spec: RunSpec) -> None:
    async with (
        orchestrator(make_config(tmp_path), spec, make_chain()) as url,
        ready_miner(url, spec),
        client(STRANGER_KEY, url, spec) as api,
    ):
        join = Join(url="http://127.0.0.1:9", device="cpu", memory_bytes=1)
        grant = GrantRequest(keys=("outer/0/stage/0/checkpoint/x.safetensors",))
        for asking in (api.join(join), api.feed(0, 0.0), api.ledger(0), api.manifests(0, 0), api.grants(grant)):
            with pytest.raises(RefusedError) as refused:
                await asking
            assert refused.value.code is RefusalCode.FORBIDDEN


async def test_only_validators_judge(tmp_path: Path, spec: RunSpec) -> None:
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url, ready_miner(url, spec) as miner:
        verdict = Verdict(miner=miner.hotkey, outer_step=0, passed=True, num_operations=4)
        with pytest.raises(RefusedError) as refused:
            await miner.api.verdict(verdict)
        assert refused.value.code is RefusalCode.FORBIDDEN
        async with client(VALIDATOR_KEY, url, spec) as validator:
            assert await validator.verdict(verdict) == Done()
            assert len((await validator.ledger(0)).verdicts) == 1


async def test_wrong_run_wrong_signature_and_rubbish_change_nothing(tmp_path: Path, spec: RunSpec) -> None:
    other_run = make_spec(num_stages=1, replicas=1, seed=9)
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url, ready_miner(url, spec) as miner:
        before = (await status_of(url)).miners
        async with client(MINER_KEYS[1], url, other_run) as api:
            with pytest.raises(RefusedError) as refused:
                await api.join(Join(url="http://127.0.0.1:9", device="cpu", memory_bytes=1))
            assert refused.value.code is RefusalCode.RUN_MISMATCH
            assert spec.digest in str(refused.value) and other_run.digest in str(refused.value)
        async with RpcClient(MINER_KEYS[1], spec.digest) as rpc:
            for_another = OrchestratorClient(rpc, url, miner.hotkey)
            with pytest.raises(RefusedError) as refused:
                await for_another.leave("signed for somebody else")
            assert refused.value.code is RefusalCode.BAD_SIGNATURE
            target, headers = rpc.signed_head("POST", hotkey_of(ORCHESTRATOR_KEY), routes.JOIN, {})
            async with aiohttp.ClientSession() as session:
                async with session.post(url + target, headers=headers, data=b'{"kind": "join"}') as answer:
                    assert answer.status == 401  # the body is not the signed one
                async with session.post(url + target, headers=headers, data=b"x" * 70_000) as answer:
                    assert answer.status == 413
                async with session.post(url + routes.LOSSES, data=b'{"kind": "loss_query", "x": 1}') as answer:
                    assert answer.status == 400
                async with session.get(url + "/v1/nowhere") as answer:
                    assert answer.status == 404 and "code" in await answer.json()
        assert (await status_of(url)).miners == before


async def test_objects_are_written_by_their_owner_in_their_phase_only(tmp_path: Path, spec: RunSpec) -> None:
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url, ready_miner(url, spec) as miner:
        key = pseudo_gradient_key(0, 0, miner.hotkey, 0)
        with pytest.raises(RefusedError) as refused:
            await miner.objects.put(key, body_of(1.0))
        assert refused.value.code is RefusalCode.WRONG_PHASE
        await miner.until(lambda feed: feed.peers[0].state == "active")
        await miner.train()
        ref = await miner.objects.put(key, body_of(1.0))
        assert await miner.objects.put(key, body_of(1.0)) == ref
        with pytest.raises(RefusedError) as refused:
            await miner.objects.put(key, body_of(2.0))
        assert refused.value.code is RefusalCode.CONFLICT
        async with client(MINER_KEYS[1], url, spec) as other:
            with pytest.raises(RefusedError) as refused:
                await ObjectClient(other).put(key, body_of(1.0))
            assert refused.value.code is RefusalCode.FORBIDDEN
            with pytest.raises(RefusedError) as refused:
                await ObjectClient(other).get(ref)
            assert refused.value.code is RefusalCode.WRONG_PHASE
        other_ref = ObjectRef(key=pseudo_gradient_key(0, 0, miner.hotkey, 1), digest=ref.digest, size_bytes=10)
        (grant,) = (await miner.api.uploads(UploadRequest(objects=(other_ref,)))).grants
        granted = url + grant.parts[0].url
        async with aiohttp.ClientSession() as session:
            async with session.put(granted, data=b"longer than ten bytes") as answer:
                assert answer.status == 413
            async with session.get(granted) as answer:
                assert answer.status == 403
            async with session.put(granted.replace("max=10", "max=99"), data=b"longer than ten") as answer:
                assert answer.status == 403


async def test_the_feed_waits_for_a_change_and_no_longer_than_asked(tmp_path: Path, spec: RunSpec) -> None:
    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url, ready_miner(url, spec) as miner:
        feed = await miner.until(lambda feed: feed.peers[0].state == "active")
        unchanged = await miner.api.feed(feed.version, 0.1)
        assert unchanged.version == feed.version
        waiting = asyncio.create_task(miner.api.feed(feed.version, 20.0))
        async with ready_miner(url, spec, 1):
            changed = await waiting
        assert changed.version > feed.version and len(changed.peers) == 2


async def test_stopping_answers_those_who_wait(tmp_path: Path, spec: RunSpec) -> None:
    running = contextlib.AsyncExitStack()
    url = await running.enter_async_context(orchestrator(make_config(tmp_path), spec, make_chain()))
    async with ready_miner(url, spec) as miner, asyncio.timeout(5.0):
        feed = await miner.until(lambda feed: feed.peers[0].state == "active")
        waiting = asyncio.create_task(miner.api.feed(feed.version, 30.0))
        # By its answer, the feed's request has come too.
        await miner.api.lease(LeaseRequest(outer_step=0, next_microbatch_id=0, num_microbatches=1))
        await running.aclose()
        assert (await waiting).version == feed.version


async def test_a_miner_whose_connection_breaks_off_is_not_waited_for_until_it_asks_again(tmp_path: Path) -> None:
    spec = make_spec(num_stages=1, replicas=2)

    async def told(url: str, words: str) -> None:
        async with asyncio.timeout(10.0):
            while not any(words in notice for notice in (await status_of(url)).notices):
                pass  # each look waits for an answer

    async with orchestrator(make_config(tmp_path), spec, make_chain()) as url, ready_miner(url, spec, 0) as miner:
        async with ready_miner(url, spec, 1) as other:
            await other.until(lambda feed: all(peer.state == "active" for peer in feed.peers))
        # Its connections are closed now, as at the end of its process.
        await told(url, f"{other.hotkey} of stage 0 is not waited for")
        async with client(MINER_KEYS[1], url, spec) as api:
            await api.feed(0, 0.0)
            await told(url, f"{other.hotkey} of stage 0 is heard again")
        assert not any(miner.hotkey in notice for notice in (await status_of(url)).notices)
