"""Several processes at one run folder: each takes a unit that no other is at, and keeps what it gives.

1. A unit is computed by whoever holds its lock; a process that dies gives it back, and what it had kept of the unit is
   gone on from.
2. Whoever waits for a unit that another process is at takes another one meanwhile. From its base on a seed goes before
   the next, which is begun when somebody is at all that is left of it: so that its answer is whole soon.
3. Every unit begins from kept results alone, with one number of threads for all, so that it gives the same bits
   whichever process computes it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from filelock import FileLock, Timeout

from relearn_lens.files import as_json, read_json, write_whole
from relearn_lens.runs.events import Event, Prepared
from relearn_lens.runs.experiment import alone
from relearn_lens.runs.needs import estimate, memory_mb, peak_rss_mb
from relearn_lens.runs.units import Unit

if TYPE_CHECKING:
    from relearn_lens.runs.folder import RunFolder

TURNS = "turns"
"""The part of a run folder in which the processes tell each other what they are at."""
SMALL, MOST = 5_000_000, 4
"""Weights below which another process costs more than it saves; and how many processes are taken unasked."""
PATIENCE = 0.1
"""Seconds between two looks at what the others have done."""


def processes_for(ready: Prepared) -> int:
    """How many processes compute a run: as its settings say, or as many as cores and memory allow."""
    experiment, device = ready.experiment, ready.model.device.type
    if experiment.workers is not None:
        return experiment.workers
    if device != "cpu" or sum(value.numel() for value in ready.model.weights().values()) < SMALL:
        return 1
    cores, free = torch.get_num_threads() // (experiment.threads or 1), memory_mb()
    need = estimate(experiment)
    # Where it cannot be said: what is resident now grows, as gradients, moments, activations come to it.
    each = need.memory_mb if need else 3 * psutil.Process().memory_info().rss / 2**20
    return max(1, min(cores, MOST, cores if free is None else 1 + int(free / each)))


class Turns:
    """Which of the processes at a run folder computes which unit."""

    def __init__(self, folder: Path, kept: RunFolder, ready: Prepared, units: Sequence[Unit]):
        self.kept, self.ready, self.units = kept, ready, units
        self.path = folder / TURNS
        self.path.mkdir(parents=True, exist_ok=True)

    def take(self, unit: Unit, compute: Callable[[Unit], Iterator[Event]]) -> Iterator[Event]:
        """The results of a unit, computed here unless another process has done it or is at it; then others of its seed
        are computed here until it is done."""
        while not self.kept.holds(unit):
            with self._claimed(unit) as mine:
                if mine:
                    with self._timed(unit):
                        yield from compute(unit)
                    return
            if not self.help(unit.seed):
                time.sleep(PATIENCE)
        yield from compute(unit)

    def help(self, seed: int | None = None) -> bool:
        """Compute the first unit that nobody is at and that has all it needs; False where there is none, or none of a
        seed. Where a seed's base is there, no other seed comes before one of its units, even one that is to wait."""
        for unit in self.units:
            if self.kept.holds(unit):
                continue
            if seed not in (None, unit.seed):
                return False
            needs = (each for each in self.units if each.seed == unit.seed and each.name in unit.needs)
            needed = list(map(self.kept.holds, needs))
            if not all(needed):
                if needed[0]:  # its base is there
                    seed = unit.seed
                continue
            with self._claimed(unit) as mine:
                if mine:
                    with self._timed(unit):
                        for event in alone(self.ready, unit, self.kept):
                            self.kept.keep(event)
                    return True
        return False

    @property
    def are_done(self) -> bool:
        """Whether nothing is left to compute."""
        return all(map(self.kept.holds, self.units))

    def seconds(self) -> dict[str, float]:
        """Of each unit that was computed, by whichever process."""
        times = map(read_json, self.path.glob("*.json"))
        return {str(each["unit"]): float(each["seconds"]) for each in times}

    @contextlib.contextmanager
    def _claimed(self, unit: Unit) -> Iterator[bool]:
        """Hold a unit's lock; False where another process does, or did until it was done."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(FileLock(self.path / f"{unit.name}-{unit.seed}.lock", timeout=0))
            except Timeout:
                yield False
            else:
                yield not self.kept.holds(unit)

    @contextlib.contextmanager
    def _timed(self, unit: Unit) -> Iterator[None]:
        began, name = time.monotonic(), f"{unit.name}-{unit.seed}"
        yield
        entry = {"unit": name, "seconds": round(time.monotonic() - began, 3), "peak_rss_mb": round(peak_rss_mb())}
        write_whole(self.path / f"{name}.json", as_json(entry))


@contextlib.contextmanager
def beside(folder: Path, n: int, *, threads: int, shared: Path | None) -> Iterator[None]:
    """For a while, `n` other processes compute units of the run in a folder; they end with this one, however it ends.

    One that fails is not missed: what it was at is computed by another, which says what is wrong.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    command = [sys.executable, "-m", "relearn_lens", "run-beside", str(folder), *([str(shared)] if shared else [])]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    others: list[subprocess.Popen[bytes]] = []
    try:
        for k in range(n):
            with (folder / TURNS / f"worker-{k + 1}.log").open("wb") as log:
                others.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env)
                )
        yield
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.kill()  # what it keeps is whole at any moment
            process.wait()


def end_with_parent() -> None:
    """End this process when the one that started it has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
