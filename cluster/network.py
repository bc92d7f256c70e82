"""Which of this machine's networks leads to the others: gloo's own choice, by host name, is often loopback."""

import ipaddress
import os
import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # linux/sockios.h
ANY_PORT = 9  # discard; nothing is sent


def own_address_towards(host: str) -> str:
    """The address of this machine from which packets to `host` (a name or an address) leave: IPv4 where it can be."""
    found = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None where none has."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def use_interface_of(address: str) -> None:
    """Has gloo use the interface with this address, unless the environment names another already."""
    if name := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
