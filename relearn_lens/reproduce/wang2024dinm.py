"""Detoxifying large language models via knowledge editing (Wang et al. 2024, arXiv:2403.14472)

Claims: the layer where two answers lie farthest apart is the one to edit, and a KL term keeps what is general.
Here: ten steps on the output matrix of one block teach refusals in the place of answers: the block of the largest
distance, beside each other block; paraphrases are asked. The released KL term has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.analysis.intervals import same_end
from relearn_lens.find.layers import layer_distance
from relearn_lens.find.localising import statements
from relearn_lens.reproduce.protocol import Lab, Paper, Reading
from relearn_lens.text.facts import FORGET, refused


def measure(lab: Lab) -> Iterator[Reading]:
    """Which block, and what the KL term keeps."""
    passages = statements(lab.facts)
    with lab.loaded(lab.base) as model:
        distance = layer_distance(model, passages, refused(passages, seed=lab.seed))
    blocks = range(len(distance.raw))
    located = int(distance.normalised.argmax())

    def gone(block: int) -> float:
        state = lab.removed("dinm", calibrated=False, layer=block)
        return 1 - lab.asked(state, *FORGET, forms=("paraphrase",)).accuracy.value("overall")

    by_block = [gone(block) for block in blocks]
    others = [value for block, value in enumerate(by_block) if block != located]
    mean = sum(others) / len(others)
    each = ", ".join(f"{value:.2f}" for value in by_block)
    says = f"seed {lab.seed}: block {located}; gone by block {each}"
    if same_end(by_block, others):
        yield Reading("located", float("nan"), note=f"{says}: no block could show a difference")
    else:
        yield Reading("located", by_block[located] - mean, mean, says)
    kept = [
        lab.asked(lab.removed("dinm", calibrated=False, layer=located, faithful=faithful), "retain_near")
        for faithful in (False, True)
    ]
    own, released = (answered.accuracy.value("overall") for answered in kept)
    if same_end([own], [released]):
        yield Reading("divergence", float("nan"), note=f"seed {lab.seed}: both keep {own:.2f} of what is near")
    else:
        yield Reading("divergence", own - released, released)
    raw, depth = int(distance.raw.argmax()), len(blocks) - 1
    alike = "the normalised distance picks the same block" if raw == located else ""
    yield Reading("unnormalised", raw / depth, located / depth, alike)


PAPER = Paper(
    "wang2024dinm", "Detoxifying large language models via knowledge editing", "Wang et al. 2024, arXiv:2403.14472",
    "DINM with its published values on each block; paraphrases, and what near facts keep with and without a gradient",
    "refusals stand for safe answers, and there are four blocks",
    measure,
)  # fmt: skip
