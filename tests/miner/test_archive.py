"""One contract over both archives: what was committed to is there after any end of the process, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.errors import ConfigError, DataError
from orion.common.ids import DataId, Digest, MicrobatchId, Operation
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.log import log_root
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import EvidenceRequest, LogEntry
from orion.miner.archive import OUTER_STEPS_KEPT, Archive, error_request
from orion.miner.disk_archive import DiskArchive
from orion.miner.memory_archive import MemoryArchive, MemoryDisk

BYTES_MAX = 1 << 20
Open = Callable[[int], Archive]


def body_of(number: int) -> Body:
    return encode({"g": torch.full((25,), float(number))})


BODY_BYTES = body_of(0).size_bytes


class Disks:
    """Opens archives over the same disk, one after the other, as processes do."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.memory = MemoryDisk()
        self.archive: Archive | None = None

    def open(self, bytes_max: int = BYTES_MAX) -> Archive:
        """A new process; the one before has been killed."""
        self.close()
        self.archive = (
            MemoryArchive(self.memory, bytes_max) if self.folder is None else DiskArchive(self.folder, bytes_max)
        )
        return self.archive

    def close(self) -> None:
        if isinstance(self.archive, DiskArchive):
            self.archive.close()


@pytest.fixture(params=["memory", "disk"])
def disks(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    disks = Disks(tmp_path / "state" if request.param == "disk" else None)
    yield disks
    disks.close()


def entry_of(number: int) -> LogEntry:
    return LogEntry(
        operation=Operation.BACKWARD,
        microbatch_id=MicrobatchId(number),
        data_id=DataId(number),
        inner_step=0,
        input_digest=body_of(number).digest,
        output_digest=body_of(-number).digest,
    )


def commitment_to(entries: list[LogEntry], outer_step: int = 0) -> Commitment:
    return Commitment(
        outer_step=outer_step,
        num_entries=len(entries),
        num_applied=len(entries),
        num_contributed=0,
        num_kept=0,
        root=log_root(entries),
        is_final=False,
    )


def work(archive: Archive, numbers: range, outer_step: int = 0) -> list[LogEntry]:
    """The device hands in the tensors of these operations; their entries."""
    for number in numbers:
        archive.add(
            outer_step,
            Operation.BACKWARD,
            MicrobatchId(number),
            came_in=body_of(number),
            went_out=body_of(-number),
        )
    return [entry_of(number) for number in numbers]


def request_of(number: int, outer_step: int = 0, side: str = "input") -> EvidenceRequest:
    return EvidenceRequest.model_validate(
        {"outer_step": outer_step, "microbatch_id": number, "operation": Operation.BACKWARD, "side": side}
    )


def has(archive: Archive, number: int, outer_step: int = 0) -> bool:
    """Whether both bodies are there; if so they must be the right ones."""
    found = archive.get(request_of(number, outer_step)), archive.get(request_of(number, outer_step, "output"))
    if None in found:
        return False
    assert found == (body_of(number).tobytes(), body_of(-number).tobytes())
    return True


def test_what_was_committed_to_outlives_the_process_and_what_was_not_does_not(disks: Disks) -> None:
    archive = disks.open()
    assert archive.kept() == ()
    archive.begin(0)
    entries = work(archive, range(1, 4))
    first = archive.persist(2, entries, commitment_to(entries))
    assert first.num_kept == 3
    more = work(archive, range(4, 6))
    second = archive.persist(2, more, commitment_to([*entries, *more]))
    work(archive, range(6, 8))

    archive = disks.open()
    (log,) = archive.kept()
    assert (log.stage_index, log.entries, log.commitment) == (2, (*entries, *more), second)
    assert [has(archive, number) for number in range(1, 8)] == [True] * 5 + [False] * 2


def test_a_log_goes_on_after_the_process_ended(disks: Disks) -> None:
    archive = disks.open()
    archive.begin(0)
    entries = work(archive, range(1, 3))
    archive.persist(1, entries, commitment_to(entries))
    work(archive, range(3, 4))

    archive = disks.open()
    archive.begin(0)  # counts as an operation: the log says that it begins anew
    anew = LogEntry(
        operation=Operation.BEGIN_ANEW,
        microbatch_id=None,
        data_id=None,
        inner_step=0,
        input_digest=None,
        output_digest=None,
    )
    more = [anew, *work(archive, range(5, 7))]
    commitment = archive.persist(1, more, commitment_to([*entries, *more]))
    assert commitment.num_kept == 5

    archive = disks.open()
    assert archive.kept()[0].entries == (*entries, *more)
    assert [has(archive, number) for number in (1, 2, 3, 5, 6)] == [True, True, False, True, True]


def test_within_the_budget_a_prefix_is_kept_and_the_commitment_says_so(disks: Disks) -> None:
    budget = OUTER_STEPS_KEPT * 5 * BODY_BYTES
    archive = disks.open(budget)
    archive.begin(0)
    entries = work(archive, range(1, 4))
    assert archive.persist(0, entries, commitment_to(entries)).num_kept == 2
    archive.add(0, Operation.INNER_STEP)
    more = [*entries, entry_of(9)]
    assert archive.persist(0, more[3:], commitment_to(more)).num_kept == 2, "a hole ends it, whatever would fit"
    assert [has(archive, number) for number in range(1, 4)] == [True, True, False]

    archive = disks.open(budget)
    archive.begin(0)
    entries = [*more, *work(archive, range(4, 5))]
    assert archive.persist(0, entries[4:], commitment_to(entries)).num_kept == 2


def test_only_the_newest_outer_steps_are_kept(disks: Disks) -> None:
    archive = disks.open()
    for outer_step in range(OUTER_STEPS_KEPT + 2):
        archive.begin(outer_step)
        entries = work(archive, range(1, 3), outer_step)
        archive.persist(0, entries, commitment_to(entries, outer_step))
    expected = [False, False, *[True] * OUTER_STEPS_KEPT]
    assert [has(archive, 1, outer_step) for outer_step in range(OUTER_STEPS_KEPT + 2)] == expected
    archive = disks.open()
    assert [log.commitment.outer_step for log in archive.kept()] == list(range(2, OUTER_STEPS_KEPT + 2))
    assert [has(archive, 1, outer_step) for outer_step in range(OUTER_STEPS_KEPT + 2)] == expected


def test_a_commitment_to_nothing_is_kept_too(disks: Disks) -> None:
    archive = disks.open()
    assert archive.persist(1, (), commitment_to([], 3)).num_kept == 0
    (log,) = disks.open().kept()
    assert (log.commitment.outer_step, log.entries) == (3, ())


# --- files ------------------------------------------------------------------------------------------------------------


def written(folder: Path) -> tuple[Path, list[int], list[LogEntry]]:
    """A file with three commitments, its size after each, and the log."""
    archive = DiskArchive(folder, BYTES_MAX)
    archive.begin(0)
    entries: list[LogEntry] = []
    sizes: list[int] = []
    (path,) = [folder / "0000000000.log"]
    for start in (1, 3, 5):
        more = work(archive, range(start, start + 2))
        entries += more
        archive.persist(0, more, commitment_to(entries))
        sizes.append(path.stat().st_size)
    archive.close()
    return path, sizes, entries


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_torn_tail_is_cut_back_to_the_last_commitment(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    path, sizes, entries = written(folder)
    whole = path.read_bytes()
    place = data.draw(st.integers(0, sizes[-1] - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:place])
    else:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    num_whole = sum(size <= place for size in sizes)

    archive = DiskArchive(folder, BYTES_MAX)
    assert [len(log.entries) for log in archive.kept()] == ([2 * num_whole] if num_whole else [])
    assert [has(archive, number) for number in range(1, 7)] == [number <= 2 * num_whole for number in range(1, 7)]
    archive.begin(0)
    more = work(archive, range(10, 11))
    archive.persist(0, more, commitment_to([*entries[: 2 * num_whole], *more]))
    archive.close()

    again = DiskArchive(folder, BYTES_MAX)
    assert again.kept()[0].entries == (*entries[: 2 * num_whole], *more)
    again.close()


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    archive = DiskArchive(tmp_path, BYTES_MAX)
    with pytest.raises(ConfigError, match="another process"):
        DiskArchive(tmp_path, BYTES_MAX)
    archive.close()
    DiskArchive(tmp_path, BYTES_MAX).close()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        DiskArchive(tmp_path / "file" / "state", BYTES_MAX)


def test_files_of_another_version_are_told_and_left_alone(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path)
    text = path.read_bytes()
    start = text.index(b'{"stage_index"')
    named = text[start : text.index(b"}}", start) + 2]
    head = text.index(b"orn1\x02")
    content_bytes = int.from_bytes(text[head + 9 : head + 17], "little")
    record = text[head : head + 17] + named.replace(b"num_kept", b"num_lost")
    record += text[start + len(named) : start + len(named) + content_bytes]
    path.write_bytes(record + blake3(record).digest())
    with pytest.raises(DataError, match="not of this version"):
        DiskArchive(tmp_path, BYTES_MAX)
    assert path.exists()


def test_a_full_disk_is_told_and_nothing_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = DiskArchive(tmp_path, BYTES_MAX)
    archive.begin(0)
    entries = work(archive, range(1, 3))
    folder_file = Path("/dev/full")
    monkeypatch.setattr(DiskArchive, "_path", lambda self, outer_step: folder_file)
    with pytest.raises(DataError, match=r"No space left.*make room"):
        archive.persist(0, entries, commitment_to(entries))
    archive.close()


def test_when_nobody_may_ask_any_more_nothing_is_left(tmp_path: Path) -> None:
    written(tmp_path)
    archive = DiskArchive(tmp_path, BYTES_MAX)
    assert has(archive, 1)
    archive.discard()
    archive.close()
    assert not has(archive, 1)
    assert list(tmp_path.iterdir()) == []
    again = DiskArchive(tmp_path, BYTES_MAX)
    assert again.kept() == ()
    again.close()


def test_digests_of_bodies_on_disk_are_those_of_the_log(tmp_path: Path) -> None:
    _, _, entries = written(tmp_path)
    archive = DiskArchive(tmp_path, BYTES_MAX)
    for entry in entries:
        assert entry.microbatch_id is not None
        body = archive.get(request_of(entry.microbatch_id))
        assert body is not None
        assert Digest(blake3(body).hexdigest()) == entry.input_digest
    archive.close()


def test_an_error_state_outlives_the_process_and_is_handed_out_as_evidence(disks: Disks) -> None:
    archive = disks.open()
    assert archive.error(3) is None
    archive.keep_error(3, body_of(1))
    archive.keep_error(3, body_of(2))
    archive = disks.open()
    assert archive.error(3) == body_of(2).tobytes()
    assert archive.get(error_request(3)) == body_of(2).tobytes()
    for outer_step in range(4, 4 + OUTER_STEPS_KEPT):
        archive.keep_error(outer_step, body_of(outer_step))
    assert archive.error(3) is None
    assert archive.error(4) is not None
