"""The table of a microbatch's life in docs/ARCHITECTURE.md says what the core does, no more and no less."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import test_core_random
from miner_kit import Driver

from orion.common.ids import MicrobatchId
from orion.miner import effects as effect_types
from orion.miner.effects import Effect
from orion.miner.events import Event
from orion.miner.table import OPERATING, Held, MicrobatchTable, Stand

Change = tuple[Stand | None, Stand | None]
DOC = Path(__file__).parents[2] / "docs" / "ARCHITECTURE.md"
SEEDS = range(12)


def described() -> dict[Change, set[str]]:
    """The table's changes of stand, each with the effects that it names."""
    section = DOC.read_text(encoding="utf-8").split("## The life of a microbatch on a miner")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    changes: dict[Change, set[str]] = defaultdict(set)
    for before, _, after, effects in rows:
        names = {name for name in effects.split("`")[1::2]}
        changes[(_stand(before), _stand(after))] |= names
    return changes


def _stand(cell: str) -> Stand | None:
    return None if cell.strip() == "–" else Stand(cell.strip())


def _subject(effect: Effect) -> MicrobatchId | None:
    """The microbatch that an effect is about; None when it is not about a single one, or only by a request's number."""
    for name in ("transfer", "cancel", "job"):
        effect_part: Any = getattr(effect, name, None)
        if effect_part is not None:
            return getattr(effect_part, "microbatch_id", None)
    return getattr(effect, "microbatch_id", None)


class Recorder:
    """Notes each change of stand, and the effects of events that changed a microbatch's stand once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes: dict[Change, set[str]] = defaultdict(set)
        self._newest: list[tuple[MicrobatchId, Change]] = []
        admit, end, handle = MicrobatchTable.admit, MicrobatchTable.end, Driver.handle

        def watched_admit(table: MicrobatchTable, item: Held) -> None:
            self._newest.append((item.microbatch_id, (None, item.stand)))
            admit(table, item)

        def watched_end(table: MicrobatchTable, item: Held) -> object:
            self._newest.append((item.microbatch_id, (item.stand, None)))
            return end(table, item)

        def watched_set(item: Held, name: str, value: Any) -> None:
            if name == "stand" and getattr(item, "stand", value) is not value:
                self._newest.append((item.microbatch_id, (item.stand, value)))
            object.__setattr__(item, name, value)

        def watched_handle(driver: Driver, event: Event, after_s: float = 0.0) -> list[Effect]:
            self._newest.clear()
            effects = handle(driver, event, after_s)
            self._note(effects)
            return effects

        monkeypatch.setattr(MicrobatchTable, "admit", watched_admit)
        monkeypatch.setattr(MicrobatchTable, "end", watched_end)
        monkeypatch.setattr(Held, "__setattr__", watched_set)
        monkeypatch.setattr(Driver, "handle", watched_handle)

    def _note(self, effects: list[Effect]) -> None:
        by_microbatch: dict[MicrobatchId, list[Change]] = defaultdict(list)
        for microbatch_id, change in self._newest:
            by_microbatch[microbatch_id].append(change)
            self.changes[change] |= set()
        for microbatch_id, changes in by_microbatch.items():
            if len(changes) == 1:
                self.changes[changes[0]] |= {type(each).__name__ for each in effects if _subject(each) == microbatch_id}


def test_the_table_has_every_change_of_stand_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    for stage_index in range(3):
        for seed in SEEDS:
            test_core_random.run(stage_index, seed)

    told = described()
    assert set(recorder.changes) == set(told)
    for change, names in recorder.changes.items():
        # While a body is read or a pass computed, being doomed only marks a microbatch; both sides are told at once.
        marks = {"DropGraph", "SendCancel"} if change[1] in OPERATING else set()
        assert names - marks <= told[change], change


def test_the_table_names_effects_that_there_are() -> None:
    named = set[str]().union(*described().values())
    assert named <= {name for name, value in vars(effect_types).items() if isinstance(value, type)}
    assert {change[0] for change in described()} == {None, *Stand}
