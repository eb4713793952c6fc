"""Do unlearning methods remove information from language model weights? (Deeb and Roger 2024, arXiv:2410.08827)

Claim: fine-tuning an unlearned model on half of the facts brings back most of the other half, so unlearning hides.
Here: three removers at equal retained ability; each is fine-tuned on T for 64 steps, V is asked, and the twin that
never saw either half goes the same way. The learning rate is that of a pilot on seed 0, and the last step is reported.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, averaged, recovered

REMOVERS = ("grad_diff", "npo", "rmu")
ATTACK = FineTune(lr=3e-4, steps=(1, 2, 4, 8, 16, 32, 64))


def measure(lab: Lab) -> Iterator[Reading]:
    """Recovery of V, mean over removers."""
    base, never = lab.asked(lab.base, "forget_held_out"), lab.course(lab.never, ATTACK)
    last = max(never)
    each, taught = [], []
    for remover in REMOVERS:
        course = lab.course(lab.removed(remover), ATTACK)
        scores = (base.accuracy, course[0].accuracy, course[last].accuracy, never[0].accuracy, never[last].accuracy)
        each.append(recovered(*scores))
        if each[-1].interval:
            gap = base.accuracy.value("overall") - course[0].accuracy.value("overall")
            taught.append((never[last].accuracy.value("overall") - never[0].accuracy.value("overall")) / gap)
    says = ", ".join(
        f"{remover} {f'{one.value:.2f}' if one.interval else one.over}"
        for remover, one in zip(REMOVERS, each, strict=True)
    )
    control = sum(taught) / len(taught) if taught else None
    yield Reading("back", averaged(each), control, f"seed {lab.seed}: {says}")
    why = "all that the toy knows was taught to it last; it takes a pretrained model"
    yield Reading("pretrained", float("nan"), note=f"not measured: {why}, its own facts beside some it is taught")


PAPER = Paper(
    "deeb2024", "Do unlearning methods remove information from language model weights?",
    "Deeb and Roger 2024, arXiv:2410.08827",
    "GradDiff, NPO and RMU at equal retained ability, fine-tuned on T for 64 steps; V is asked, beside the twin",
    "a model of 0.9 M parameters that was taught the facts from nothing, so nothing is said of pretrained facts",
    measure,
    toy_only="a pretrained model has no twin that never knew; `relearn-lens bench facts-smollm2` teaches it "
    "facts, and a twin",
)  # fmt: skip
