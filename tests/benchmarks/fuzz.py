"""Bad input by the thousand: `python -m tests.benchmarks fuzz`, or `python -m tests.benchmarks.fuzz CASES [STRATEGY]`.

The strategies of tests/fuzzing.py with random seeds of their own. Prints how the cases of each ended, and every kind of
crash once with the case that first led to it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzzing import STRATEGIES, outcome

CASES = 10_000


def fuzz(cases: int = CASES, only: str = "", start: int = 0) -> int:
    """So many cases over all strategies (or of one); gives the number of crashes."""
    crashes = 0
    for name, (_, _, share) in STRATEGIES.items():
        if only not in name:
            continue
        began = time.monotonic()
        ended, seen = _tried(name, cases if only else round(cases * share), start)
        total, crashed = ended.total(), ended.pop("crash", 0)
        crashes += crashed
        how = ", ".join(f"{n:,} {kind}" for kind, n in ended.most_common())
        print(f"{name}: {total:,} cases, {crashed} crashes; {how}; {time.monotonic() - began:.0f} s", flush=True)
        for where, text in seen.items():
            print(f"  {where}: {text}", flush=True)
    print(f"crashes in all: {crashes} (goal 0)")
    return crashes


def _tried(name: str, cases: int, start: int) -> tuple[Counter[str], dict[str, str]]:
    """How the cases of a strategy ended, and the first case of every kind of crash."""
    strategy, check, _ = STRATEGIES[name]
    ended, seen = Counter[str](), dict[str, str]()

    @seed(start)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    @given(st.data())
    def run(data: Any) -> None:
        case = data.draw(strategy)
        try:
            ended[outcome(lambda: check(case))] += 1
        except AssertionError as error:
            ended["crash"] += 1
            cause = error.__cause__ or error
            frames = [f for f in traceback.extract_tb(cause.__traceback__) if "/relearn_lens/" in f.filename]
            place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "the check itself"
            seen.setdefault(f"{type(cause).__name__} at {place}", f"{str(cause)[:200]}\n    {str(case)[:500]}")

    run()
    return ended, seen


if __name__ == "__main__":
    found = fuzz(
        int(sys.argv[1]) if len(sys.argv) > 1 else CASES,
        sys.argv[2] if len(sys.argv) > 2 else "",
        int(sys.argv[3]) if len(sys.argv) > 3 else 0,
    )
    raise SystemExit(bool(found))
