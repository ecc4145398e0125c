"""A proxy before the S3 server that does what networks and busy servers do: lose an answer, come late, refuse.

Enters: a server's endpoint and a `Mischief`. Leaves: an endpoint of its own on 127.0.0.1. Costs: a thread a connection.
Requests pass with their headers as they came, `Host` too, so signatures stay valid. The client must be another process:
deltalake keeps the interpreter's lock while it waits for an answer, and this proxy needs it to give one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

#: Whether a request, by its method and path, is meant.
Meant = Callable[[str, str], bool]

_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)


def nothing(method: str, path: str) -> bool:
    return False


@dataclass
class Mischief:
    """lose: requests that reach the server while their answer does not come back. refuse: answered 503, and never seen
    by the server. delay: `meanwhile` runs before they are passed on. times: how often, in all, this happens."""

    lose: Meant = nothing
    refuse: Meant = nothing
    delay: Meant = nothing
    meanwhile: Callable[[], None] = lambda: None
    times: int = 1
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = Lock()

    def spend(self, meant: Meant, method: str, path: str) -> bool:
        with self._lock:
            if self.times <= 0 or not meant(method, path):
                return False
            self.times -= 1
            self.seen.append(f"{method} {path}")
            return True


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


@contextmanager
def proxy(endpoint: str, mischief: Mischief) -> Iterator[str]:
    """The proxy's endpoint, while the context lasts."""
    upstream = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self._body()
            if mischief.spend(mischief.refuse, self.command, self.path):
                self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
                return
            if mischief.spend(mischief.delay, self.command, self.path):
                mischief.meanwhile()
            connection = HTTPConnection(upstream, timeout=30)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":  # answered here
                        connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                answer = response.read()
            finally:
                connection.close()
            if mischief.spend(mischief.lose, self.command, self.path):
                self.close_connection = True
                return
            self._answer(response.status, dict(response.getheaders()), answer)

        def _body(self) -> bytes:
            """As it came, with its chunks' framing if it has one: pyarrow sends signed chunks."""
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts: list[bytes] = []
            size = 1
            while size:
                line = self.rfile.readline()
                size = int(line.partition(b";")[0], 16)
                parts += [line, self.rfile.read(size), self.rfile.readline()]
            while parts[-1].strip():  # trailers, up to an empty line
                parts.append(self.rfile.readline())
            return b"".join(parts)

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = _Quiet(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
