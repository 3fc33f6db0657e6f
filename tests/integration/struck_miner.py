"""A miner that a test can strike at a chosen stand of a microbatch. Run as a process of its own, only by tests.

`python -m struck_miner TASK_JSON`: once the file `order` lies in the task's folder for orders, it waits until a
microbatch from the order's `first_id` on stands where the order says, writes `fired` with the ids of all that stand
there, and is struck: `kill` and `stop` by its own hand, `cut` by whoever carries its packets, for whose file `cut` it
stands still.
"""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from orion.bench.workers import stop_when_stdin_closes
from orion.common.protocol.signing import keypair_from_uri
from orion.miner import service
from orion.miner.config import MinerConfig
from orion.miner.core import MinerCore
from orion.miner.effects import AskHolds, Effect, Refuse, SendCancel
from orion.miner.events import Event, SendEnded, SendOutcome
from orion.miner.table import Stand

CUT_WAIT_S = 10.0


def _tell(event: Event, effects: list[Effect], now_s: float) -> None:
    """Says what did not go as usual, for whoever reads why a microbatch was given up."""
    unusual: list[Event | Effect] = [effect for effect in effects if isinstance(effect, AskHolds | Refuse | SendCancel)]
    if isinstance(event, SendEnded) and event.outcome is not SendOutcome.ACCEPTED:
        unusual.insert(0, event)
    sys.stderr.writelines(f"{now_s:.3f} {each}\n" for each in unusual)


class StruckCore(MinerCore):
    """Decides as every miner does, until it is struck."""

    orders = Path()

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = super().handle(event, now_s)
        _tell(event, effects, now_s)
        if (self.orders / "order").exists():
            self._strike_if_there()
        return effects

    def _strike_if_there(self) -> None:
        order: dict[str, Any] = json.loads((self.orders / "order").read_text())
        standing = [item.microbatch_id for stand in order["stands"] for item in self._table.standing(Stand(stand))]
        there = [microbatch_id for microbatch_id in standing if microbatch_id >= order["first_id"]]
        if not there:
            return
        (self.orders / "order").unlink()
        (self.orders / "fired.part").write_text(json.dumps({**order, "microbatch_ids": there}))
        (self.orders / "fired.part").rename(self.orders / "fired")
        if order["blow"] == "cut":
            until_s = time.monotonic() + CUT_WAIT_S
            while not (self.orders / "cut").exists() and time.monotonic() < until_s:
                time.sleep(0.002)
        else:
            os.kill(os.getpid(), signal.SIGKILL if order["blow"] == "kill" else signal.SIGSTOP)


def main() -> None:
    """Is such a miner until it is told to stop."""
    task = json.loads(sys.argv[1])
    stop_when_stdin_closes()
    StruckCore.orders = Path(task["orders"])
    service.MinerCore = StruckCore  # type: ignore[misc]
    asyncio.run(service.serve(MinerConfig.model_validate(task["config"]), keypair_from_uri(task["key"])))


if __name__ == "__main__":
    main()
