"""Paths of all routes, so that a client and a server can't spell one differently. Pure."""

from typing import Final

# Orchestrator
RUN: Final = "/v1/run"
STATUS: Final = "/v1/status"
LOSSES: Final = "/v1/losses"
PATHWAYS: Final = "/v1/pathways"
BOUNDARIES: Final = "/v1/boundaries"
JOIN: Final = "/v1/join"
HEARTBEAT: Final = "/v1/heartbeat"
LEAVE: Final = "/v1/leave"
FEED: Final = "/v1/feed"
LEASE: Final = "/v1/lease"
REPORT: Final = "/v1/report"
UPLOADED: Final = "/v1/uploaded"
REDUCED: Final = "/v1/reduced"
APPLIED: Final = "/v1/applied"
CHECKPOINT: Final = "/v1/checkpoint"
MANIFESTS: Final = "/v1/manifests"
MERGES: Final = "/v1/merges"
COMMITMENTS: Final = "/v1/commitments"
LEDGER: Final = "/v1/ledger"
MINERS: Final = "/v1/miners"
"""Followed by `/` and the miner's hotkey."""
ENTRIES: Final = "/v1/entries"
SCORES: Final = "/v1/scores"
VERDICT: Final = "/v1/verdict"
GRANTS: Final = "/v1/grants"
UPLOADS: Final = "/v1/uploads"
COMPLETE: Final = "/v1/complete"
OBJECTS: Final = "/v1/objects"
"""Followed by `/` and the object's key."""
DATA: Final = "/v1/data"
"""Followed by `/` and the file's name."""

DASHBOARD: Final = "/dashboard/"
"""The page for people; below it, its files (`assets/`), its data (`page`) and the stream of its changes (`live`)."""

# Miner
FORWARD: Final = "/v1/forward"
BACKWARD: Final = "/v1/backward"
CANCEL: Final = "/v1/cancel"
HOLDS: Final = "/v1/holds"
LOG: Final = "/v1/log"
EVIDENCE: Final = "/v1/evidence"
STATE: Final = "/v1/state"

# Everybody
HEALTH: Final = "/healthz"
METRICS: Final = "/metrics"

GRANT_WAIT_S_MAX: Final = 10.0
FEED_WAIT_S_MAX: Final = 30.0
"""Longest time that the feed may keep a caller waiting for a change."""
