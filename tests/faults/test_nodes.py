"""Two nodes: a launcher of `accelerate launch` for each, in a network namespace of its own where
those can be made, else both on the loopback. Shards come from a server, each node caches them for
itself."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from accelerate.utils.other import get_free_port

from tests.cli.test_docs import commands
from tests.faults.runs import (
    LOST,
    REPOSITORY,
    World,
    finish_pair,
    metrics,
    start_pair,
    steps_done,
    weights_apart,
)
from tests.shards import shard_names
from tests.waiting import HANGS, wait_until

# --- the network ----------------------------------------------------------------------------------


@dataclass
class Node:
    """Where the processes of a node live: what runs a command there, and its network interface."""

    prefix: list[str] = field(default_factory=list)
    interface: str = "lo"
    address: str = "127.0.0.1"

    def start(self, command: list[str | Path], log: Path) -> subprocess.Popen:
        """Starts it in a process group of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": self.interface, "ACCELERATE_USE_CPU": "true"}
        with open(log, "ab") as file:
            return subprocess.Popen(
                [*self.prefix, sys.executable, *map(str, command)],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two namespaces joined by a cable, if this user may make them."""
    names = [f"elite{os.getpid()}{end}" for end in "ab"]
    nodes = [
        Node(["ip", "netns", "exec", name], f"v{name}", f"10.213.7.{number}")
        for number, name in enumerate(names, 1)
    ]
    (one, other), (a, b) = names, nodes
    cable = f"{a.interface} netns {one} type veth peer name {b.interface} netns {other}"
    commands = [f"netns add {one}", f"netns add {other}", f"link add {cable}"]
    for name, node in zip(names, nodes, strict=True):
        commands.append(f"-n {name} addr add {node.address}/24 dev {node.interface}")
        commands += [f"-n {name} link set {link} up" for link in (node.interface, "lo")]
    with ExitStack() as stack:
        for name in names:
            stack.callback(ip, f"netns del {name}")
        yield nodes if all(map(ip, commands)) else [Node(), Node()]


def ip(words: str) -> bool:
    try:
        return not subprocess.run(["ip", *words.split()], capture_output=True).returncode
    except FileNotFoundError:
        return False


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """Stage 1 on two nodes, as docs/training.md starts it, with shards from a server."""

    world: World
    nodes: list[Node]
    folder: Path
    parts: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def served(self, shards: Path) -> Iterator[Self]:
        port, log, node = get_free_port(), self.folder / "server.log", self.nodes[0]
        self.world.extra |= {"train_data_dir": f"http://{node.address}:{port}"}
        command = ["-m", "http.server", port, "--bind", node.address, "--directory", shards]
        server = node.start(command, log)
        try:
            wait_until(lambda: "Serving" in log.read_text(), "the server")
            yield self
        finally:
            server.kill()
            server.wait()

    def run_of(self, rank: int) -> Path:
        """Each node has a folder of its own; the first one's is the run's."""
        return self.folder / f"node_{rank}" / "run"

    def cache_of(self, rank: int) -> Path:
        return self.folder / f"node_{rank}" / "cache"

    @contextmanager
    def started(self) -> Iterator[list[tuple[subprocess.Popen, Path]]]:
        """The launchers of the run, or of what is left of it, and their logs."""
        part, port, launchers = next(self.parts), get_free_port(), []
        (words,) = self.world.call("stage 1", self.run_of(0))[1]
        for rank, node in enumerate(self.nodes):
            launch = ["-m", "accelerate.commands.launch", *launcher_flags(rank)]
            launch += ["--main_process_ip", self.nodes[0].address, "--main_process_port", port]
            launch += ["--num_processes", 2]
            own = ["--shard_cache", self.cache_of(rank), "--output_dir", self.run_of(rank)]
            log = self.folder / f"part_{part}_node_{rank}.log"
            launchers.append((node.start([*launch, *words, *own], log), log))
        try:
            yield launchers
        finally:
            for launcher, _ in launchers:
                if launcher.poll() is None:
                    kill(launcher.pid, *children(launcher))
                launcher.wait()


def launcher_flags(rank: int) -> list[str]:
    """Those with which the page starts a node."""
    page = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    found = commands(page.split("## On two nodes\n")[1].split("\n## ")[0])
    assert [words[-1] for words in found] == ["runs/shard_cache"] * 2
    return found[rank][2 : found[rank].index("train_global.py")]  # after "accelerate launch"


def kill(*processes: int) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def children(launcher: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return list(map(int, path.read_text(encoding="utf-8").split()))


def end(launcher: subprocess.Popen, log: Path) -> str:
    """Waits for a launcher. Returns what its node has said; a hang is an error."""
    launcher.wait(HANGS)
    return log.read_text()


def test_when_a_node_loses_its_process_both_end_and_resume(tmp_path: Path) -> None:
    world = World(tmp_path / "world", 8, {"shard_window": 2, "dataloader_num_workers": 0})
    shards = world.folder / "shards"
    world.extra |= {"train_data_dir": shards}
    whole = tmp_path / "whole" / "run"
    finish_pair(start_pair(world.call("stage 1", whole), tmp_path), tmp_path)
    with two_nodes() as nodes, Cluster(world, nodes, tmp_path).served(shards) as cluster:
        run = cluster.run_of(0)
        with cluster.started() as [(one, one_log), (other, other_log)]:
            wait_until(lambda: steps_done(run) >= 3 or one.poll() is not None, "step 3")
            kill(*children(other))
            killed = time.monotonic()
            said = [end(one, one_log), end(other, other_log)]
        print(f"both ended within {time.monotonic() - killed:.0f} s")
        assert LOST.search(said[0]), said[0][-3000:]
        assert "exitcode: -9" in said[1], said[1][-3000:]
        assert 3 <= steps_done(run) < world.steps
        with cluster.started() as launchers:
            said = [end(*launcher) for launcher in launchers]
        assert [launcher.returncode for launcher, _ in launchers] == [0, 0], said
    assert weights_apart(whole, run) < 1e-6
    for found, expected in zip(metrics(run), metrics(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert not cluster.run_of(1).exists(), "the second node needs no folder of the run"
    for rank in range(2):
        assert len(list(cluster.cache_of(rank).glob("*.tar"))) == len(shard_names(shards))
