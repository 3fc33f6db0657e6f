"""The run's prepared data on this machine: opened where it lies already, otherwise fetched from the orchestrator."""

import asyncio
import os
from pathlib import Path

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.train.data import DatasetFile, TokenDataset, check_file, dataset_files
from orion.common.train.data_index import INDEX_BYTES_MAX, INDEX_FILE, read_index


async def open_data(orchestrator: OrchestratorClient, spec: RunSpec, folder: Path) -> TokenDataset:
    """The data that `spec` names, from `folder`; what is missing there is fetched, what does not fit is replaced.

    Several processes may share a folder that is complete. Raises DataError when the data is not the run's or the disk
    does not take it, RefusedError, TransportError.
    """
    try:
        return await asyncio.to_thread(TokenDataset.open, folder, spec.data_digest)
    except DataError:
        try:
            await _fetch(orchestrator, spec, folder)
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}; name another folder or free space") from error
    return await asyncio.to_thread(TokenDataset.open, folder, spec.data_digest)


async def _fetch(orchestrator: OrchestratorClient, spec: RunSpec, folder: Path) -> None:
    # The index comes last under its name: until then the folder holds no data set.
    fetched = folder / f"fetched-{os.getpid()}"
    await asyncio.to_thread(fetched.mkdir, parents=True, exist_ok=True)
    index_path = fetched / INDEX_FILE
    limits = spec.time_limits
    try:
        await orchestrator.fetch_data_file(
            INDEX_FILE,
            index_path,
            size_bytes_max=INDEX_BYTES_MAX,
            timeout_s=limits.transfer_grace_s + INDEX_BYTES_MAX / limits.bandwidth_floor_bytes_per_s,
        )
        index = await asyncio.to_thread(read_index, fetched)
        if spec.data_digest is not None and index.digest != spec.data_digest:
            raise DataError(f"the orchestrator serves data {index.digest}, the run needs {spec.data_digest}")
        for file in dataset_files(index):
            await _fetch_file(orchestrator, spec, folder, file)
        await asyncio.to_thread(index_path.replace, folder / INDEX_FILE)
    finally:
        await asyncio.to_thread(_remove, fetched)


async def _fetch_file(orchestrator: OrchestratorClient, spec: RunSpec, folder: Path, file: DatasetFile) -> None:
    path = folder / file.name
    if await asyncio.to_thread(_is_there, path, file):
        return
    limits = spec.time_limits
    digest = await orchestrator.fetch_data_file(
        file.name,
        path,
        size_bytes_max=file.size_bytes,
        timeout_s=limits.transfer_grace_s + file.size_bytes / limits.bandwidth_floor_bytes_per_s,
    )
    if digest != file.blake3:
        raise DataError(f"{path}: what the orchestrator serves is not what the run's index says")


def _is_there(path: Path, file: DatasetFile) -> bool:
    try:
        check_file(path, file.size_bytes, file.blake3)
    except DataError:
        return False
    return True


def _remove(folder: Path) -> None:
    (folder / INDEX_FILE).unlink(missing_ok=True)
    folder.rmdir()
