"""Python processes without the seconds that each would take to import torch and transformers.

A process is forked off before anything is tested, and waits. What it is sent to run, it runs in forks of its own: they
have in `sys.modules` what it had, nothing that a test left, and the arguments, environment, folder and streams of who
asked. `Spare.python` is a command that stands where `sys.executable` would.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from types import ModuleType
from typing import Any, NoReturn

ASKS = """
import os, signal, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waits:
    waits.connect(sys.argv[1])
    about = repr((sys.argv[2:], os.getcwd(), dict(os.environ)))
    socket.send_fds(waits, [about.encode()], [0, 1, 2])
    status = int(waits.recv(16) or -9)
sys.exit(status) if status >= 0 else os.kill(os.getpid(), -status)
"""
MESSAGE = 2**17
"""Bytes that arguments and environment may take."""


class Spare:
    """The process that waits, and ends when this one does."""

    def __init__(self, *, as_users: bool = False) -> None:
        self.python = [sys.executable]
        # Linux alone has pidfd_open, and a folder's own conftest may have imported more by now: then it takes its time.
        if not hasattr(os, "pidfd_open") or (as_users and {"relearn_lens", "transformer_lens"} & sys.modules.keys()):
            return
        folder = tempfile.mkdtemp(prefix="spare")  # nobody else's
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path := f"{folder}/socket")
        except OSError:  # of more letters than the address of a socket has
            return
        self.python = [sys.executable, "-I", "-S", "-c", ASKS, path]
        listener.listen()
        end, self._end = os.pipe()  # nobody writes into it: it is closed when this process ends
        sys.stdout.flush()
        if os.fork() == 0:
            os.close(self._end)
            if as_users:
                sys.meta_path[:] = [each for each in sys.meta_path if type(each).__module__ != "tests.typed"]
            _wait(listener, end, folder)
        os.close(end)
        listener.close()


def _wait(listener: socket.socket, end: int, folder: str) -> NoReturn:
    asked = selectors.DefaultSelector()
    asked.register(listener, selectors.EVENT_READ)
    asked.register(end, selectors.EVENT_READ)
    runs: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in asked.select():
            of: Any = key.fileobj
            if of == end:
                for pid, _ in runs.values():
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
            if of is listener:
                who, _ = listener.accept()
                about, streams, *_ = socket.recv_fds(who, MESSAGE, 3)
                pid = os.fork()
                if pid == 0:
                    _become(about, streams)
                for stream in streams:
                    os.close(stream)
                ended = os.pidfd_open(pid)
                runs[ended] = pid, who
                asked.register(ended, selectors.EVENT_READ)
                asked.register(who, selectors.EVENT_READ, ended)
            elif key.data is not None:  # who asked is no more
                asked.unregister(of)
                os.kill(runs[key.data][0], signal.SIGKILL)
            else:
                pid, who = runs.pop(of)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    who.send(b"%d" % status)
                for each in (of, who):
                    with contextlib.suppress(KeyError):
                        asked.unregister(each)
                os.close(of)
                who.close()


def _become(about: bytes, streams: list[int]) -> NoReturn:
    """Run what a command line says, in the child."""
    status = 1
    try:
        words, folder, env = eval(about)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 1024)
        gc.freeze()
        gc.enable()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        _run(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _run(words: list[str]) -> None:
    kind, what, *rest = words
    sys.path[:0] = [""]
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c", f"a spare process runs -m MODULE or -c CODE, not {words}"
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(what, vars(main))


importlib.import_module("transformers.models.auto.modeling_auto")
PLAIN = Spare(as_users=True)
"""Knows transformers, and nothing of TransformerLens or this package, which it imports as users do: unchecked."""


@functools.cache
def ours() -> Spare:
    """Knows all that the package imports; the first to ask for it is pytest, before anything is tested."""
    return Spare()
