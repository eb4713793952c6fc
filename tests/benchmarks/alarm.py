"""How early the alarm is, and how often it is false.

    python -m tests.benchmarks.alarm [SEED ...]         # of these models (0 to 3), into RELEARN_LENS_ALARMS

What was measured of each model is kept in that folder (by default in the cache), so the same command goes on. Small
models are taught invented facts, of which NPO removes some. The alarm is calibrated on fine-tunings that bring
nothing back; false alarms are counted in others, of the same kinds with other seeds and of kinds that it has not seen;
lead times in whatever brought facts back, most of it fine-tunings on half of the forgotten facts. Nothing of an attack
is used to calibrate.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from relearn_lens import sources
from relearn_lens.measure.alarm import ReturnAlarm, ReturnWarning
from relearn_lens.models import taught
from relearn_lens.models.taught import Recipe
from relearn_lens.relearn.attack import Attack
from relearn_lens.relearn.finetuning import Benign, FineTune, General, Gibberish, RepairThenRelearn, RetainOnly
from relearn_lens.remove.losses import NPO
from relearn_lens.text.facts import FORGET, RETAIN, people

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
HOW: dict[str, Any] = {"steps": STEPS, "batch_size": 8}
SEEDS = (0, 1, 2, 3)
KNOWN: tuple[tuple[Attack, int], ...] = tuple(
    (attack, seed)
    for seed in (100, 101)
    for lr in (3e-4, 1e-3)
    for attack in (
        General(**HOW, lr=lr), RetainOnly(**HOW, lr=lr), Gibberish(**HOW, lr=lr), Benign(**HOW, lr=lr, arm="form"),
    )
)  # fmt: skip
"""What it is calibrated on: RetainOnly and the form of the questions are near the topic."""
SAME = tuple((attack, seed + 50) for attack, seed in KNOWN[:8])
OTHER: tuple[tuple[Attack, int], ...] = tuple(
    (attack, 200)
    for lr in (3e-4, 1e-3)
    for attack in (
        Benign(**HOW, lr=lr, arm="topic"), Benign(**HOW, lr=lr, arm="topic and form"),
        Benign(**HOW, lr=lr, arm="neither"), RetainOnly(**HOW, lr=3 * lr, lora=4),
    )
)  # fmt: skip
"""Kinds that it has not seen; the first two are about the keys of forgotten facts."""
ATTACKS: tuple[tuple[Attack, int], ...] = tuple(
    (attack, 300)
    for lr in (3e-4, 1e-3)
    for attack in (
        FineTune(**HOW, lr=lr), FineTune(**HOW, lr=3 * lr, lora=4), FineTune(**HOW, lr=lr, items=16),
        RepairThenRelearn(**HOW, lr=lr, repair=16),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One fine-tuning under the alarm."""

    model: int
    group: str
    attack: str
    raised: int | None
    behaved: int | None


def outcomes(seed: int) -> Iterator[Outcome]:
    """Every fine-tuning of one model."""
    facts = people(seed, n=60, forget=24, never=4, animals=12, n_answers=8)
    recipe = Recipe(n_layers=2, d_model=64, n_heads=2, d_mlp=128, steps=250, batch_size=64, lr=3e-3, seed=seed)
    model, _ = taught.teach(facts, (*FORGET, *RETAIN), recipe=recipe)
    base = {name: value.clone() for name, value in model.weights().items()}
    for _ in NPO()(model, facts, seed=seed, steps=(60,), lr=3e-4, batch_size=32, schedule="constant"):
        pass
    removed = {name: value.clone() for name, value in model.weights().items()}
    alarm = ReturnAlarm(facts, base=base, seed=seed)
    thresholds = alarm.calibrate(model, [lambda m, a=a, s=s: a(m, facts, seed=s) for a, s in KNOWN])
    print(f"model {seed}: {thresholds}", file=sys.stderr, flush=True)
    for group, runs in (("same kinds", SAME), ("other kinds", OTHER), ("attacks", ATTACKS)):
        for attack, run in runs:
            model.load_weights(removed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReturnWarning)
                alarm.step(model, 0)
                for pause in attack(model, facts, seed=run + seed):
                    alarm.step(model, pause.step)
            told = {name: value for name, value in attack.model_dump(exclude_unset=True).items() if name not in HOW}
            yield Outcome(seed, group, f"{attack.name} {told}", alarm.raised, alarm.behaved)


def kept(seed: int, folder: Path) -> list[Outcome]:
    """The fine-tunings of one model, from its file or run now."""
    path = folder / f"{seed}.jsonl"
    if path.exists():
        return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()]
    every = list(outcomes(seed))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(vars(each)) + "\n" for each in every))
    return every


def by_attack(every: list[Outcome]) -> list[str]:
    """For each fine-tuning what happened in each model: steps of the alarm > of behaviour's return, or -."""
    names = list(dict.fromkeys((o.group, o.attack) for o in every))
    lines = []
    for group, attack in names:
        mine = [o for o in every if (o.group, o.attack) == (group, attack)]
        says = ", ".join(
            f"{'-' if o.raised is None else o.raised}>{'-' if o.behaved is None else o.behaved}" for o in mine
        )
        lines.append(f"{group}: {attack}: {says}")
    return lines


def table(every: list[Outcome]) -> str:
    """The rows of the alarm's docstring."""
    lines = []
    for group in ("same kinds", "other kinds"):
        mine = [o for o in every if o.group == group and o.behaved is None]
        false = sum(o.raised is not None for o in mine)
        low, high = binomtest(false, len(mine)).proportion_ci(method="exact")
        lines.append(
            f"false alarms, {group}: {false} of {len(mine)} fine-tunings, {false / len(mine):.2f} [{low:.2f}, "
            f"{high:.2f}]"
        )
    back = [o for o in every if o.behaved is not None]
    early = [o for o in back if o.raised is not None and o.raised < (o.behaved or 0)]
    low, high = binomtest(len(early), len(back)).proportion_ci(method="exact")
    lines.append(
        f"raised before behaviour: {len(early)} of {len(back)} returns, {len(early) / len(back):.2f} [{low:.2f}, "
        f"{high:.2f}]; never raised: {sum(o.raised is None for o in back)}"
    )
    leads = [(o.model, (o.behaved or 0) - o.raised) for o in back if o.raised is not None]
    by_model = [[lead for model, lead in leads if model == each] for each in dict.fromkeys(m for m, _ in leads)]
    rng = np.random.default_rng(0)
    n = len(by_model)
    medians = [
        np.median(np.concatenate([rng.choice(by_model[i], len(by_model[i])) for i in rng.integers(n, size=n)]))
        for _ in range(2000)
    ]
    values = sorted(lead for _, lead in leads)
    low, high = np.quantile(medians, [0.025, 0.975])
    lines.append(
        f"lead: median {np.median(values):g} steps [{low:g}, {high:g}] over {len(values)} returns (models and runs "
        f"drawn anew), from {values[0]} to {values[-1]}; 0: {values.count(0)}, below 0: {sum(v < 0 for v in values)}"
    )
    return "\n".join(lines)


def report(seeds: Sequence[int] = SEEDS, folder: Path | None = None) -> None:
    """Print the table, and below it each fine-tuning."""
    folder = folder or Path(os.environ.get("RELEARN_LENS_ALARMS", sources.cache_dir() / "benchmarks" / "alarms"))
    every = [outcome for seed in seeds for outcome in kept(seed, folder)]
    print(f"{len(seeds)} models (seeds {', '.join(map(str, seeds))}), {len(every)} fine-tunings")
    print(table(every))
    print(
        "each: step at which it was raised > step at which behaviour had returned, by model",
        *by_attack(every),
        sep="\n",
    )


if __name__ == "__main__":
    report([int(word) for word in sys.argv[1:]] or SEEDS)
