"""A network of rate-limited links on one machine: a bridge in a network namespace, and a process on each of its ports.

    process 1 (namespace of its own) --- veth pair ---+
    process 2                        --- veth pair ---+--- bridge (a namespace of the benchmark's)
    ...

The two ends of a pair send through a token bucket each (`tc qdisc ... tbf`), so that a link has its rate in either
direction. No namespace has a name and nothing is made in the machine's own network: when the processes have ended,
the kernel removes it all, whatever ended them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
INTERFACE = "wire"
# A full Ethernet frame of 1,514 bytes, which is what tbf counts, carries 1,448 bytes of TCP with timestamps.
PAYLOAD = 1448 / 1514
# A bucket holds 2 ms of the rate, and one of the kernel's large packets at least: cutting them costs this machine time
# that a network card would spend. The queue before it holds 200 ms.
_BURST_SECONDS, _BURST_BYTES, _QUEUE_SECONDS = 0.002, 70_000, 0.2


def check_possible() -> None:
    """Check that this process may make networks here.

    Raises:
        ValueError: it may not, or a tool is missing.
    """
    if platform.system() != "Linux":
        raise ValueError(
            f"bench net needs Linux's network namespaces, and this is {platform.system()}: use bench comm."
        )
    if os.geteuid() != 0:
        raise ValueError(
            f"bench net makes network namespaces, which only root may do, and this is user {os.geteuid()}: run it "
            "with sudo or in a container, or count with bench comm, which anybody may run."
        )
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise ValueError(f"bench net needs the command {tool}: apt-get install {package}.")


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and processes that it starts, in a new network namespace; afterwards the thread is back.

    Raises:
        ValueError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET):
            reason = os.strerror(ctypes.get_errno())
            raise ValueError(f"bench net could not make a network namespace ({reason}): root with CAP_SYS_ADMIN may.")
        try:
            yield
        finally:
            if libc.setns(home, _CLONE_NEWNET):
                raise OSError(
                    ctypes.get_errno(),
                    "this process cannot return to its network namespace: run the command in a new process.",
                )
    finally:
        os.close(home)


class Switch:
    """A bridge in the present namespace, with a link to each process; enter `own_network` first.

    Args:
        processes: ids of processes that have network namespaces of their own.
    """

    def __init__(self, processes: list[int]):
        self.processes = processes
        _ip("link", "add", "bridge", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _ip("link", "set", "bridge", "up")
        for number, process in enumerate(processes):
            port = f"port{number}"
            _ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(process))
            _ip("link", "set", port, "master", "bridge", "up")
            _inside(process, "ip", "address", "add", f"{address(number)}/24", "dev", INTERFACE)
            _inside(process, "ip", "link", "set", "dev", INTERFACE, "up")
            _inside(process, "ip", "link", "set", "dev", "lo", "up")

    def unlimit(self) -> None:
        """Let every link carry what this machine can."""
        for number, process in enumerate(self.processes):
            _run("tc", "qdisc", "replace", "dev", f"port{number}", "root", "pfifo")
            _inside(process, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "pfifo")

    def limit(self, bits: float) -> None:
        """Let every link carry so many bits per second in each direction."""
        rate = bits / 8
        burst = max(_BURST_BYTES, int(_BURST_SECONDS * rate))
        words = ["root", "tbf", "rate", f"{bits:.0f}bit", "burst", str(burst)]
        words += ["limit", str(burst + int(_QUEUE_SECONDS * rate))]
        for number, process in enumerate(self.processes):
            _run("tc", "qdisc", "replace", "dev", f"port{number}", *words)
            _inside(process, "tc", "qdisc", "replace", "dev", INTERFACE, *words)

    def sent(self) -> list[int]:
        """Bytes that each process has sent so far, by its link's counter (what /sys/class/net shows too)."""
        links = {link["ifname"]: link for link in json.loads(_ip("-json", "-stats", "link", "show"))}
        return [links[f"port{number}"]["stats64"]["rx"]["bytes"] for number in range(len(self.processes))]


def address(number: int) -> str:
    """Address of a process on the switch."""
    return f"10.77.0.{number + 1}"


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _inside(process: int, *words: str) -> str:
    return _run("nsenter", "--target", str(process), "--net", "--", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
