"""Rate-limited links between processes: they have their rates, and nothing of them is left behind."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny_llama

from grass_hf.measure.bench import switch


def _may_make_networks() -> bool:
    try:
        switch.check_possible()
    except ValueError:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


needs_networks = pytest.mark.skipif(not _may_make_networks(), reason="needs root, network namespaces and iproute2")

SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    while peer.recv(65536):
        pass
"""
CLIENT = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000)) as peer:
    peer.sendall(bytes(100_000))  # what fits into the buckets and the queues
    began = time.perf_counter()
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)  # the other end has read it all
    print(time.perf_counter() - began)
"""


def links() -> set[str]:
    return {link["ifname"] for link in json.loads(subprocess.check_output(["ip", "-json", "link"]))}


def inside(process: int, code: str, *words: str) -> list[str]:
    return ["nsenter", "--target", str(process), "--net", "--", sys.executable, "-c", code, *words]


def network_of(process: int | str) -> str:
    return os.readlink(f"/proc/{process}/ns/net")


def running_in(namespaces: set[str]) -> list[str]:
    """Processes in some network namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and network_of(entry.name) in namespaces:
                found.append(entry.name)
    return found


@pytest.fixture
def command(command):
    """`grass-hf bench net ...`, as `conftest.command` runs it."""
    return functools.partial(command, "bench", "net")


def test_without_root_it_is_refused_with_a_sentence(command, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, out, err = command()
    assert code == 2 and "only root may do, and this is user 1000" in err and not out


def test_elsewhere_it_is_refused_with_a_sentence(command, monkeypatch):
    monkeypatch.setattr(switch.platform, "system", lambda: "Darwin")
    code, _, err = command()
    assert code == 2 and "needs Linux's network namespaces, and this is Darwin: use bench comm" in err


def test_a_missing_tool_gets_a_sentence(command, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(switch.shutil, "which", lambda tool: None if tool == "tc" else tool)
    code, _, err = command()
    assert code == 2 and "needs the command tc: apt-get install iproute2" in err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--workers", "1"], "--workers 1 sends nothing: give 2 or more"),
        (["--speeds", "50Mbit/s,fast"], "--speeds 'fast' is not a rate"),
        (["--engine", "zero9"], "--engine zero9 is not known: choose one of ddp, fsdp2"),
        (["--rank", "9999"], "rank=9999 is above the selected side of every target"),
        (["--model", "no_such.json"], "MODEL='no_such.json' is not a file"),
    ],
    ids=str,
)
def test_mistakes_get_a_sentence(command, monkeypatch, words, sentence):
    monkeypatch.setattr("grass_hf.cli.net.check_possible", lambda: None)
    code, _, err = command(*words)
    assert code == 2 and sentence in err and "Traceback" not in err


@needs_networks
def test_links_have_their_rates_and_are_gone_afterwards():
    home, before = network_of("self"), links()
    with switch.own_network():
        assert network_of("thread-self") != home
        ends = [subprocess.Popen(["unshare", "--net", "sleep", "60"]) for _ in range(3)]
        try:
            while any(network_of(end.pid) == network_of("thread-self") for end in ends):
                time.sleep(0.01)
            namespaces = {network_of(end.pid) for end in ends}
            wires = switch.Switch([end.pid for end in ends])
            for megabits in (20, 80):
                wires.limit(megabits * 1e6)
                start, size = wires.sent(), megabits * 100_000
                command = inside(ends[1].pid, SERVER, switch.address(1))
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                    assert server.stdout.readline() == "ready\n"
                    took = subprocess.check_output(inside(ends[0].pid, CLIENT, switch.address(1), str(size)))
                ideal = size / switch.PAYLOAD * 8 / (megabits * 1e6)
                assert 0.8 * ideal < float(took) < 2.0 * ideal, (megabits, took, ideal)
                moved = [after - then for after, then in zip(wires.sent(), start, strict=True)]
                assert size + 100_000 < moved[0] < 1.15 * (size + 100_000) and moved[2] < 10_000
        finally:
            for end in ends:
                end.kill()
                end.wait()
    assert network_of("self") == home == network_of("thread-self") and links() == before
    assert not running_in(namespaces)


@needs_networks
@pytest.mark.dist
def test_two_workers_train_over_links_and_leave_nothing(command, tmp_path):
    before = links()
    children = set(_children(os.getpid()))
    words = ["--workers", "2", "--speeds", "20Mbit/s,400Mbit/s", "--rounds", "2", "--density", "0.25"]
    words += [
        "--layers",
        "2",
        "--hidden",
        "128",
        "--vocabulary",
        "256",
        "--sequence",
        "8",
        "--json",
        tmp_path / "row.json",
        "--png",
        tmp_path / "speed.png",
    ]
    code, out, err = command(*words)
    assert code == 0, err
    assert "speed-up" in out and "Grass all-matrices" in out
    row = json.loads((tmp_path / "row.json").read_text())
    for entry in row["rows"]:
        assert 1.0 < entry["bytes"] / entry["ring_bytes"] < 1.2, entry
    slow = {entry["method"]: entry["speed_up"] for entry in row["rows"] if entry["bits"] == 20e6}
    assert slow["Grass all-linear"] > 1.5 and slow["Grass all-matrices"] > slow["Grass all-linear"]
    losses = row["losses"]
    assert losses["AdamW"][0] == losses["Grass all-linear"][0] == losses["Grass all-matrices"][0]
    assert (tmp_path / "speed.png").stat().st_size > 1000
    # other tests may have left a server of forks
    assert links() == before and set(_children(os.getpid())) <= children


@needs_networks
@pytest.mark.dist
def test_compute_of_fsdp2_is_measured_with_its_copies_and_without_a_network(command, tmp_path):
    words = ["--engine", "fsdp2", "--workers", "2", "--speeds", "20Mbit/s", "--rounds", "1", "--layers", "2"]
    words += ["--hidden", "64", "--vocabulary", "64", "--sequence", "8", "--json", tmp_path / "row.json"]
    code, _, err = command(*words)
    assert code == 0, err
    row = json.loads((tmp_path / "row.json").read_text())
    for entry in row["rows"]:
        assert 0 < sum(row["compute"][entry["method"]].values()) < entry["step"], row["compute"]


@needs_networks
@pytest.mark.dist
@pytest.mark.parametrize("after", [1, 25], ids=["starting", "training"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_it_leaves_nothing(how, after, tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    before = links()
    words = ["bench", "net", "--workers", "2", "--model", tmp_path, "--speeds", "1Mbit/s", "--rounds", "50"]
    command = [sys.executable, "-m", "grass_hf", *map(str, words)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # as from a terminal: a shell's background jobs, of which the tests may be one, ignore SIGINT
    started = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **quiet)
    deadline = time.monotonic() + 120
    while len(_children(started.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(after)
    namespaces = {network_of(process) for process in (started.pid, *_children(started.pid))}
    assert len(namespaces) == 3 and network_of("self") not in namespaces
    started.send_signal(how)
    started.wait(30)
    until = time.monotonic() + 30  # a worker that is still importing ends when it reads its input
    while running_in(namespaces) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running_in(namespaces) and links() == before


def _children(process: int) -> list[str]:
    return subprocess.run(["pgrep", "--parent", str(process)], capture_output=True, text=True).stdout.split()
