"""What anyone may ask an orchestrator about its run."""

from orion.common.config import RunSpec
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.records import RunStatus


async def fetch_run(orchestrator_url: str) -> tuple[RunSpec, RunStatus]:
    """The run's specification and how it is doing. Raises TransportError and RefusedError."""
    async with HttpClient() as http:
        spec, _ = await OrchestratorClient.run_spec(http, orchestrator_url)
        return spec, await OrchestratorClient.status(http, orchestrator_url)
