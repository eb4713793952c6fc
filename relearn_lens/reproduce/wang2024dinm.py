"""Detoxifying large language models via knowledge editing (Wang et al. 2024, arXiv:2403.14472)

Claims: the layer where two answers lie farthest apart is the one to edit, and a KL term keeps what is general.
Here: steps on the output matrix of one block teach refusals in the place of answers: the block of the largest
distance, beside three others; paraphrases are asked, at equal retained ability. The released KL term has no gradient.
The published ten steps at 5e-4 edit nothing of a toy (nor do they at 5e-3), whichever block they work on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relearn_lens.analysis.intervals import same_end
from relearn_lens.find.layers import layer_distance
from relearn_lens.find.localising import statements
from relearn_lens.reproduce.protocol import Lab, Paper, Reading
from relearn_lens.text.facts import FORGET, refused

EDIT = {"toy": {"edit": 10, "alpha": 1, "lr": 3e-3, "steps": (96,)}, "real": {}}
"""As strong on the toy as it takes for half of the statements to be refused, in the mean over two blocks of seed 0
(weights .1 and 1 of the edit refuse less than a tenth); paraphrases were not asked."""
OTHERS = 3


def measure(lab: Lab) -> Iterator[Reading]:
    """Which block, and what the KL term keeps."""
    passages = statements(lab.facts)
    with lab.loaded(lab.base) as model:
        distance = layer_distance(model, passages, refused(passages, seed=lab.seed))
    blocks = len(distance.raw)
    located = int(distance.normalised.argmax())
    drawn = np.random.default_rng(lab.seed).permutation([block for block in range(blocks) if block != located])
    others = sorted(int(block) for block in drawn[:OTHERS])

    def gone(block: int) -> float:
        state = lab.removed("dinm", where=None, layer=block, **EDIT[lab.scale])
        if lab.scale == "toy":
            return 1 - lab.asked(state, *FORGET, forms=("paraphrase",)).accuracy.value("overall")
        # A pretrained model hardly goes on with an answer in a second wording, and prefers it among the choices.
        return 1 - lab.chosen(state, *FORGET, form="paraphrase").value("overall")

    ours, theirs = gone(located), [gone(block) for block in others]
    mean = sum(theirs) / len(theirs)
    each = ", ".join(f"{value:.2f} by {block}" for block, value in zip(others, theirs, strict=True))
    says = f"seed {lab.seed}: gone {ours:.2f} by block {located}, {each}"
    if same_end([ours], theirs):
        yield Reading("located", float("nan"), note=f"{says}: no block could show a difference")
    else:
        yield Reading("located", ours - mean, mean, says)
    kept = [
        lab.asked(
            lab.removed("dinm", where=None, calibrated=False, layer=located, faithful=faithful, **EDIT[lab.scale]),
            "retain_near",
        )
        for faithful in (False, True)
    ]
    own, released = (answered.accuracy.value("overall") for answered in kept)
    if same_end([own], [released]):
        yield Reading("divergence", float("nan"), note=f"seed {lab.seed}: both keep {own:.2f} of what is near")
    else:
        yield Reading("divergence", own - released, released)
    raw, depth = int(distance.raw.argmax()), blocks - 1
    alike = "the normalised distance picks the same block" if raw == located else ""
    yield Reading("unnormalised", raw / depth, located / depth, alike)


PAPER = Paper(
    "wang2024dinm", "Detoxifying large language models via knowledge editing", "Wang et al. 2024, arXiv:2403.14472",
    "DINM on the located block and on three others at equal retained ability, by paraphrases; and what near facts keep "
    "with a gradient through the KL and without",
    "refusals stand for safe answers, there are four blocks, and the steps are more, longer and heavier than published",
    measure,
)  # fmt: skip
