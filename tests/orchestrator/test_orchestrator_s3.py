"""The whole orchestrator with its objects on a real S3 server."""

import asyncio
import secrets
from contextlib import closing
from pathlib import Path

import pytest
from orchestrator_http import MINER_KEYS, client, make_chain, make_config, orchestrator
from orchestrator_miner import HttpMiner
from orchestrator_world import make_spec
from seaweed import S3Server

from orion.cli.resume_source import find_checkpoint
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, DataError
from orion.common.net.checkpoint_folder import check_file, fetched
from orion.common.net.s3_access import make_client
from orion.common.net.s3_address import parse_s3_address
from orion.common.protocol.start import continued, whole_start

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture
def spec() -> RunSpec:
    return make_spec(num_stages=1, replicas=1, outer_steps=4, inner_steps=1, keep_outer_steps=2)


def keys_at(address: str) -> list[str]:
    """Of the objects, without the run's prefix."""
    where = parse_s3_address(address)
    with closing(make_client(where)) as s3:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=where.bucket, Prefix=where.prefix)
        return [found["Key"].removeprefix(where.prefix) for page in pages for found in page.get("Contents", ())]


async def test_a_run_on_s3_survives_its_orchestrator_and_tidies_up(tmp_path: Path, s3: S3Server, spec: RunSpec) -> None:
    address, chain = s3.address(secrets.token_hex(6)), make_chain()
    config = make_config(tmp_path, store=address)
    async with orchestrator(config, spec, chain) as url, client(MINER_KEYS[0], url, spec) as api:
        miner = HttpMiner(MINER_KEYS[0], spec, api)
        await miner.join()
        await miner.outer_step()
    async with orchestrator(config, spec, chain) as url, client(MINER_KEYS[0], url, spec) as api:
        miner = HttpMiner(MINER_KEYS[0], spec, api, sequence=miner.sequence)
        await miner.join()
        for _ in range(3):
            await miner.outer_step()
        await miner.until(lambda feed: feed.finished)
        async with asyncio.timeout(20.0):
            while True:
                keys = await asyncio.to_thread(keys_at, address)
                if not any(key.startswith("outer/0/") for key in keys):
                    break
                await asyncio.sleep(0.1)
    assert any(key.startswith("outer/4/stage/0/checkpoint/") for key in keys)
    assert not (tmp_path / "orchestrator" / "store").exists()
    with pytest.raises(ConfigError, match="another run's objects"):
        async with orchestrator(make_config(tmp_path / "other", store=address), spec, chain):
            pass
    await goes_on_elsewhere(tmp_path / "orchestrator", address, s3, spec)


async def goes_on_elsewhere(state: Path, address: str, s3: S3Server, spec: RunSpec) -> None:
    """Another run, under another prefix, begins with the checkpoint that a state folder's bucket holds."""
    found = find_checkpoint(state)
    assert (found.store, found.paths, found.checkpoint.outer_step) == (address, (), 4)
    there = await asyncio.to_thread(fetched, found, state.parent / "start")
    for path, ref in zip(there.paths, found.checkpoint.stages, strict=True):
        check_file(path, ref)
    further = continued(spec.with_values({"outer_steps": 6}), found.spec, found.checkpoint)
    config = make_config(state.parent / "further", store=s3.address(secrets.token_hex(6)), start_paths=there.paths)
    async with orchestrator(config, further, make_chain()):
        assert config.store is not None and further.start is not None
        wanted = {ref.object.key for ref in whole_start(further.start).stages}
        assert wanted <= set(await asyncio.to_thread(keys_at, config.store))
    where = parse_s3_address(address)
    with closing(make_client(where)) as client_of_bucket:
        key = where.prefix + found.checkpoint.stages[0].object.key
        await asyncio.to_thread(client_of_bucket.delete_object, Bucket=where.bucket, Key=key)
    with pytest.raises(DataError, match="no longer in bucket"):
        await asyncio.to_thread(fetched, found, state.parent / "too-late")
    assert await asyncio.to_thread(fetched, found, state.parent / "start") == there, "it had been fetched before"


async def test_a_store_that_cannot_be_used_ends_the_start(tmp_path: Path, s3: S3Server, spec: RunSpec) -> None:
    for address, told in ((s3.address("x", bucket="not-there"), "no bucket"), ("s3://", "bucket's name")):
        with pytest.raises(ConfigError, match=told):
            async with orchestrator(make_config(tmp_path, store=address), spec, make_chain()):
                pass
