"""Prepared data from the orchestrator: fetched once, checked wholly, never half there."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from blake3 import blake3
from net_loopback import SERVER

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.net.aiohttp_server import serve
from orion.common.net.data_client import open_data
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol import routes
from orion.common.train.data_index import DatasetIndex, SourceInfo, TokenizerInfo
from orion.common.train.shard_writer import ShardWriter


@pytest.fixture
def served(tmp_path: Path, spec: RunSpec) -> tuple[Path, RunSpec]:
    """A folder that the server hands out, and the run that it belongs to."""
    folder = tmp_path / "served"
    folder.mkdir()
    dtype = np.dtype("<u2")
    with (
        ShardWriter(folder, "train-{:05d}.bin", dtype, 1 << 20) as train,
        ShardWriter(folder, "heldout.bin", dtype, 1 << 20) as heldout,
    ):
        train.write(np.arange(1000))
        heldout.write(np.arange(100))
        shards, (heldout_shard,) = train.finish(), heldout.finish()
    (folder / "tokenizer.json").write_bytes(b"{}")
    index = DatasetIndex(
        config=spec.data,
        source=SourceInfo(title="numbers", origin="the test", licence="none"),
        tokenizer=TokenizerInfo(size_bytes=2, blake3=blake3(b"{}").hexdigest(), vocab_size=1000, eos_id=0),
        dtype="uint16",
        num_documents=1,
        train=shards,
        heldout=heldout_shard,
    )
    (folder / "index.json").write_bytes(index.to_bytes())
    return folder, spec.model_copy(update={"data_digest": index.digest})


@pytest.fixture
async def orchestrator(served: tuple[Path, RunSpec], rpc: RpcClient) -> AsyncIterator[OrchestratorClient]:
    async def file(request: web.Request) -> web.FileResponse:
        return web.FileResponse(served[0] / request.match_info["name"])

    app = web.Application()
    app.router.add_get(routes.DATA + "/{name}", file)
    async with serve(app, "127.0.0.1", 0) as port:
        client = OrchestratorClient(rpc, f"http://127.0.0.1:{port}", SERVER)
        yield client


async def test_data_is_fetched_once(
    orchestrator: OrchestratorClient, served: tuple[Path, RunSpec], tmp_path: Path
) -> None:
    folder, spec = served
    fetched = tmp_path / "deep" / "down"
    dataset = await open_data(orchestrator, spec, fetched)
    dataset.verify()
    assert sorted(path.name for path in fetched.iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        path.unlink()
    assert (await open_data(orchestrator, spec, fetched)).index.digest == spec.data_digest


async def test_what_is_damaged_is_replaced(
    orchestrator: OrchestratorClient, served: tuple[Path, RunSpec], tmp_path: Path
) -> None:
    _, spec = served
    fetched = tmp_path / "fetched"
    await open_data(orchestrator, spec, fetched)
    (fetched / "train-00000.bin").write_bytes(b"cut short")
    (await open_data(orchestrator, spec, fetched)).verify()


async def test_other_data_than_the_run_s_is_refused(
    orchestrator: OrchestratorClient, served: tuple[Path, RunSpec], tmp_path: Path
) -> None:
    folder, spec = served
    with pytest.raises(DataError, match="the run needs"):
        await open_data(orchestrator, spec.model_copy(update={"data_digest": "0" * 64}), tmp_path / "a")
    shard = folder / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match="index says"):
        await open_data(orchestrator, spec, tmp_path / "b")
    assert not (tmp_path / "b" / "index.json").exists()
    assert not list((tmp_path / "b").glob("fetched-*"))


async def test_a_folder_that_cannot_be_written_is_a_data_error(
    orchestrator: OrchestratorClient, served: tuple[Path, RunSpec], tmp_path: Path
) -> None:
    _, spec = served
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="another folder"):
        await open_data(orchestrator, spec, tmp_path / "file" / "below")
