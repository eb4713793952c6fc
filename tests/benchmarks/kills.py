"""Runs killed at random moments and taken up again: how many end in other bits than a run that was let be."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

from relearn_lens.runs import store
from tests.interruptions import difference, small_run

KILLS = int(os.environ.get("RELEARN_LENS_KILLS", "100"))


def _child(folder: Path) -> int:
    """A process that runs into a folder: forked, so that nothing is imported again."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            store.run(small_run(), folder)
        os._exit(0)
    except BaseException:
        os._exit(1)


def kills(n: int = KILLS) -> None:
    """SIGKILL at random moments of a small run, one to three times each, then the same run to its end; bit for bit."""
    torch.set_num_threads(1)  # a forked process has no other threads
    rng = random.Random(0)
    where: dict[str, int] = {}
    lost, killed, times = [], 0, 0
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        began = time.perf_counter()
        assert os.waitpid(_child(whole), 0)[1] == 0
        seconds = time.perf_counter() - began
        while times < n:
            folder = Path(place) / f"run-{times}"
            for _ in range(rng.choice((1, 1, 2, 3))):
                pid = _child(folder)
                time.sleep(rng.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
                if os.WIFSIGNALED(status):
                    killed += 1
                    kept = sorted(p.name for p in (folder / "state").glob("*")) if folder.exists() else []
                    stage = kept[-1].removesuffix(".safetensors") if kept else "before any pause, or between trainings"
                    where[stage] = where.get(stage, 0) + 1
            status = os.waitpid(_child(folder), 0)[1]
            said = "the run did not end" if status else difference(whole, folder)
            if said:
                lost.append(f"run {times}: {said}")
            shutil.rmtree(folder, ignore_errors=True)
            times += 1
    print(
        f"{killed} kills in {times} runs of {seconds:.1f} s; results that differ from an uninterrupted run in any bit, "
        f"timings aside: {len(lost)} (goal 0)"
    )
    for stage, count in sorted(where.items()):
        print(f"  {count:3} with a state of {stage}")
    print("\n".join(lost[:10]))


if __name__ == "__main__":
    kills()
