"""Bounded types of message fields, and the bounds on lists of them. What is out of bounds never becomes a message."""

from typing import Annotated

from pydantic import Field, StringConstraints

from orion.common.ids import DataId, Digest, Hotkey, MicrobatchId
from orion.common.protocol.age import AGE_MAX

MINERS_MAX = 16_384
CONTRIBUTIONS_MAX = MINERS_MAX * (AGE_MAX + 1)
"""In one merge: a miner may have a late one beside that of the outer step."""
STAGES_MAX = 512
VALIDATORS_MAX = 1_024
"""Many times what a subnet has."""
BATCH_MAX = 4_096
STALENESS_MAX = 64
"""Inner steps between a forward and its backward."""
PARTITIONS_MAX = 4_096
UPLOADS_MAX = 64
"""Objects in one request to write: with `PART_URLS_MAX`, an answer has 4 MB of URLs at most."""
PART_URLS_MAX = 64
"""Parts of one object that are granted at a time: a gigabyte or more."""
OBJECT_PARTS_MAX = 10_000
"""Parts of one object, which is what S3 takes."""
STATE_PARTS_MAX = 16_384
"""Parts of a stage's anchor and momentum: enough for 60 billion parameters in one stage."""
BOUNDARY_PEERS_MAX = 256
"""Neighbours that a miner reports on, both directions together; the busiest when there are more."""
BOUNDARY_PAGE_MAX = 64
"""Such reports in one answer: 4 MB at most."""
"""Such reports in one answer: 8 MB at most."""
LOG_ENTRIES_MAX = 1_000_000
COMMITMENTS_MAX = 256
"""Commitments of one miner in one outer step: one every few seconds of a train phase of minutes."""
PROOF_NODES_MAX = 16_384
"""More than a log of `LOG_ENTRIES_MAX` entries needs for a proof under `COMMITMENTS_MAX` roots."""

Ss58 = Annotated[Hotkey, StringConstraints(pattern=r"^[1-9A-HJ-NP-Za-km-z]{46,49}$")]
Blake3 = Annotated[Digest, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Url = Annotated[
    str,
    StringConstraints(pattern=r"^https?://([A-Za-z0-9][A-Za-z0-9.-]{0,250}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?$"),
]
"""Scheme, host and port: no user, no path, nothing that could be read in two ways."""
ObjectKey = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,11}$", max_length=512)
]
Text = Annotated[str, StringConstraints(max_length=500)]
GrantedUrl = Annotated[str, StringConstraints(max_length=4096)]
Header = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,256}$")]
"""Name or value of an HTTP header: visible ASCII."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Microbatch = Annotated[MicrobatchId, Field(ge=0, le=2**53)]
Data = Annotated[DataId, Field(ge=0, le=2**53)]
StageIndex = Annotated[int, Field(ge=0, lt=STAGES_MAX)]
Step = Annotated[int, Field(ge=0, le=2**31)]
Age = Annotated[int, Field(ge=0, le=AGE_MAX)]
"""Outer steps that a contribution comes late."""
Rate = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
"""Bytes per second."""
Real = Annotated[float, Field(allow_inf_nan=False)]
UnixSeconds = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Duration = Annotated[float, Field(ge=0, le=3.2e7, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
