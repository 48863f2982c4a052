"""Addresses that a process on Linux listens on."""

import os
import socket
import struct
from pathlib import Path

LISTENING = "0A"


def listening_hosts(pid: int) -> set[str]:
    """Addresses of this machine on which a process accepts TCP connections."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(descriptor))
        except OSError:  # closed since
            continue
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(
                    struct.pack(">I", *struct.unpack("<I", words[i : i + 4]))
                    for i in range(0, len(words), 4)
                )
                found.add(socket.inet_ntop(family, packed))
    return found
