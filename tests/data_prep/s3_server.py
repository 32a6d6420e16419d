"""An S3-compatible server on localhost (moto, in its own process), behind a gate that can fail."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

BUCKET = "flowreel"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1")


class Gate:
    """A TCP relay in front of the server, for the weather of a network.

    `state` is "open", "broken" (every request is answered by a 500) or "shut" (connections end at
    once).
    """

    def __init__(self, target: int) -> None:
        self.state = "open"
        self.sent_bytes = 0
        """What the server has sent so far."""
        self.requests: Counter[str] = Counter()
        """What it was asked so far, by method; listings are LIST."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.state == "shut":
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._back, args=(server, client), daemon=True).start()
                while data := client.recv(1 << 16):
                    if self.state != "open":
                        if self.state == "broken":
                            client.sendall(
                                b"HTTP/1.1 500 Internal Server Error\r\n"
                                b"Content-Length: 0\r\nConnection: close\r\n\r\n"
                            )
                        return
                    if request := _REQUEST.match(data):
                        is_list = b"list-type=" in request[2]
                        self.requests["LIST" if is_list else request[1].decode()] += 1
                    server.sendall(data)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                self.sent_bytes += len(data)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


class Store:
    """The server and the gate; `uri(name)` goes through the gate."""

    def __init__(self, port: int) -> None:
        self.gate = Gate(port)
        self.direct = fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}",
            scheme="http",
            region="us-east-1",
            access_key="test",
            secret_key="test",
            allow_bucket_creation=True,
        )
        self.direct.create_dir(BUCKET)

    def empty(self) -> None:
        """Forget all objects and counts, and open the gate."""
        self.gate.state = "open"
        self.direct.delete_dir_contents(BUCKET)
        self.gate.sent_bytes = 0
        self.gate.requests.clear()

    def uri(self, name: str) -> str:
        endpoint = f"endpoint_override=http://127.0.0.1:{self.gate.port}&region=us-east-1"
        return f"s3://{BUCKET}/{name}?{endpoint}"

    def upload(self, path: Path, name: str) -> str:
        with self.direct.open_output_stream(f"{BUCKET}/{name}") as stream:
            stream.write(path.read_bytes())
        return self.uri(name)

    def names(self, folder: str) -> list[str]:
        """Relative names of all objects below a folder, locks and all."""
        root = f"{BUCKET}/{folder}"
        selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
        entries = self.direct.get_file_info(selector)
        return [info.path.removeprefix(f"{root}/") for info in entries if info.is_file]

    def files(self, folder: str) -> dict[str, bytes]:
        """Content of every object below a folder, by relative name."""
        contents = {}
        for name in self.names(folder):
            with self.direct.open_input_stream(f"{BUCKET}/{folder}/{name}") as stream:
                contents[name] = bytes(stream.read())
        return contents


@contextlib.contextmanager
def running_store(folder: Path) -> Iterator[Store]:
    """moto's server on a free port of loopback, ended on leaving."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        (folder / "moto.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            store = Store(port)
            try:
                yield store
            finally:
                store.gate.close()
        finally:
            server.kill()
