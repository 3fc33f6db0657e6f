"""What keeping logs and tensors costs a miner. Owns the measurement; decides nothing."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from orion.common.clock import Clock
from orion.common.ids import DataId, MicrobatchId, Operation
from orion.common.protocol.codec import encode
from orion.common.protocol.log import entry_bytes
from orion.common.protocol.merkle import MerkleTree
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import LogEntry
from orion.miner.disk_archive import DiskArchive

_NUM_COMMITMENTS = 8
_OPERATIONS = 20
"""Between two commitments, each with a body that came in and one that went out."""
_BODY_VALUES = 1 << 20
"""In bfloat16: 2 MB, a boundary of the large run."""


@dataclass(frozen=True, slots=True)
class ArchiveCost:
    """Medians."""

    body_bytes: int
    add_us: float
    """What an operation costs the device's thread."""
    persist_s: float
    """What a commitment costs beside it, until everything is durable."""
    persist_bytes: int
    """Written by it."""
    open_s: float
    """What a new process needs to find everything again."""
    open_bytes: int
    entry_us: float
    """What an entry costs in the Merkle tree."""


def archive_cost(folder: Path, clock: Clock) -> ArchiveCost:
    """Measures in `folder`, which should lie on the disk that is meant, and leaves nothing there."""
    body = encode({"z": torch.randn(_BODY_VALUES, dtype=torch.float32).to(torch.bfloat16)})
    archive = DiskArchive(folder, 1 << 40)
    archive.begin(0)
    entries: list[LogEntry] = []
    add_s: list[float] = []
    persist_s: list[float] = []
    for _ in range(_NUM_COMMITMENTS):
        new: list[LogEntry] = []
        for _ in range(_OPERATIONS):
            number = MicrobatchId(len(entries) + len(new))
            began_s = clock.monotonic_s()
            archive.add(0, Operation.FORWARD, number, came_in=body, went_out=body)
            add_s.append(clock.monotonic_s() - began_s)
            new.append(
                LogEntry(
                    operation=Operation.FORWARD,
                    microbatch_id=number,
                    data_id=DataId(number),
                    inner_step=0,
                    input_digest=body.digest,
                    output_digest=body.digest,
                )
            )
        entries += new
        began_s = clock.monotonic_s()
        archive.persist(0, new, _commitment(len(entries)))
        persist_s.append(clock.monotonic_s() - began_s)
    archive.close()
    began_s = clock.monotonic_s()
    archive = DiskArchive(folder, 1 << 40)
    open_s = clock.monotonic_s() - began_s
    archive.discard()
    began_s = clock.monotonic_s()
    MerkleTree([entry_bytes(entry) for entry in entries])
    return ArchiveCost(
        body_bytes=body.size_bytes,
        add_us=1e6 * statistics.median(add_s),
        persist_s=statistics.median(persist_s),
        persist_bytes=2 * _OPERATIONS * body.size_bytes,
        open_s=open_s,
        open_bytes=2 * len(entries) * body.size_bytes,
        entry_us=1e6 * (clock.monotonic_s() - began_s) / len(entries),
    )


def _commitment(num_entries: int) -> Commitment:
    return Commitment(
        outer_step=0,
        num_entries=num_entries,
        num_applied=0,
        num_contributed=0,
        num_kept=0,
        root=MerkleTree().root(),
        is_final=False,
    )
