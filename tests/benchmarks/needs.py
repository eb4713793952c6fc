"""What a run is said to need of memory, against what it took at its peak.

`python -m tests.benchmarks needs [--preset names-quick] [--set KEY=VALUE ...]`: the run in a process of its own. Of
several processes at a run this is the first; the others hold no more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

RUN = """
import json, sys
from relearn_lens.runs import needs, presets, store
preset, out, *sets = sys.argv[1:]
how = presets.settings_of(preset, {}, sets)
store.run(how, out)
print(json.dumps([needs.estimate(how).memory_mb, needs.peak_rss_mb()]))
"""


def report() -> None:
    """Print the ratio (goal: 1.0 to 1.3)."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks needs", description=__doc__)
    parser.add_argument("--preset", default="names-quick")
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args(sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, asked.preset, f"{folder}/run", *asked.set]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said, measured = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{asked.preset}: {said:,.0f} MB said, {measured:,.0f} MB at the peak: {said / measured:.2f} (goal 1.0 to 1.3)"
    )
