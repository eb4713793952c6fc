"""Notebooks that tests run: in one thread, and as patient as a machine at work asks for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads that wait for each other turn seconds into minutes where others want the cores too."""


def executed(notebook: Any, km: KernelManager) -> Any:
    """The notebook, run in a kernel that has been started.

    nbclient gives a kernel a minute to start, and leaves out without a word what is put out more than four seconds
    after its cell is done: too little where others want the cores too.
    """
    patience = {"timeout": 600, "startup_timeout": 600, "iopub_timeout": 600, "raise_on_iopub_timeout": True}
    return NotebookClient(notebook, km=km, **patience).execute()


@contextmanager
def forked_kernel(folder: Path, cwd: Path) -> Iterator[list[str]]:
    """The command of a kernelspec, for one kernel: a fork of this process, so it has imported what this one has.

    What is started by that command hands on the connection file, and stays as long as the kernel. `folder` is where
    they meet.
    """
    file, alive = folder / "connection", folder / "alive"
    for pipe in (file, alive):
        os.mkfifo(pipe)
    child = os.fork()
    if not child:
        try:
            _serve(file.read_text(encoding="utf-8"), alive, cwd)
        finally:
            os._exit(0)
    try:
        yield ["/bin/sh", "-c", f"printf %s \"$0\" > '{file}'; read end < '{alive}'", "{connection_file}"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(connection_file: str, alive: Path, cwd: Path) -> None:
    from ipykernel.kernelapp import IPKernelApp
    from IPython.core.interactiveshell import InteractiveShell

    os.chdir(cwd)
    InteractiveShell.clear_instance()
    with alive.open("w"):
        kernel = IPKernelApp()
        kernel.initialize(["-f", connection_file])
        kernel.start()
