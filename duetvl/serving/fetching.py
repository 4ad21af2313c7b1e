"""Files of other machines, over HTTP: from hosts that are allowed, at addresses that are public, and no further.

A name is resolved once. All of its addresses must be allowed, and one of them is connected to: a name that changes its
address between check and use (DNS rebinding) gains nothing. Redirects are not followed, and a number of seconds bounds
the whole exchange, a server that sends a byte now and then included.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import quote, urlsplit

from duetvl.core.errors import ConfigError, first_line, shown
from duetvl.serving.errors import ServerError
from duetvl.version import __version__

Resolve = Callable[[str, int], Sequence[str]]  # host, port -> addresses; OSError where there are none
MayConnect = Callable[[str], bool]  # whether an address may be connected to

_PORTS: Final = {"http": 80, "https": 443}
_LONGEST_URL: Final = 8192
_CHUNK: Final = 1 << 16
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_PATH: Final = "/%:@!$&'()*+,;=~"  # stay as they are, as letters and digits do
_QUERY: Final = _PATH + "?"
_UNSAFE: Final = re.compile(r"[\x00-\x20\x7f\\]")
_HOST: Final = re.compile(r"(\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:[0-9]{1,5})?")


class Target(NamedTuple):
    """Where a URL leads. `path` has the query with it."""

    scheme: str
    host: str
    port: int
    path: str


class Hosts:
    """The hosts that may be fetched from.

    `example.org` is that name alone, `*.example.org` every name below it, `*` every name. Without `:port` it is the
    port of the URL's scheme. Raises ConfigError for what is none of these.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        for entry in entries:
            if not _HOST.fullmatch(entry.lower()):
                raise ConfigError(
                    f"allowed media host {shown(entry)}: expected NAME, *.NAME or *, each with or without :PORT"
                )
        self.entries = tuple(entry.lower() for entry in entries)

    def allow(self, target: Target) -> bool:
        """Whether this may be fetched."""
        return any(_matches(entry, target) for entry in self.entries)


def _matches(entry: str, target: Target) -> bool:
    name, _, port = entry.partition(":")
    if target.port != (int(port) if port else _PORTS[target.scheme]):
        return False
    return name in ("*", target.host) or (name.startswith("*.") and target.host.endswith(name[1:]))


def parse_target(url: str) -> Target:
    """The parts of an http(s) URL. Raises ServerError where programs might read it in different ways."""
    if len(url) > _LONGEST_URL or _UNSAFE.search(url):
        raise _refused(f"it is not a URL of at most {_LONGEST_URL} characters without blanks and backslashes")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode().lower().rstrip(".")
    except (ValueError, UnicodeError) as error:
        raise _refused(f"it is not a URL: {first_line(error)}") from None
    if not host:
        raise _refused("it is not a URL: it names no host")
    if parts.username is not None or parts.password is not None:
        raise _refused("it has a user name in it; remove the part before the @")
    scheme = parts.scheme.lower()
    path, query = quote(parts.path or "/", safe=_PATH), quote(parts.query, safe=_QUERY)
    return Target(scheme, host, _PORTS[scheme] if port is None else port, f"{path}?{query}" if query else path)


def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a name, by the system's resolver. Raises OSError where there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; one that carries another inside needs both to be."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return _is_open(ip)
    if ip.ipv4_mapped is not None:
        return _is_open(ip.ipv4_mapped)
    carried = [ip.sixtofour, ip.teredo[1] if ip.teredo else None]
    carried.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
    return _is_open(ip) and not ip.is_site_local and all(each is None or _is_open(each) for each in carried)


def _is_open(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_global and not ip.is_multicast


class Fetcher:
    """Fetches files over HTTP. May be called from any thread.

    resolve and may_connect say what a name's addresses are and which of them are allowed: the system's resolver and
    `is_public`, unless a server has its media in a network of its own. tls: how certificates are checked; by default
    by the system's authorities.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        seconds: float,
        resolve: Resolve = addresses_of,
        may_connect: MayConnect = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.hosts, self.max_bytes, self.seconds = Hosts(hosts), max_bytes, seconds
        self._resolve, self._may_connect = resolve, may_connect
        self._tls = ssl.create_default_context() if tls is None and hosts else tls

    def fetch(self, url: str) -> bytes:
        """The content of an http(s) URL. Raises ServerError, whose message does not name the URL."""
        target = parse_target(url)
        if not self.hosts.allow(target):
            raise self._not_allowed(target)
        end = time.monotonic() + self.seconds
        addresses = self._addresses(target)
        try:
            with self._connected(target, addresses, end) as connection:
                return self._answer(connection, target)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end:
                raise _refused(f"it did not arrive within {self.seconds:g} seconds") from None
            raise _refused(f"{target.host} cannot be read from: {first_line(error)}") from None

    def _not_allowed(self, target: Target) -> ServerError:
        if not self.hosts.entries:
            return _refused(
                "this server fetches no URLs; send the file itself as a data: URI", code="media_not_allowed"
            )
        return _refused(
            f"this server does not fetch from {target.host}:{target.port}; send the file itself as a data: URI",
            code="media_not_allowed",
        )

    def _addresses(self, target: Target) -> Sequence[str]:
        try:
            addresses = self._resolve(target.host, target.port)
        except (OSError, UnicodeError) as error:
            raise _refused(f"{target.host} has no address: {first_line(error)}") from None
        if not addresses or not all(self._may_connect(address) for address in addresses):
            # Which address it is, is no business of who asks: it would map the network behind this server.
            raise _refused(f"{target.host} does not lead to the open internet", code="media_not_allowed")
        return addresses

    @contextmanager
    def _connected(self, target: Target, addresses: Sequence[str], end: float) -> Iterator[http.client.HTTPConnection]:
        sock = _first_connection(addresses, target.port, end)
        secure = target.scheme == "https"
        if secure:
            assert self._tls is not None  # there are hosts
            sock = self._tls.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        with sock, _cut_off_at(end, sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            connection = kind(target.host, target.port)
            connection.sock = sock
            yield connection
            if time.monotonic() >= end:  # cut off: what has come may not be all
                raise TimeoutError

    def _answer(self, connection: http.client.HTTPConnection, target: Target) -> bytes:
        headers = {"Accept-Encoding": "identity", "User-Agent": f"duetvl/{__version__}", "Connection": "close"}
        connection.request("GET", target.path, headers=headers)
        response = connection.getresponse()
        if 300 <= response.status < 400:
            raise _refused(f"{target.host} redirects to another URL, and redirects are not followed; give that URL")
        if response.status != HTTPStatus.OK:
            raise _refused(f"{target.host} answers with status {response.status}")
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise _refused(f"{target.host} sends it compressed, although it was asked not to")
        content, promised = bytearray(), response.length
        if promised is not None and promised > self.max_bytes:
            raise too_large(self.max_bytes)
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > self.max_bytes:
                raise too_large(self.max_bytes)
        if promised is not None and len(content) < promised:
            raise _refused(f"{target.host} sent {len(content)} bytes of {promised}")
        return bytes(content)


def too_large(most: int) -> ServerError:
    """The error about a file of more than `most` bytes."""
    return ServerError(
        f"it is larger than the {most} bytes that one picture or video may have",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        code="media_too_large",
    )


def _refused(words: str, code: str = "invalid_media_url") -> ServerError:
    return ServerError(words, code=code)


def _first_connection(addresses: Sequence[str], port: int, end: float) -> socket.socket:
    """A connection to the first address that takes one. Raises OSError."""
    failed = OSError("no time left")
    for address in addresses:
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection((address, port), timeout=left)
        except OSError as error:
            failed = error
    raise failed


@contextmanager
def _cut_off_at(end: float, sock: socket.socket) -> Iterator[None]:
    """Shut a connection down when its time is over: a time-out of the socket bounds each read alone."""

    def shut_down() -> None:
        with suppress(OSError):  # closed meanwhile
            # The plain socket's own method: that of TLS takes away what another thread is reading through.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, end - time.monotonic()), shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
