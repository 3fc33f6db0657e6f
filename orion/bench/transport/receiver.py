"""The receiving process: a miner, a bare HTTP server and a bare socket, and how much processor time it has used.

Owns the three servers. Run as a program: prints its ports as a line of JSON, then its processor time in seconds for
each line on its standard input, and ends with that.
"""

import asyncio
import json
import socket
import sys
import threading

import torch
from aiohttp import web

from orion.bench.transport.cargo import run_spec
from orion.bench.transport.deviceless_miner import DevicelessMiner
from orion.common.clock import SystemClock, process_cpu_s
from orion.common.net.aiohttp_server import serve
from orion.common.protocol.codec import activation_spec, body_size

_HOST = "127.0.0.1"
UPLOAD_ROUTE = "/upload"


async def _serve() -> None:
    size_bytes = body_size(activation_spec(run_spec(), 1))
    miner = DevicelessMiner(SystemClock())
    bare = socket.create_server((_HOST, 0))
    threading.Thread(target=_accept, args=(bare, size_bytes), daemon=True).start()
    owning = asyncio.create_task(miner.run())
    bare_http = web.AppRunner(_http_app(size_bytes), access_log=None)
    await bare_http.setup()
    await web.TCPSite(bare_http, _HOST, 0).start()
    http_port = bare_http.addresses[0][1]
    async with serve(miner.server.app, _HOST, 0) as orion_port:
        _print({"orion": orion_port, "http": http_port, "socket": bare.getsockname()[1]})
        answering = asyncio.create_task(asyncio.to_thread(_answer))
        # The core's owner never ends by itself: if it does, that is its error.
        await asyncio.wait((answering, owning), return_when=asyncio.FIRST_COMPLETED)
        if owning.done():
            owning.result()
        await answering
    owning.cancel()
    await bare_http.cleanup()
    bare.close()


def _answer() -> None:
    for _ in sys.stdin:
        _print(process_cpu_s())


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _http_app(size_bytes: int) -> web.Application:
    """Takes a body and says so; looks at nothing."""

    async def upload(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    app = web.Application(client_max_size=2 * size_bytes)
    app.router.add_post(UPLOAD_ROUTE, upload)
    return app


def _accept(bare: socket.socket, size_bytes: int) -> None:
    while True:
        try:
            connection, _ = bare.accept()
        except OSError:
            return
        threading.Thread(target=_receive, args=(connection, size_bytes), daemon=True).start()


def _receive(connection: socket.socket, size_bytes: int) -> None:
    """Bodies of a known size into one buffer, each answered by a byte."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view = memoryview(bytearray(size_bytes))
    with connection:
        while True:
            position = 0
            while position < size_bytes:
                received = connection.recv_into(view[position:])
                if not received:
                    return
                position += received
            connection.sendall(b"+")


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(_serve())
