"""Ray actors work on a run as this process does: on a cluster of three nodes, each a daemon of this machine with a CPU,
and on a Ray of the sweep's own. They start slowly, so all of it is `full`."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headscope.sweep import Run, SweepConfig, Workers, run_sweep
from headscope.sweep.plan.units import CLAIMS
from sweep.faults import assert_same, awaited, claimants, script, undisturbed

cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.full, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

# of a node, in bytes; the least that Ray takes is 75 MiB
OBJECT_STORE = 80 * 2**20


@pytest.fixture(scope="module")
def asked(ddpm_directory):
    """The sweep of `faults.SWEEP`."""
    return SweepConfig(
        model=ddpm_directory,
        groups=("faces", "lfw"),
        items=6,
        timesteps=(60, 500),
        fills=("mean", "zero"),
        reference_items=8,
    )


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    return undisturbed(asked, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def cluster():
    head = {"num_cpus": 1, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as environment:
        # workers import what this process does
        environment.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        # a process that has started a Ray of its own would want a token of the cluster, which has none
        environment.setenv("RAY_AUTH_MODE", "disabled")
        nodes = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                add_node(nodes)
            yield nodes
        finally:
            nodes.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)


def daemon(node) -> int:
    """The process of a node that starts its workers."""
    return node.all_processes["raylet"][0].process.pid


def children(process: int) -> list[int]:
    """Of a process, the workers that hold an actor of a sweep."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed if b"ray::_Actor" in Path(f"/proc/{child}/cmdline").read_bytes()]


class Saboteur:
    """Does something once to the first process that claims a unit and whom it concerns, while a sweep runs."""

    def __init__(self, run: Path, strike) -> None:
        self.struck = False
        self._run = run
        self._strike = strike
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join(150)

    def _watch(self) -> None:
        for process in claimants(self._run):
            if self._strike(process):
                self.struck = True
                return


def kill(process: int) -> bool:
    os.kill(process, signal.SIGKILL)
    return True


@pytest.mark.parametrize("count", [1, 4])
def test_a_cluster_gives_one_table(asked, whole, cluster, tmp_path, count):
    """With actors that it has no room for, too."""
    run_sweep(asked, tmp_path / "run", progress=False, workers=Workers("ray", count, address=cluster.address))
    assert_same(tmp_path / "run", whole, exact=False)


def test_a_killed_actor_is_replaced(asked, whole, cluster, tmp_path):
    """On a Ray that the sweep starts and ends."""
    with Saboteur(tmp_path / "run", kill) as saboteur:
        run_sweep(asked, tmp_path / "run", progress=False, workers=Workers("ray", 2, address="local"))
    assert saboteur.struck
    assert_same(tmp_path / "run", whole, exact=False)


def test_the_sweep_says_once_whom_its_actors_wait_for(ddpm_directory, cluster, tmp_path):
    asked = SweepConfig(model=ddpm_directory, groups=("faces",), items=1, timesteps=(60, 500), fills=("zero",))
    workers = Workers("ray", 2, address=cluster.address)
    expected, said = awaited(asked, tmp_path / "run", workers, lambda shown: shown)
    assert said.count(expected) == 1


def test_a_cluster_loses_a_node(asked, whole, cluster, tmp_path):
    """The node of a process that works on a unit is killed with all that runs on it. The actor that replaces its own
    finds no room, and the others do its work."""
    victims = {daemon(node): node for node in cluster.worker_nodes}

    def kill_node(process: int) -> bool:
        owner = next((pid for pid in victims if process in children(pid)), None)
        if owner is None:
            return False
        cluster.remove_node(victims[owner], allow_graceful=False)
        os.kill(process, signal.SIGKILL)
        return True

    with Saboteur(tmp_path / "run", kill_node) as saboteur:
        run_sweep(asked, tmp_path / "run", progress=False, workers=Workers("ray", 3, address=cluster.address))
    add_node(cluster)
    assert saboteur.struck
    assert_same(tmp_path / "run", whole, exact=False)


@pytest.mark.parametrize(
    ("number", "send", "status", "said"),
    [(signal.SIGINT, os.killpg, -signal.SIGINT, b"KeyboardInterrupt"), (signal.SIGTERM, os.kill, 143, b"")],
    ids=["ctrl-c", "sigterm"],
)
def test_ctrl_c_and_sigterm_stop_cleanly(ddpm_directory, asked, whole, cluster, tmp_path, number, send, status, said):
    """The cluster goes on, without actors; what was computed is kept, and nothing stays claimed."""
    command = [*script(tmp_path), ddpm_directory, str(tmp_path / "run"), "ray", "2", cluster.address]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        next(claimants(tmp_path / "run"))
        send(process.pid, number)
        assert process.wait(60) == status
        assert process.stderr is not None
        assert said in process.stderr.read()
    until = time.monotonic() + 30
    nodes = [daemon(node) for node in cluster.list_all_nodes()]
    while any(map(children, nodes)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(children, nodes))
    assert not any((tmp_path / "run" / CLAIMS).glob("[!.]*"))
    stopped = Run.open(tmp_path / "run")
    assert not stopped.complete
    assert stopped.verify().torn == []
    run_sweep(asked, tmp_path / "run", progress=False)
    assert_same(tmp_path / "run", whole, exact=False)
