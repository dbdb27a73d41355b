"""Real servers, started on free ports of this machine and ended with the test."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

STARTS_WITHIN_S = 30.0
_SET_PARENT_DEATH_SIGNAL = 1
"""Of prctl, on Linux."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is missing, which .ci/run installs")
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    port = free_port()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=_end_with_parent) as server:
        try:
            _wait_for(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.kill()


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """An S3 server in this process, and a bucket; the variables of AWS point to it meanwhile.

    One request at a time: moto compares If-Match and stores in two steps, which are one in S3.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=False)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("no_proxy", "*")
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("shelf")
        try:
            yield "s3://shelf/tuned?timeout_s=60"
        finally:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def http_server(folder: Path, *, read_only: bool = False, delay_s: float = 0.0) -> Iterator[str]:
    """GET and PUT of files, conditionally by ETag. `read_only` refuses to write, as static servers do."""
    folder.mkdir(exist_ok=True)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay_s)
            with lock:
                data = _bytes(folder / self.path.lstrip("/"))
            self._answer(404 if data is None else 200, data or b"", None if data is None else _etag(data))

        def do_PUT(self) -> None:
            path = folder / self.path.lstrip("/")
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if read_only:
                return self._answer(405)
            with lock:
                there = _bytes(path)
                if self.headers["If-None-Match"] == "*" and there is not None:
                    return self._answer(412)
                if self.headers["If-Match"] and (there is None or self.headers["If-Match"] != _etag(there)):
                    return self._answer(412)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            return self._answer(201)

        def _answer(self, code: int, data: bytes = b"", etag: str | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            if etag:
                self.send_header("ETag", etag)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _end_with_parent() -> None:
    """The server does not outlive a test run that is killed."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    pytest.fail(f"no server on port {port} within {STARTS_WITHIN_S:g} s")
