"""The command line in processes of its own, without the seconds that each would take to import torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from relearn_lens.__main__ import main


class Forked:
    """What `subprocess.Popen` gives for `python -m relearn_lens ...`, of a fork that has the imports already.

    It can be killed as any process can. What a fresh interpreter does is for tests that start one.
    """

    def __init__(self, command: Sequence[str], *, stdout: Any, env: Mapping[str, str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "relearn_lens"]
        self.env, self.returncode = env, None
        self._process = multiprocessing.get_context("fork").Process(
            target=_become, args=(list(command[3:]), stdout.fileno(), dict(env))
        )
        self._process.start()
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        assert self.returncode is not None
        return self.returncode


def _become(arguments: list[str], out: int, env: dict[str, str]) -> None:
    """Be the command line, in the child."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout = sys.stderr = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["relearn-lens", *arguments]
    main()
