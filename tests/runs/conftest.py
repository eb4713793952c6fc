"""One small run, shared by all tests that only read it."""

import os
from pathlib import Path

import pytest

from relearn_lens.runs import store
from relearn_lens.runs.events import Event
from relearn_lens.runs.results import Run
from tests.made import tiny


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Path:
    """Where runs keep what they begin from for each other, for all processes of the test run."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "stages"


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> tuple[Run, Path, list[Event]]:
    """A finished run, its folder and its events; tests only read them."""
    path, events = tmp_path_factory.mktemp("runs") / "toy", []
    return store.run(tiny(), path, on_event=events.append), path, events
