"""The whole validator over loopback HTTP: real requests, signatures, bodies, data and replays."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from blake3 import blake3
from ledger_kit import SignedLedger
from validator_world import make_feed
from working_miner import Cheat, WorkingMiner, answer_to, make_spec, trained

from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import Hotkey, Phase
from orion.common.ledger.reading import LedgerReading
from orion.common.ledger.sheet import differences
from orion.common.net.aiohttp_server import GATE, build_app, json_answer, serve, signed_json
from orion.common.net.chain import Hyperparameters
from orion.common.net.gate import Gate
from orion.common.net.memory_chain import ChainLedger, MemoryChain
from orion.common.net.tensor_server import tensor_answer
from orion.common.protocol import routes
from orion.common.protocol.codec import encode
from orion.common.protocol.entries import EntriesQuery, Said
from orion.common.protocol.messages import (
    Done,
    Feed,
    RefusalCode,
    RunInfo,
)
from orion.common.protocol.records import (
    CommitmentQuery,
    CommitmentRecord,
    Commitments,
    EvidenceRequest,
    LogRequest,
    ScoreSheet,
    Verdict,
    VerdictRecord,
)
from orion.common.protocol.refusals import refused
from orion.common.protocol.signing import Keypair, Verifier, hotkey_of, keypair_from_uri, proof_of
from orion.common.train.data import TokenDataset
from orion.common.train.data_index import DatasetIndex, SourceInfo, TokenizerInfo
from orion.common.train.shard_writer import ShardWriter
from orion.validator import service
from orion.validator.config import ValidatorConfig

ORCHESTRATOR = keypair_from_uri("//orchestrator")
VALIDATOR = keypair_from_uri("//validator")
MINER_KEYS = [keypair_from_uri(f"//miner-{number}") for number in range(3)]
MINERS = [hotkey_of(key) for key in MINER_KEYS]


def write_data(folder: Path) -> tuple[RunSpec, TokenDataset]:
    """A small data set of numbers, and a run on it."""
    spec = make_spec(validation={"checks_per_outer_step": 3, "replay_ops_max": 12})
    folder.mkdir()
    dtype = np.dtype("<u2")
    with (
        ShardWriter(folder, "train-{:05d}.bin", dtype, 1 << 20) as train,
        ShardWriter(folder, "heldout.bin", dtype, 1 << 20) as heldout,
    ):
        train.write(np.arange(20_000) * 7 % 512)
        heldout.write(np.arange(100))
        shards, (heldout_shard,) = train.finish(), heldout.finish()
    (folder / "tokenizer.json").write_bytes(b"{}")
    index = DatasetIndex(
        config=spec.data,
        source=SourceInfo(title="numbers", origin="the test", licence="none"),
        tokenizer=TokenizerInfo(size_bytes=2, blake3=blake3(b"{}").hexdigest(), vocab_size=512, eos_id=0),
        dtype="uint16",
        num_documents=1,
        train=shards,
        heldout=heldout_shard,
    )
    (folder / "index.json").write_bytes(index.to_bytes())
    return spec.model_copy(update={"data_digest": index.digest}), TokenDataset.open(folder, index.digest)


class OrchestratorStandIn:
    """Answers the validator's questions about one outer step, and finishes the run once it has three verdicts."""

    def __init__(self, spec: RunSpec, miners: dict[Hotkey, WorkingMiner], data: Path) -> None:
        self.spec, self.miners, self.data = spec, miners, data
        self.urls: dict[Hotkey, str] = {}
        self.verdicts: list[VerdictRecord] = []
        self.sheets: list[ScoreSheet] = []
        self.files: list[str] = []
        # Of other trips than the logs hold: its receipts name made-up tensors.
        self.ledger = SignedLedger(spec, first_microbatch_id=1_000)
        self.ledger.keys = [[key] for key in MINER_KEYS]
        self.ledger.train(7)
        self.ledger.merge()
        self.was_asked = asyncio.Event()
        self.app = build_app(Gate(Verifier(hotkey_of(ORCHESTRATOR)), spec.digest, SystemClock()))
        self.app.add_routes(
            [
                web.get(routes.RUN, self.run),
                web.get(routes.FEED, self.feed),
                web.get(routes.DATA + "/{name}", self.file),
                web.post(routes.COMMITMENTS, self.commitments),
                web.post(routes.ENTRIES, self.entries),
                web.post(routes.VERDICT, self.verdict),
                web.post(routes.SCORES, self.scores),
            ]
        )

    async def run(self, request: web.Request) -> web.Response:
        info = RunInfo(orchestrator=hotkey_of(ORCHESTRATOR), spec=self.spec.model_dump(mode="json"))
        return json_answer(info)

    async def feed(self, request: web.Request) -> web.Response:
        request.app[GATE].check(request.method, request.raw_path, request.query, request.headers, b"")
        self.was_asked.set()
        return json_answer(self._feed())

    def _feed(self) -> Feed:
        finished = len(self.verdicts) >= len(self.miners)
        feed = make_feed(
            self.spec,
            {name: miner.stage_index for name, miner in self.miners.items()},
            version=1 + finished,
            outer_step=int(finished),
            phase=Phase.DONE if finished else Phase.MERGE,
            finished=finished,
            validators=(hotkey_of(VALIDATOR),),
        )
        peers = tuple(peer.model_copy(update={"url": self.urls[peer.hotkey]}) for peer in feed.peers)
        return feed.model_copy(update={"peers": peers})

    async def file(self, request: web.Request) -> web.FileResponse:
        self.files.append(request.match_info["name"])
        return web.FileResponse(self.data / request.match_info["name"])

    async def commitments(self, request: web.Request) -> web.Response:
        await signed_json(request, CommitmentQuery)
        records = tuple(
            CommitmentRecord(hotkey=name, stage_index=miner.stage_index, commitment=miner.commitment())
            for name, miner in self.miners.items()
        )
        return json_answer(Commitments(records=records))

    async def entries(self, request: web.Request) -> web.Response:
        query = EntriesQuery.model_validate_json(await request.read())
        return json_answer(self.ledger.page(query.from_sequence))

    async def verdict(self, request: web.Request) -> web.Response:
        sender, verdict = await signed_json(request, Verdict)
        self.verdicts.append(VerdictRecord(validator=sender, verdict=verdict))
        self._keep(request, sender, verdict)
        return json_answer(Done())

    async def scores(self, request: web.Request) -> web.Response:
        sender, sheet = await signed_json(request, ScoreSheet)
        self.sheets.append(sheet)
        self._keep(request, sender, sheet)
        return json_answer(Done())

    def _keep(self, request: web.Request, sender: Hotkey, message: Verdict | ScoreSheet) -> None:
        proof = proof_of(request.headers, request.raw_path)
        self.ledger.fact(Said(hotkey=sender, stage_index=None, message=message, proof=proof))


@asynccontextmanager
async def miner_server(spec: RunSpec, key: Keypair, miner: WorkingMiner, withholds: bool) -> AsyncIterator[str]:
    """The two routes that a validator asks a miner on."""

    async def log(request: web.Request) -> web.Response:
        _, asked = await signed_json(request, LogRequest)
        return json_answer(answer_to(asked, miner.entries))

    async def evidence(request: web.Request) -> web.StreamResponse:
        _, asked = await signed_json(request, EvidenceRequest)
        if withholds:
            raise refused(RefusalCode.FORBIDDEN, "kept to itself")
        body = miner.bodies[asked.microbatch_id, asked.operation, asked.side]
        return tensor_answer(encode(body))

    app = build_app(Gate(Verifier(hotkey_of(key)), spec.digest, SystemClock()))
    app.add_routes([web.post(routes.LOG, log), web.post(routes.EVIDENCE, evidence)])
    async with serve(app, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


def make_chain() -> tuple[ChainLedger, MemoryChain]:
    owner = hotkey_of(keypair_from_uri("//owner"))
    rules = Hyperparameters(weights_rate_limit_blocks=0)
    ledger = ChainLedger(rules, owner=owner, stakes={hotkey_of(VALIDATOR): 10.0})
    for name in (hotkey_of(VALIDATOR), *MINERS):
        ledger.register(name)
    ledger.advance_to(rules.tempo)
    return ledger, MemoryChain(ledger, hotkey_of(VALIDATOR))


@pytest.mark.parametrize("data_is_there", [True, False])
async def test_a_run_is_validated_to_its_end(tmp_path: Path, data_is_there: bool) -> None:
    spec, dataset = write_data(tmp_path / "data")
    working = trained(spec, {1: Cheat(gradient=lambda gradient: gradient + gradient.std())}, dataset)
    miners = dict(zip(MINERS, working, strict=True))
    orchestrator = OrchestratorStandIn(spec, miners, tmp_path / "data")
    ledger, chain = make_chain()
    async with AsyncExitStack() as servers:
        for key, miner in zip(MINER_KEYS, working, strict=True):
            server = miner_server(spec, key, miner, withholds=miner.stage_index == 2)
            orchestrator.urls[hotkey_of(key)] = await servers.enter_async_context(server)
        port = await servers.enter_async_context(serve(orchestrator.app, "127.0.0.1", 0))
        config = ValidatorConfig(
            orchestrator_url=f"http://127.0.0.1:{port}",
            data_folder=tmp_path / ("data" if data_is_there else "fetched"),
            tick_s=0.02,
        )
        async with asyncio.timeout(30):
            await service.serve(config, VALIDATOR, chain)
    passed = {record.verdict.miner: record.verdict.passed for record in orchestrator.verdicts}
    assert passed[MINERS[0]]
    assert not passed[MINERS[2]]
    assert {record.validator for record in orchestrator.verdicts} == {hotkey_of(VALIDATOR)}
    honest = {name for name, verdict in passed.items() if verdict}
    weights = ledger.weights_of(hotkey_of(VALIDATOR))
    uids = {neuron.hotkey: neuron.uid for neuron in ledger.metagraph().neurons}
    assert set(weights) == {uids[name] for name in honest}
    sheet = orchestrator.sheets[-1]
    assert {share.hotkey for share in sheet.shares if share.score > 0} == honest
    reading = LedgerReading(spec)
    for entry in orchestrator.ledger.entries[: sheet.num_entries]:
        reading.take(entry)
    assert differences(sheet, reading.summary(), spec) == []
    assert bool(orchestrator.files) != data_is_there


async def test_a_validator_gives_up_when_the_orchestrator_stays_silent(tmp_path: Path) -> None:
    spec, dataset = write_data(tmp_path / "data")
    miners = dict(zip(MINERS, trained(spec, tokens=dataset), strict=True))
    orchestrator = OrchestratorStandIn(spec, miners, tmp_path / "data")
    orchestrator.urls = dict.fromkeys(MINERS, "http://127.0.0.1:9")
    _, chain = make_chain()
    async with serve(orchestrator.app, "127.0.0.1", 0) as port:
        config = ValidatorConfig(
            orchestrator_url=f"http://127.0.0.1:{port}",
            data_folder=tmp_path / "data",
            tick_s=0.02,
            silence_s_max=0.1,
        )
        task = asyncio.create_task(service.serve(config, VALIDATOR, chain))
        async with asyncio.timeout(30):
            await orchestrator.was_asked.wait()
    with pytest.raises(TransportError):
        async with asyncio.timeout(30):
            await task
