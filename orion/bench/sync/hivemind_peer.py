"""One peer of hivemind's averager over as many bytes: `PYTHON hivemind_peer.py TASK`, run by an interpreter that has
hivemind and torch, and need not have Orion.

What is timed is the all-reduce alone: peers are matched beforehand, as a swarm does in the background, and begin
together when whoever started them writes a line. Standard input: first the first peer's address (an empty line for the
first peer itself), then two lines for each round, one to be matched and one to begin. Standard output: JSON lines.
"""

import json
import sys
import time

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager

_MATCHING_S = 5.0
"""For a group to be found; it ends sooner once it is full."""
_LIMIT_S = 300.0
_LOOK_S = 0.01
_TOLERANCE = 1e-3


def _say(told: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Averages, as often as it is told to."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    first = sys.stdin.readline().strip()
    dht = hivemind.DHT(
        initial_peers=[first] if first else None, host_maddrs=[f"/ip4/{task['address']}/tcp/0"], start=True
    )
    _say({"address": str(dht.get_visible_maddrs()[0])})
    averager = DecentralizedAverager(
        [torch.full((task["num_values"],), float(task["rank"]))],
        dht,
        prefix="orion-sync-bench",
        target_group_size=task["num_peers"],
        min_group_size=task["num_peers"],
        min_matchmaking_time=_MATCHING_S,
        request_timeout=2.0,
        start=True,
    )
    while sys.stdin.readline():
        control = averager.step(wait=False, require_trigger=True, timeout=_LIMIT_S)
        while control.stage.name in ("IDLE", "LOOKING_FOR_GROUP") and not control.done():
            time.sleep(_LOOK_S)
        _say({"matched": True})
        if not sys.stdin.readline():
            break
        began_s = time.monotonic()  # noqa: TID251 this interpreter need not have Orion
        control.allow_allreduce()
        control.result(_LIMIT_S)
        seconds = time.monotonic() - began_s  # noqa: TID251
        with averager.get_tensors() as (mean_N,):
            expected = (task["num_peers"] - 1) / 2
            is_mean = bool((mean_N - expected).abs().max() < _TOLERANCE)
        _say({"seconds": seconds, "is_mean": is_mean})
    averager.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
