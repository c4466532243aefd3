"""A publisher on this machine: serves files, and fails on demand."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Publisher:
    """An HTTP server in a thread."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        """Whether a part of a file can be asked for."""
        self.refusals: list[int] = []
        """Status of the next answers, instead of the file."""
        self.cuts: list[int] = []
        """Bytes after which the next answers break off."""
        self.requests: list[str | None] = []
        """The Range of every request."""
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                publisher.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.requests.append(wanted)
        body = self.files.get(request.path)
        if self.refusals or body is None:
            request.send_error(self.refusals.pop(0) if self.refusals else 404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked may have heard enough
            request.wfile.write(body[start:][: self.cuts.pop(0)] if self.cuts else body[start:])

    def stop(self) -> None:
        """Close the port; twice does no harm."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self._thread.join()
