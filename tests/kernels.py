"""Notebooks that tests run: in one thread, and as patient as a machine at work asks for."""

from __future__ import annotations

import os
from typing import Any

from nbclient import NotebookClient

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads that wait for each other turn seconds into minutes where others want the cores too."""


def executed(notebook: Any, **how: Any) -> Any:
    """The notebook, run in a kernel of its own, or in `km`.

    nbclient gives a kernel a minute to start, and leaves out without a word what is put out more than four seconds
    after its cell is done: too little where others want the cores too.
    """
    patience = {"timeout": 600, "startup_timeout": 600, "iopub_timeout": 600, "raise_on_iopub_timeout": True}
    client = NotebookClient(notebook, **patience, **how)
    return client.execute() if "km" in how else client.execute(env=os.environ | ONE_THREAD)
