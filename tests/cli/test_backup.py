"""`orion backup` and `orion restore` as people call them."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orion.cli.main import app
from orion.common.ids import Digest, Hotkey
from orion.common.protocol.messages import RunInfo
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.events import Ticked
from orion.orchestrator.journal import Header, Record
from orion.orchestrator.ledger_store import LEDGER_FILE, SqliteLedger
from orion.orchestrator.sql_journal import SqlJournal

RUN = Digest("a" * 64)


def test_what_was_backed_up_is_restored_where_the_address_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, copy = tmp_path / "old", tmp_path / "new", tmp_path / "copy"
    old.mkdir()
    header = Header(RUN, random.Random(1).randbytes(32))
    journal = SqlJournal(OrchestratorConfig(state_folder=old).journal_address, header)
    journal.append([Record(0, 1.0, Ticked()), Record(1, 2.0, Ticked())])
    SqliteLedger(old / LEDGER_FILE, RunInfo(orchestrator=Hotkey("5" * 48), spec={}), RUN).close()
    runner = CliRunner()
    told = runner.invoke(app, ["backup", str(copy), "--state", str(old), "--json"], catch_exceptions=False)
    journal.close()
    assert json.loads(told.stdout)["num_events"] == 2
    address = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    monkeypatch.setenv("ORION_JOURNAL", address)
    told = runner.invoke(app, ["restore", str(copy), "--state", str(new)], catch_exceptions=False)
    assert "2 events, 0 ledger entries" in told.stdout
    restored = SqlJournal(address, Header(RUN, b"x" * 32))
    assert restored.header == header
    assert restored.next_sequence == 2
    restored.close()
