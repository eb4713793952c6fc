"""Runs in processes of their own: on this machine, or as tasks of a Ray cluster.

1. A job is a file of settings and a run folder. What runs it is `store.run`, so that a job whose process is lost goes
   on from its last pause when it is given to another one.
2. One process per job: a crash, a kill or a failure ends that job alone and is said, the others go on.
3. Whoever stops taking results (Ctrl-C too) stops the processes; the same jobs can be given again.

Nothing heavy is imported before a job runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from relearn_lens.runs import needs

Started = Callable[[str], object]
"""Called with the name of a job whose process was started."""

PATIENCE = 10
"""Seconds that a process has to end by itself."""
LOSSES = 2
"""How often a job's Ray worker may be lost, beyond once for every node that died, before the job counts as failed."""

_STORE_BYTES = 80 * 2**20
"""Of Ray's object store, where it is started here: only names and messages go through it."""


@dataclass(frozen=True)
class Job:
    """One run, to be made by a process of its own."""

    name: str
    settings: Path
    """A TOML file that `relearn-lens run` takes."""
    folder: Path
    log: Path
    """What the process prints, each try below the last."""
    device: str = "auto"
    threads: int | None = None
    """None: the job's share of the cores."""
    memory_mb: int | None = None
    """By calculation; None if it cannot be said."""
    shared: Path | None = None
    """The folder of what runs compute once for each other."""
    verb: str = "run"
    """The command that runs it here: `relearn-lens VERB SETTINGS --out FOLDER --shared SHARED`."""
    work: Callable[[Job, TextIO], object] | None = None
    """What a Ray worker calls in its place; None for a run."""

    @property
    def arguments(self) -> list[str]:
        """What follows `relearn-lens` on its command line."""
        shared = ["--shared", str(self.shared)] if self.shared else []
        return [self.verb, str(self.settings), "--out", str(self.folder), *shared]


@dataclass(frozen=True)
class Done:
    """A job has ended: well, or with an error in one line."""

    name: str
    error: str | None
    seconds: float | int
    """Of the try that ended, since its process was started (on Ray: since it was handed over)."""


# --- this machine


def workers_for(jobs: Sequence[Job], *, cores: int | None = None, has_mb: int | None = None) -> int:
    """How many jobs this machine can run at once: by cores, by memory, and one for each GPU that they may use."""
    threads = max((job.threads or 1 for job in jobs), default=1)
    most = max(1, (cores or _cores()) // threads)
    needed = max((job.memory_mb or 0 for job in jobs), default=0)
    has_mb = needs.memory_mb() if has_mb is None else has_mb
    if needed and has_mb is not None:
        most = min(most, max(1, has_mb // needed))
    if gpus := _gpus(jobs):
        most = min(most, gpus)
    return max(1, min(most, len(jobs)))


def local(jobs: Sequence[Job], *, workers: int, started: Started | None = None) -> Generator[Done, None, None]:
    """Run jobs in `workers` processes at a time; gives each as it ends.

    A job without `threads` gets its share of the cores, and one without a GPU of its own takes turns on what there is.
    """
    waiting, free = deque(jobs), list(range(workers))
    running: dict[int, tuple[subprocess.Popen[bytes], Job, int, float]] = {}
    gpus, share = _gpus(jobs), max(1, _cores() // workers)
    try:
        while waiting or running:
            while waiting and free:
                job, slot = waiting.popleft(), free.pop(0)
                env = {**os.environ, "PYTHONUNBUFFERED": "1"}
                if job.threads is None:
                    env["OMP_NUM_THREADS"] = str(share)
                if gpus and job.device in ("auto", "cuda"):
                    env["CUDA_VISIBLE_DEVICES"] = _visible(slot % gpus)
                command = [sys.executable, "-m", "relearn_lens", *job.arguments]
                with job.log.open("ab") as log:
                    at = log.tell()
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
                    )
                running[slot] = process, job, at, time.monotonic()
                if started:
                    started(job.name)
            for slot, (process, job, at, began) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    free.append(slot)
                    error = _why(process.returncode, job.log, at) if process.returncode else None
                    yield Done(job.name, error, time.monotonic() - began)
            if running:
                time.sleep(0.05)
    finally:
        _stop([process for process, *_ in running.values()])


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes. A run can be killed at any moment, so they are asked once and then made to."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        if process.returncode is None:
            process.kill()
            process.wait()


def _why(code: int, log: Path, at: int) -> str:
    """Why a process failed, in one line: its last error, or how it was killed."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with log.open("rb") as file:
        file.seek(at)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [k for k, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return "; ".join(line.removeprefix("error: ") for line in lines[errors[-1] :])
    return lines[-1] if lines else f"exit code {code}"


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(jobs: Sequence[Job]) -> int:
    """GPUs that the jobs may use, 0 where none asks for one; torch is imported only where one may be there."""
    if not any(job.device == "auto" or job.device.startswith("cuda") for job in jobs):
        return 0
    import torch

    return torch.cuda.device_count()


def _visible(index: int) -> str:
    """The GPU of that index, as CUDA_VISIBLE_DEVICES names it: of those that this process sees."""
    mine = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return mine[index] if mine else str(index)


# --- Ray


def need_ray() -> Any:
    """The package ray.

    Raises:
        ImportError: it is not installed; says how it is.
    """
    try:
        # By name: a type checker need not have the extra.
        ray = importlib.import_module("ray")
        importlib.import_module("ray.exceptions")
    except ImportError:
        raise ImportError(
            "--on ray needs the package ray, which is not installed: pip install 'relearn-lens[ray]' (on every node)"
        ) from None
    return ray


def on_ray(jobs: Sequence[Job], *, shared: Path) -> Generator[Done, None, None]:
    """Run jobs as tasks of a Ray cluster; gives each as it ends.

    The cluster is the one that RAY_ADDRESS names, or one that runs on this machine; without either Ray is started here
    and stopped at the end. Every node must see the folder `shared`, which holds the jobs' files, and file locks must
    work in it. A job takes as many CPUs as it has threads (1 without), one GPU if its device is `cuda`, or `auto` where
    the cluster has any, and the memory that was calculated. A job whose node or worker dies is given to another one and
    goes on from its last pause. We hand it over again ourselves, because Ray's own retries have no end for a run that
    outgrows memory wherever it is.

    Raises:
        ImportError: no ray.
        ConnectionError: no cluster at RAY_ADDRESS.
        ValueError: a node lacks the folder, or has another version of the package; no node is large enough.
        OSError: no node is left that could run what is left.
    """
    ray = need_ray()
    for job in jobs:
        if job.device.startswith("cuda:"):
            raise ValueError(f"{job.name}: device = {job.device!r}: Ray gives each run a GPU of its own; use cuda")
    with _cluster(ray):
        _check_nodes(ray, shared)
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        needs = {job.name: _needs(job, has_gpus) for job in jobs}
        for job in jobs:
            _check_size(ray, job, needs[job.name], ValueError)
        losses = dict.fromkeys(needs, 0)
        pending: dict[Any, tuple[Job, float]] = {}

        def hand_over(job: Job) -> None:
            # max_calls: a process of its own for every run.
            options = {**needs[job.name], "max_retries": 0, "max_calls": 1, "name": f"relearn-lens {job.name}"}
            pending[ray.remote(**options)(_perform).remote(job, os.getcwd())] = job, time.monotonic()

        try:
            for job in jobs:
                hand_over(job)
            while pending:
                ready, _ = ray.wait(list(pending), timeout=5)
                for ref in ready:
                    job, began = pending.pop(ref)
                    try:
                        error = ray.get(ref)
                    except ray.exceptions.RayTaskError as failed:  # not by the run: the task itself could not begin
                        error = str(failed).strip().splitlines()[-1]
                    except ray.exceptions.RayError as lost:
                        losses[job.name] += 1
                        dead = sum(not node["Alive"] for node in ray.nodes())
                        if losses[job.name] <= LOSSES + dead:
                            hand_over(job)
                            continue
                        why = (str(lost).strip() or type(lost).__name__).splitlines()[0]
                        error = f"its Ray worker was lost {losses[job.name]} times (out of memory?): {why}"
                    yield Done(job.name, error, time.monotonic() - began)
                if not ready:
                    for job, _ in pending.values():
                        _check_size(ray, job, needs[job.name], OSError)
        finally:
            for ref in pending:
                with contextlib.suppress(Exception):  # the cluster may be what went away
                    ray.cancel(ref, force=True)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connected to a cluster; leaves as it was what was there before."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    variable = "RAY_USAGE_STATS_ENABLED"
    before = os.environ.get(variable)
    os.environ[variable] = "0"  # what is started here tells nobody
    try:
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS"):
                raise
            ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
        yield
    finally:
        ray.shutdown()
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


def _check_address(address: str) -> None:
    """Refuse a cluster at an address where nobody answers: Ray would try for minutes, and then start one here."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}); start it (ray start --head "
            "there), or unset RAY_ADDRESS to have Ray started here"
        ) from None


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _check_nodes(ray: Any, shared: Path) -> None:
    """Refuse a cluster in which a node does not see the folder, or would compute with other versions than are here."""
    on_node = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    token, here = shared / f".token-{uuid.uuid4().hex}", _versions()
    token.write_text("relearn-lens")
    wrong = []
    try:
        look = ray.remote(num_cpus=0, max_retries=3)(_look)
        there = [(on_node(node_id=node["NodeID"], soft=False), node) for node in _alive(ray)]
        node_of = {look.options(scheduling_strategy=on).remote(str(token)): node for on, node in there}
        for ref, node in node_of.items():
            name = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            try:
                sees, versions = ray.get(ref, timeout=120)
            except ray.exceptions.RayError as error:
                why = str(error).strip().splitlines()[-1]
                wrong.append(f"{name} cannot run a task: {why}; is relearn-lens installed there, in the same Python?")
                continue
            if not sees:
                wrong.append(f"{name} does not see the folder {str(shared)!r}; choose one that all nodes share (--out)")
            wrong += [f"{name} has {k} {versions[k]}, here it is {here[k]}" for k in here if versions[k] != here[k]]
    finally:
        token.unlink(missing_ok=True)
    if wrong:
        raise ValueError("this Ray cluster cannot run the sweep:\n" + "\n".join(wrong))


def _look(token: str) -> tuple[bool, dict[str, str]]:
    """What a node sees of the shared folder, and what it would compute with."""
    return Path(token).is_file(), _versions()


def _versions() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("relearn-lens", "torch", "transformers")}
    return {"python": ".".join(map(str, sys.version_info[:2])), **versions}


def _needs(job: Job, has_gpus: bool) -> dict[str, float | int]:
    """What Ray keeps free for a job."""
    gpu = job.device == "cuda" or (job.device == "auto" and has_gpus)
    return {"num_cpus": job.threads or 1, "num_gpus": int(gpu), "memory": (job.memory_mb or 0) * 2**20}


def _check_size(ray: Any, job: Job, needs: dict[str, float | int], kind: type[Exception]) -> None:
    """Refuse a job that no node could ever hold: Ray would wait for one without end."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    nodes = _alive(ray)
    if any(all(n["Resources"].get(names[k], 0) >= v for k, v in needs.items()) for n in nodes):
        return
    request = f"{needs['num_cpus']:g} CPU, {needs['num_gpus']:g} GPU, {needs['memory'] / 2**20:,.0f} MB of memory"
    there = "; ".join(
        f"{n['NodeManagerHostname']}: {n['Resources'].get('CPU', 0):g} CPU, {n['Resources'].get('GPU', 0):g} GPU, "
        f"{n['Resources'].get('memory', 0) / 2**20:,.0f} MB"
        for n in nodes
    )
    raise kind(
        f"no node of the Ray cluster can run {job.name!r}, which takes {request} (nodes: {there or 'none'}); start one "
        "that can, and give the same command again"
    )


def _perform(job: Job, at: str) -> str | None:
    """A job in a Ray worker: its error in one line, or None.

    In the worker's own process, not in a child: what runs into the folder must end with the node.
    """
    with contextlib.suppress(OSError):  # a node may lack the folder; then only relative paths in settings fail
        os.chdir(at)
    with (
        job.log.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            (job.work or _run)(job, file)
        except Exception as error:
            traceback.print_exc(file=file)
            text = re.sub(r"^\[Errno \d+\] ", "", str(error)) or type(error).__name__
            return "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return None


def _run(job: Job, file: TextIO) -> None:
    from relearn_lens.runs import events, store
    from relearn_lens.runs.presets import settings_of
    from relearn_lens.show import report

    def note(event: events.Event) -> None:
        if isinstance(event, events.Measured):
            shown = "  ".join(f"{label} {value:.3f}" for label, value in event.snapshot.shown.items())
            file.write(f"seed {event.seed}, {event.arm} {event.stage}: {shown}\n")

    settings = settings_of(job.settings)
    until = time.monotonic() + 60
    while True:
        try:
            result = store.run(settings, job.folder, shared=job.shared, on_event=note)
            break
        except BlockingIOError:  # the worker that had it before may outlive its node's daemon for a moment
            if time.monotonic() > until:
                raise
            time.sleep(1)
    report.write_report(result, job.folder / "report.html")
