"""The server of `selectflow watch`: a page on this machine's loopback address alone."""

from __future__ import annotations

import errno
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from selectflow.report.live import LivePage
from selectflow.report.runs import ReportError

HOST = "127.0.0.1"
DEFAULT_PORT = 8765
_NUM_PORTS = 20  # tried if no port is given
_HEADERS = {
    "Cache-Control": "no-store",
    # scripts and requests of this server alone, whatever a run or a sample is called
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Server(ThreadingHTTPServer):
    """Serves a page at `url`, and to this machine alone.

    Args:
        page: what is served.
        port: 0: any that is free.

    Raises:
        OSError: the port is taken, or may not be used.
    """

    allow_reuse_port = False  # a taken port is an error, not shared

    def __init__(self, page: LivePage, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.page = page
        self.url = f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a reader who has left; print the trace of a defect."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # a page of another site may have its name point here, and would read the answer
        if self.headers.get("Host") not in (
            f"{HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            self.send_error(403, "Host must be this machine")
            return
        if self.path == "/":
            self._answer("text/html", self.server.page.page())
        elif self.path == "/version":
            self._answer("text/plain", self.server.page.version())
        elif self.path == "/live.js":
            script = files("selectflow.report").joinpath("live.js").read_text("utf-8")
            self._answer("text/javascript", script)
        else:
            self.send_error(404)

    def _answer(self, kind: str, text: str) -> None:
        content = text.encode(errors="replace")
        self.send_response(200)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def open_server(page: LivePage, port: int | None) -> Server:
    """A server at a port; None: the first free one from 8765 on.

    Raises:
        ReportError: the port is taken, or may not be used.
    """
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _NUM_PORTS)
    for each in ports:
        try:
            return Server(page, each)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    tried = f"{port}" if port is not None else f"{ports[0]} to {ports[-1]}, all"
    raise ReportError(
        f"port must be free to use, got {tried} taken or not allowed; choose another by --port, "
        "or --port 0 for any"
    )
