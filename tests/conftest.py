"""What pytest begins with; `fixtures` is the rest, which takes seconds to import and which whoever only deals out tests
to other processes does without."""

import gc
import importlib
import os
import random
import sys

if "relearn_lens" not in sys.modules:  # as pytest begins; a process that a test starts has it by now
    from tests import typed

    typed.install()

import pytest

# The shape checks that the test run switches on everywhere look at one item of each list, drawn with the global
# generator. They get one of their own, before the package is imported, so that `untouched` sees what users would see.
importlib.import_module("beartype._check.code.codemain").getrandbits = random.Random(0).getrandbits  # pyright: ignore[reportAttributeAccessIssue]

sys.modules["rfc3987_syntax"] = None  # pyright: ignore[reportArgumentType] (2 s of grammar, for a format of none of ours)

LONG = (
    "test_readme.py", "test_notebooks.py", "test_benches.py", "test_sweeps.py", "test_experiment.py", "test_store.py",
    "test_interruptions.py", "test_turns.py", "test_workshop.py", "test_processes.py", "test_families.py",
    "test_routing.py", "test_losses.py", "test_lab.py", "test_next_token.py", "test_own_arms.py", "test_pack.py",
)  # fmt: skip
"""Files of tests that take long, the longest first."""

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other take minutes where others want the cores too
os.environ.pop("COLUMNS", None)  # which xdist sets, and what is piped is as wide as it says

pytest.register_assert_rewrite("tests.fixtures")


def pytest_configure(config: pytest.Config) -> None:
    """Give the fixtures to every process that runs tests, and set aside what processes that it starts begin from."""
    if config.getoption("dist", "no") == "no":
        gc.disable()  # while thousands of things are imported that stay, until `fixtures` has them left alone
        spare = importlib.import_module("tests.spare")
        config.pluginmanager.register(importlib.import_module("tests.fixtures"))
        spare.ours()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute begins first, so that the others go by meanwhile."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
