"""An HTTP server on this machine that serves a directory, and misbehaves as it is told."""

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Web:
    """`script[NAME]` lists what happens at the next requests for a file; afterwards `always`.

    "fine"; "stall": half of it, then silence; "trickle": half of it, then a byte now and then;
    "cut": half of it, then the end; "reset": half of it, then a reset connection; "long": a
    Content-Length of 1,024 bytes too many; "short": of half the bytes; "unsized": no
    Content-Length; "unsized cut"; any number: that status.
    """

    directory: Path
    ranges: bool = True
    script: dict[str, list[str]] = field(default_factory=dict)
    always: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)  # name, first byte asked for
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    def behaviour(self, name: str) -> str:
        if self.script.get(name):
            return self.script[name].pop(0)
        return self.always.get(name, "fine")


@contextmanager
def serving(directory: Path, **options: bool) -> Iterator[Web]:
    os.environ["NO_PROXY"] = "127.0.0.1"  # for the processes that are started, too
    web = Web(Path(directory), **options)

    class Handler(_Handler):
        served = web

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Web

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        web, name = self.served, os.path.relpath(self.path.partition("?")[0], "/")
        asked = self.headers.get("Range", "bytes=0-")
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        web.requests.append((name, first))
        behaviour = web.behaviour(name)
        file = web.directory / name
        if behaviour.isdecimal() or not file.is_file():
            self.send_response(int(behaviour) if behaviour.isdecimal() else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(file.read_bytes(), first if web.ranges else 0, behaviour)

    def _send(self, content: bytes, first: int, behaviour: str) -> None:
        self.send_response(206 if first else 200)
        size = {"long": len(content) + 1024, "short": len(content) // 2}.get(
            behaviour, len(content)
        )
        if first:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        if not behaviour.startswith("unsized"):
            self.send_header("Content-Length", str(size - first))
        self.end_headers()
        body = content[first:]
        if behaviour in ("stall", "trickle", "cut", "reset", "unsized cut"):
            body = body[: len(body) // 2]
        elif behaviour == "short":
            body = body[: size - first]
        try:
            self.wfile.write(body)
            self.wfile.flush()
            if behaviour == "stall":
                self.served.closing.wait(60)
            elif behaviour == "trickle":
                while not self.served.closing.wait(0.05):
                    self.wfile.write(content[first + len(body) :][:1])
                    body += b"?"
            elif behaviour == "reset":
                linger = struct.pack("ii", 1, 0)  # close with RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
        except OSError:
            pass  # the client has gone
