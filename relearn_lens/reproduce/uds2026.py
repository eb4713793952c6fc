"""How deep is unlearning? The unlearning depth score (2026)

Claims: by what hidden states bring to the model that knew, the base is at 0 and a model that never knew is at 1. Nobody
follows the score while a model relearns: here it is asked at every checkpoint.
Here: the base, the twin, and NPO at equal retained ability before and after 64 steps on T; depth of V.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.analysis.intervals import over_sentences
from relearn_lens.measure.asking import Reference, ask
from relearn_lens.measure.depth import UnlearningDepth
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading

ROLE = "forget_held_out"


def measure(lab: Lab) -> Iterator[Reading]:
    """Depth of V, of the base, the twin and a model that relearns."""
    asked = ask(lab.facts, roles=[ROLE], keys=None, wordings=1)
    reference = Reference(base=lab.model_of(lab.base), never=lab.model_of(lab.never))
    depth = UnlearningDepth()
    with lab.loaded(lab.base) as model:
        yield Reading("base", depth(model, asked, reference=reference).shown(ROLE))
    with lab.loaded(lab.never) as model:
        yield Reading("twin", 1 - depth(model, asked, reference=reference).shown(ROLE))
    attack = FineTune(lr=3e-4, steps=(1, 4, 16, 64))
    with lab.loaded(lab.removed("npo")) as model:
        course = {0: depth(model, asked, reference=reference)}
        for pause in attack(model, lab.facts, seed=lab.seed):
            course[pause.step] = depth(model, asked, reference=reference)
    says = ", ".join(f"{each.shown(ROLE):.2f} at {step}" for step, each in course.items())
    # The value of a depth is what is left.
    fall = over_sentences(lambda before, after: after - before, ROLE, course[0], course[64])
    yield Reading("course", fall, note=f"seed {lab.seed}: depth {says} steps")


PAPER = Paper(
    "uds2026", "The unlearning depth score", "2026",
    "depth of V for the base, the twin, and NPO at equal retained ability while it relearns T",
    "four blocks, and answers of one token",
    measure,
    toy_only="a pretrained model has no twin that never knew; `relearn-lens bench facts-smollm2` teaches it "
    "facts, and a twin",
)  # fmt: skip
