"""A sweep on a Ray cluster of two nodes, one of which is killed half way: what is lost (nothing), and in which bits.

Both nodes are started on this machine. The second is killed as a machine without power is: its daemon and its workers
at once, while it is in the middle of a run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from relearn_lens.bench import sweeps
from tests.bench.test_sweeps import SMALL
from tests.interruptions import difference

AXES = """
[sweep]
seeds = [[0], [1]]
arms = [["concept"], ["random"]]
"""
_BYTES = 80_000_000


def ray_nodes() -> None:
    """The same sweep in processes here, and on two nodes of which one dies; every run folder compared bit for bit."""
    try:
        ray = importlib.import_module("ray")
        cluster_of = importlib.import_module("ray.cluster_utils").Cluster
    except ImportError:
        print("ray is not installed: pip install -c constraints.txt -e '.[ray]'")
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        (here / "grid.toml").write_text(SMALL.replace("epochs = 2", "epochs = 20") + AXES)
        asked = sweeps.read(here / "grid.toml")
        began = time.perf_counter()
        alone = sweeps.run(asked, here / "local")
        print(f"local: {len(asked.cells)} cells in {time.perf_counter() - began:.0f} s, failed: {dict(alone.failed)}")
        cluster = cluster_of(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": _BYTES, "include_dashboard": False},
        )
        try:
            second = cluster.add_node(num_cpus=1, object_store_memory=_BYTES)
            ray.init(address=cluster.address, log_to_driver=False)
            daemon = second.all_processes["raylet"][0].process.pid
            killed: list[str] = []
            threading.Thread(target=_kill, args=(daemon, here / "ray", killed), daemon=True).start()
            began = time.perf_counter()
            spread = sweeps.run(asked, here / "ray", on="ray")
            seconds = time.perf_counter() - began
            alive = sum(node["Alive"] for node in ray.nodes())
        finally:
            ray.shutdown()
            cluster.shutdown()
        print("\n".join(killed))
        print(
            f"ray: {len(asked.cells)} cells in {seconds:.0f} s, failed: {dict(spread.failed)}; {alive} node left of 2"
        )
        told = {cell.name: difference(here / "local" / cell.name, here / "ray" / cell.name) for cell in asked.cells}
        for name, said in told.items():
            print(f"  {name}: {said or 'the same bits'}")
        same = all((here / "local" / n).read_bytes() == (here / "ray" / n).read_bytes() for n in (sweeps.CELLS,))
        lost = len(asked.cells) - sum(said == "" for said in told.values())
        print(f"cells lost or with other bits: {lost} (goal 0); {sweeps.CELLS} {'the same' if same else 'DIFFERS'}")
        if lost or not same or not killed:
            raise SystemExit("not as it should be")


def _kill(daemon: int, folder: Path, killed: list[str]) -> None:
    """Wait until a worker of that node is between two pauses of a training, and kill all of the node."""
    while not killed:
        for state in sorted(folder.glob("*/state/*.safetensors")):
            run, workers = state.parents[1], _children(daemon)
            if _holder(run / ".lock") in workers:
                for pid in (daemon, *workers):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed.append(f"killed: the second node ({len(workers) + 1} processes), in {run.name} at {state.name}")
                return
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """Every process below one, by the system's own list."""
    said = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in said.splitlines()]
    found = [pid]
    for above in found:
        found += [child for child, parent in pairs if parent == above]
    return found[1:]


def _holder(lock: Path) -> int | None:
    """The process that has a file open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if any(os.readlink(entry) == str(lock) for entry in folder.iterdir()):
                return int(folder.parent.name)
    return None


if __name__ == "__main__":
    ray_nodes()
