"""A web server on loopback: ranges, etags, folders, redirects, and the weather of a network.

It is also as much of the Hugging Face hub as reading a data set asks for: the listing of a folder,
and files that redirect to a store.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "Bearer hf_secret"
"""What the private data set of the hub wants."""


class WebServer:
    """What it holds, what it was asked, and how it misbehaves."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        """Content by path, such as `/shards/00000.tar`."""
        self.requests: list[tuple[str, dict[str, str]]] = []
        """Path with query, and headers, of every request."""
        self.connections = 0
        self.redirects: dict[str, str] = {}
        self.failures: list[tuple[int, dict[str, str]]] = []
        """Status and headers of the next answers, before it answers in earnest."""
        self.has_ranges = True
        self.tells_length = True
        self.tag: Callable[[bytes], str] | None = lambda data: hashlib.sha256(data).hexdigest()[:9]
        self.cut_bytes: int | None = None
        """After so many bytes of an answer the connection is cut, without a word."""
        self.trickles = False
        """It sends a byte now and then, without end."""
        self.before_answer: Callable[[str], None] = lambda path: None

    def put(self, path: str, data: bytes) -> str:
        """Hold a file; its address."""
        self.files[path] = data
        return f"{self.url}{path}"

    def ranges(self, path: str) -> list[str]:
        """The ranges asked for of a file, in order."""
        return [h.get("range", "") for asked, h in self.requests if urlsplit(asked).path == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def setup(self) -> None:
        self.web.connections += 1
        super().setup()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.web.requests.append((self.path, headers))
        path = unquote(urlsplit(self.path).path)
        self.web.before_answer(path)
        if self.web.failures:
            status, fields = self.web.failures.pop(0)
            self._answer(status, b"", fields)
        elif path in self.web.redirects:
            self._answer(302, b"", {"Location": self.web.redirects[path]})
        elif path.startswith(("/datasets/", "/api/datasets/")):
            self._hub(path)
        elif path in self.web.files:
            self._file(self.web.files[path])
        elif path.endswith("/") and any(name.startswith(path) for name in self.web.files):
            self._folder(path)
        else:
            self._answer(404, b"no such thing", {})

    def _file(self, data: bytes) -> None:
        tag = self.web.tag
        fields = {"ETag": f'"{tag(data)}"'} if tag is not None else {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.web.has_ranges:
            self._answer(200, data, fields)
            return
        start, end = int(asked[1]), int(asked[2] or len(data) - 1)
        if start >= len(data):
            self._answer(416, b"", {**fields, "Content-Range": f"bytes */{len(data)}"})
            return
        end = min(end, len(data) - 1)
        fields["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self._answer(206, data[start : end + 1], fields)

    def _folder(self, path: str) -> None:
        names = {name.removeprefix(path).partition("/") for name in self.web.files}
        below = sorted(base + slash for base, slash, _ in names if not base.startswith("/"))
        links = ["../", "?C=M;O=D", "//elsewhere.example/9.tar", *below, f"{path}8/7.tar", "/7.tar"]
        page = "".join(f'<a href="{link}">{link}</a>\n' for link in links)
        self._answer(200, page.encode(), {"Content-Type": "text/html; charset=utf-8"})

    def _hub(self, path: str) -> None:
        if "private" in path and self.headers.get("Authorization") != TOKEN:
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})
            return
        if match := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/([^/]+)/(.+)", path):
            stored = f"/store/{match[1]}/{match[2]}/{match[3]}"
            if stored not in self.web.files:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            tag = hashlib.sha256(self.web.files[stored]).hexdigest()
            where = f"{stored}?signature={len(self.web.requests)}"
            self._answer(302, b"", {"Location": where, "X-Linked-ETag": f'"{tag}"'})
        elif match := re.fullmatch(r"/api/datasets/(\w+/\w+)/tree/([^/]+)/?(.*)", path):
            self._json(self._tree(f"/store/{match[1]}/{match[2]}/", match[3]))
        elif match := re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/revision/([^/]+))?", path):
            self._json({"id": match[1], "sha": "0" * 40, "siblings": []})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _tree(self, root: str, folder: str) -> list[dict[str, Any]]:
        prefix = f"{root}{folder}/" if folder else root
        entries: dict[str, dict[str, Any]] = {}
        for name, data in self.web.files.items():
            if name.startswith(prefix):
                base, slash, _ = name.removeprefix(prefix).partition("/")
                place = f"{prefix}{base}".removeprefix(root)
                entry = {"type": "directory", "oid": "0" * 40, "size": 0, "path": place}
                if not slash:
                    entry |= {"type": "file", "size": len(data)}
                entries[place] = entry
        return list(entries.values())

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, fields: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        if self.web.tells_length:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        # A client may have gone, which is its right.
        with suppress(OSError):
            if status in (200, 206) and self.web.trickles:
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            cut = self.web.cut_bytes
            if status in (200, 206) and cut is not None and cut < len(data):
                self.wfile.write(data[:cut])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.wfile.write(data)


@contextmanager
def serving_files(certificate: Path | None = None) -> Iterator[WebServer]:
    """The server on a free port, with TLS where a file of key and certificate is given."""
    web = WebServer()
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    web.url = f"{scheme}://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
