"""Images behind the addresses in requests, fetched so that no request can make the server reach this network.

A request that names an address makes the server connect there. What listens on this machine or on its network often
trusts whoever reaches it, so only public addresses are connected to. A name is resolved once, and the connection goes
to the address that was checked: a second look-up might say something else (DNS rebinding).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from dgemma_mlx.checks import shown
from dgemma_mlx.version import __version__

MOST_BYTES = 20 << 20  # of an image
SECONDS = 20.0  # for an image, with all redirects
MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16  # bytes read at a time
_PORTS = {"http": 80, "https": 443}
_SAFE = "/%:;=&?@!$'()*+,~[]"  # what a path and a query keep as it is
_NAT64 = ip_network("64:ff9b::/96")  # IPv6 addresses whose last 32 bits are one of IPv4

Network = IPv4Network | IPv6Network


class FetchError(Exception):
    """Why an image was not fetched, as the end of a sentence. It says nothing of what is inside the network."""


@dataclass(frozen=True)
class FetchRules:
    """What may be fetched.

    Attributes:
        networks: Networks that may be reached although they are not public, for an owner who trusts all clients.
        most_bytes: Largest size of an image.
        seconds: Time for an image, from the look-up of the name to its last byte, with all redirects.
    """

    networks: tuple[Network, ...] = ()
    most_bytes: int = MOST_BYTES
    seconds: float = SECONDS


PUBLIC = FetchRules()


def fetch_image(url: str, rules: FetchRules) -> bytes:
    """Return the file at an ``http`` or ``https`` address. It blocks; proxies of the environment are not used.

    Raises ``FetchError`` for any other address, one with a password, names and redirects that lead to an address that
    is not public, more than three redirects, statuses other than 200, what is no image by its content type, what is too
    large, and what takes too long.
    """
    ends = time.monotonic() + rules.seconds
    for _ in range(MOST_REDIRECTS + 1):
        found = _one(url, rules, ends)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError:
            raise FetchError("it is redirected to what is not an address") from None
    raise FetchError(f"it is redirected more than {MOST_REDIRECTS} times")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is one of the public internet, also where it stands in an address of IPv6."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _one(url: str, rules: FetchRules, ends: float) -> bytes | str:
    """Return the file at an address, or where it is redirected to."""
    parts = _split(url)
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    connected = _connect(host, port, rules.networks, ends)
    # A limit on each read alone would let a server send a byte now and then for ever.
    watch = threading.Timer(max(0.0, ends - time.monotonic()), lambda: _shut(connected))
    watch.daemon = True
    watch.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connected = context.wrap_socket(connected, server_hostname=host, do_handshake_on_connect=False)
            connected.do_handshake()
        found = _read(connected, parts, rules.most_bytes)
        if time.monotonic() >= ends:  # a connection that ``_shut`` has ended looks like the end of the file
            raise TimeoutError
        return found
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= ends:
            raise FetchError("it takes too long") from None
        is_certificate = isinstance(error, ssl.SSLCertVerificationError)
        raise FetchError("its certificate is not valid" if is_certificate else "the connection failed") from None
    finally:
        watch.cancel()
        connected.close()


def _split(url: str) -> SplitResult:
    """Return the parts of an address that may be fetched."""
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError:  # also of a host that is no name
        raise FetchError(f"{shown(url)} is not an address") from None
    if parts.scheme not in _PORTS:
        raise FetchError(f"only http and https can be fetched, not {shown(url)}")
    if not host:
        raise FetchError(f"{shown(url)} is not an address")
    if parts.username is not None or parts.password is not None:
        raise FetchError("an address with a name or a password is not fetched")
    return parts


def _connect(host: str, port: int, networks: Sequence[Network], ends: float) -> socket.socket:
    """Return a connection to a host, all of whose addresses may be reached."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"there is no host {shown(host)}") from None
    for *_, to in found:
        address = ip_address(str(to[0]).partition("%")[0])
        if not is_public(address) and not any(address in network for network in networks):
            raise FetchError(f"{shown(host)} is not a public address")
    for family, kind, protocol, _, to in found:
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(max(0.01, ends - time.monotonic()))
            connected.connect(to)
        except OSError:
            connected.close()
        else:
            return connected
    raise FetchError(f"{shown(host)} cannot be reached")


def _read(connected: socket.socket, parts: SplitResult, most: int) -> bytes | str:
    """Ask for a file over a connection. Return its bytes, or where it is redirected to."""
    asking = http.client.HTTPConnection(str(parts.hostname))
    asking.sock = connected
    target = quote(parts.path or "/", _SAFE) + (f"?{quote(parts.query, _SAFE)}" if parts.query else "")
    asking.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
    name = str(parts.hostname).encode("idna").decode()
    name = f"[{name}]" if ":" in name else name
    for header, value in (
        ("Host", name if parts.port is None else f"{name}:{parts.port}"), ("Accept", "image/*"),
        ("User-Agent", f"dgemma-mlx/{__version__}"), ("Connection", "close"),
    ):  # fmt: skip
        asking.putheader(header, value)
    asking.endheaders()
    with asking.getresponse() as answer:
        return _file(answer, most)


def _file(answer: http.client.HTTPResponse, most: int) -> bytes | str:
    """Return the image in an answer, or where the answer redirects to."""
    location = answer.headers.get("location")
    if answer.status in _REDIRECTS and location is not None:
        return location
    if answer.status != 200:
        raise FetchError(f"the status is {answer.status}")
    kind = answer.headers.get_content_type()
    if not kind.startswith("image/") or answer.headers.get("content-encoding", "identity") != "identity":
        raise FetchError(f"it is not an image but {shown(kind)}")
    data = bytearray()
    while piece := answer.read(_PIECE):
        data += piece
        if len(data) > most:
            raise FetchError(f"it is larger than {most:,} bytes")
    if answer.length:
        raise FetchError("the connection failed")  # it ended too early
    return bytes(data)


def _shut(connected: socket.socket) -> None:
    """End a connection, so that whoever reads from it goes on. Below TLS, because that may be in use."""
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
