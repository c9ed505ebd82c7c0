"""Refuses connections that leave this machine, in every Python process that finds this folder on PYTHONPATH.

`tests/conftest.py` puts it there and runs it, so that neither the tests nor the programs that they start can depend on
a download. Unix sockets and loopback stay open: process pools and jax.distributed use them.
"""

import ipaddress
import socket


class NetworkBlocked(OSError):
    """A test or a program under test tried to reach another machine."""


def _is_here(address) -> bool:
    host = address[0] if isinstance(address, tuple) else address
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        host = host.decode() if isinstance(host, bytes) else host
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guard(function, address_of):
    def guarded(*args, **kwargs):
        address = address_of(*args)
        if address is not None and not _is_here(address):
            raise NetworkBlocked(f"tests run without network, something asked for {address!r}")
        return function(*args, **kwargs)

    return guarded


def _socket_address(self, *args):
    return None if self.family not in (socket.AF_INET, socket.AF_INET6) else args[-1]


def block() -> None:
    """Blocks name look-ups and connections of this process; doing it twice changes nothing."""
    if getattr(socket, "_unimat_blocked", False):
        return
    socket._unimat_blocked = True
    socket.getaddrinfo = _guard(socket.getaddrinfo, lambda host, *_: (host,))
    socket.gethostbyname = _guard(socket.gethostbyname, lambda host: (host,))
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, _guard(getattr(socket.socket, name), _socket_address))


block()
