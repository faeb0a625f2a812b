"""A proxy in front of an S3 server that holds chosen requests half-way: the worst moment, for as long as it takes.

Requests and answers pass unchanged (signatures stay valid: they cover the Host header that the client sent).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.support.process import PATIENCE_S


@dataclass
class Held:
    """A request that will be, or is, held."""

    start: bytes
    """How its first line begins, `PUT /bucket/key`."""
    loop: asyncio.AbstractEventLoop
    client_ip: str = ""
    """Who sent it, once it is held."""
    _reached: threading.Event = field(default_factory=threading.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _torn: bool = False

    def wait(self, timeout_s: float = PATIENCE_S) -> None:
        """Returns once half of it has passed and the rest waits; TimeoutError if nobody sends it."""
        if not self._reached.wait(timeout_s):
            raise TimeoutError(f"no request {self.start.decode()!r} within {timeout_s:.0f} s")

    def tear(self) -> None:
        """Loses the rest: the server is left with half a request."""
        self._torn = True
        self.release()

    def release(self) -> None:
        """Lets the rest pass, whether or not the client still lives: a late write."""
        self.loop.call_soon_threadsafe(self._released.set)

    async def is_torn(self) -> bool:
        """Waits for `release` or `tear`."""
        self._reached.set()
        await self._released.wait()
        return self._torn


class S3Gate:
    """Runs in a thread from `start` to `stop`."""

    def __init__(self, upstream_url: str, *, checkpoint_s: float = 0.0) -> None:
        """`checkpoint_s`: what each upload of a checkpoint takes at least, so that a run on a fast machine lasts."""
        self._checkpoint_s = checkpoint_s
        upstream = urlsplit(upstream_url)
        self._host, self._upstream_port = str(upstream.hostname), upstream.port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="s3-gate", daemon=True)
        self._helds: list[Held] = []
        self.url = ""

    def start(self) -> S3Gate:
        """Listens at a free port of the server's address."""
        self._thread.start()
        server = self._do(asyncio.start_server(self._serve, self._host, 0))
        self.url = f"http://{self._host}:{server.sockets[0].getsockname()[1]}"
        return self

    def stop(self) -> None:
        """Drops all connections."""
        self._do(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def hold(self, start: str) -> Held:
        """Holds the next request whose first line begins so, once."""
        held = Held(start.encode(), self._loop)
        self._helds.append(held)
        return held

    @contextmanager
    def checkpoints_take(self, seconds: float) -> Iterator[None]:
        """That long each, for as long as the block lasts."""
        before_s, self._checkpoint_s = self._checkpoint_s, seconds
        try:
            yield
        finally:
            self._checkpoint_s = before_s

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self._host, self._upstream_port)
        answers = asyncio.ensure_future(_pump(server_reader, writer))
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                server_writer.write(head)  # before the body: the client may wait for the server's "100 Continue"
                body_bytes = _content_length(head)
                held = next((held for held in self._helds if head.startswith(held.start)), None)
                if held is not None:
                    self._helds.remove(held)
                    body = await reader.readexactly(body_bytes)
                    server_writer.write(body[: body_bytes // 2])
                    held.client_ip = writer.get_extra_info("peername")[0]
                    if await held.is_torn():
                        return
                    server_writer.write(body[body_bytes // 2 :])
                    continue
                if head.startswith(b"PUT ") and b"/checkpoints/" in head.partition(b"\r\n")[0]:
                    await asyncio.sleep(self._checkpoint_s)
                while body_bytes and (part := await reader.read(min(body_bytes, 1 << 16))):
                    server_writer.write(part)
                    await server_writer.drain()
                    body_bytes -= len(part)
        except (asyncio.IncompleteReadError, OSError):
            pass  # the client is gone, or cut off
        finally:
            server_writer.close()
            with suppress(OSError):
                await answers
            writer.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0
