"""How `orion bench sync` shows its rows."""

from typing import Any

from orion.bench.sync.drive import SyncBench
from orion.bench.sync.plan import NUM_REPLICAS, Row, delay_s, floor_bytes, scheme_bytes


def format_row(row: Row) -> str:
    """One line for people."""
    ratio = "" if row.ratio is None else f", {row.ratio:.2f} × the floor of {row.floor_s:.2f} s"
    moved = ""
    if row.bytes_up is not None and row.bytes_down is not None:
        moved = f", {row.bytes_up / 1e6:.1f} MB up and {row.bytes_down / 1e6:.1f} MB down a replica"
    others = "".join(
        f"; {name} {seconds:.2f} s"
        for name, seconds in (("gloo", row.gloo_s), ("hivemind", row.hivemind_s))
        if seconds is not None
    )
    phases = " + ".join(f"{seconds:.2f}" for seconds in row.phases_s)
    return f"{row.name:>8}, {row.fault:>13}: {row.seconds:.2f} s ({phases}){ratio}{moved}{others}"


def report(rows: list[Row], bench: SyncBench) -> dict[str, Any]:
    """For `--json`."""
    up, down = scheme_bytes(bench.stage_bytes)
    return {
        "num_replicas": NUM_REPLICAS,
        "stage_bytes": bench.stage_bytes,
        "floor_bytes": floor_bytes(bench.stage_bytes),
        "scheme_bytes_up": up,
        "scheme_bytes_down": down,
        "grace_s": bench.spec.time_limits.transfer_grace_s,
        "settings": [row.as_json() | {"delay_s": delay_s(row, rows)} for row in rows],
    }
