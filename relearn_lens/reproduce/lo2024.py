"""Large language models relearn removed concepts (Lo, Cohen, Barez 2024, arXiv:2401.01814)

Claims: a concept whose neurons were pruned is back after a few epochs, nearer the input, in neurons that were primed
for it. Where it is, the paper reads from saliency; grafts ask by intervention.
Here: the toy tagger with a planted concept; half of the neurons are pruned, as published, and it trains on for eight
epochs; beside it random neurons, and nothing cut.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.analysis import migration
from relearn_lens.reproduce.protocol import Lab, Paper, Reading
from relearn_lens.runs.answers import heirs
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.store import run

ARMS = ("concept", "random", "unpruned")


def measure(lab: Lab) -> Iterator[Reading]:
    """One seed of the published protocol on the toy."""
    settings = settings_of(
        "toy",
        {
            "seeds": [lab.seed], "arms": list(ARMS), "prune": {"fraction": 0.5},
            "retrain": {"epochs": 8, "every": 2, "restart": True, "schedule": "linear", "warmup": 0},
        },
    )  # fmt: skip
    result = run(settings, lab.folder / "lo2024" / f"run-{lab.seed}")
    label = result.label
    arms = {name: result.arms[name][0] for name in ARMS}

    def share(name: str) -> float:
        stages = list(arms[name].snapshots.values())
        base, cut, last = (stages[i].scores.shown(label) for i in (0, 1, -1))
        return (last - cut) / (base - cut) if base - cut > 0.1 else float("nan")

    f1 = ", ".join(f"{each.scores.shown(label):.2f}" for each in arms["concept"].snapshots.values())
    yield Reading("returns", share("concept"), share("random"), f"seed {lab.seed}: F1 {f1} from the base to the end")
    centres = {name: migration.centre(list(path.snapshots.values())[-1].saliency) for name, path in arms.items()}
    depth = len(arms["concept"].site.layers) - 1
    earlier = (centres["unpruned"] - centres["concept"]) / depth
    yield Reading("earlier", earlier, (centres["unpruned"] - centres["random"]) / depth)
    for each in heirs(result, "primed") or ():
        yield Reading("primed", each.concept - (each.unpruned or 0.0), each.unpruned)
    last = list(result.grafted[0].stages.values())[-1]
    part = max((name for name in last.parts if name != "cut"), key=lambda name: last.enough(name).value)
    control = last.most_of_controls()
    yield Reading("where", last.enough(part).value - control, control, f"seed {lab.seed}: {part}")


PAPER = Paper(
    "lo2024", "Large language models relearn removed concepts", "Lo, Cohen, Barez 2024, arXiv:2401.01814",
    "half of a toy tagger's neurons pruned by probeless ranking, eight epochs; random neurons and nothing beside it",
    "the concept is planted in 4 of 256 neurons; `relearn-lens run lo2024` is the protocol at its scale",
    measure,
    toy_only="the protocol at its own scale is `relearn-lens run lo2024`",
)  # fmt: skip
