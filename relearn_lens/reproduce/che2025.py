"""Model tampering attacks enable more rigorous evaluations of LLM capabilities (Che et al. 2025, arXiv:2502.05209)

Claims: what attacks recover lies in few dimensions, tampering predicts prompt attacks, and sixteen steps undo any
remover.
Here: five removers, each at three shares of its way from the base (half, three quarters and all of what calibration
left), make fifteen models; each is attacked by training, compression and prompts, and V is asked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from relearn_lens.relearn.compression import Pruned, Quantised
from relearn_lens.relearn.finetuning import FineTune, RetainOnly
from relearn_lens.relearn.inputs import DirectionAblated
from relearn_lens.relearn.prompts import InContext, OtherForm, Paraphrase
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, rank_correlation

REMOVERS = ("gradient_ascent", "grad_diff", "npo", "rmu", "prune")
SHARES = (0.5, 0.75, 1.0)
TAMPERING = {
    "T at 3e-4": FineTune(lr=3e-4, steps=(4, 16)),
    "T at 1e-3": FineTune(lr=1e-3, steps=(4, 16)),
    "retained": RetainOnly(lr=3e-4, steps=(16,)),
    "int4": Quantised(bits=4),
    "pruned": Pruned(share=0.3),
    "direction": DirectionAblated(),
}
PROMPTS = {"in context": InContext(), "paraphrase": Paraphrase(), "options": OtherForm()}


def measure(lab: Lab) -> Iterator[Reading]:
    """The matrix of models and attacks: the best of each attack's checkpoints on V."""
    whole = lab.asked(lab.base, "forget_held_out").accuracy.value("overall")
    rows, regained = [], {}
    for remover in REMOVERS:
        removed = lab.removed(remover)
        for share in SHARES:
            state = lab.towards(removed, share)
            courses = {name: lab.course(state, attack) for name, attack in {**TAMPERING, **PROMPTS}.items()}
            best = {
                name: max(each.accuracy.value("overall") for step, each in course.items() if step)
                for name, course in courses.items()
            }
            rows.append([best[name] for name in best])
            before = courses["int4"][0].accuracy.value("overall")
        gap = whole - before
        tampered = max(best[name] for name in TAMPERING)
        regained[remover] = (tampered - before) / gap if gap > 0.1 else float("nan")
    matrix = np.array(rows)
    spread = np.linalg.svd(matrix - matrix.mean(0), compute_uv=False) ** 2
    yield Reading("low_rank", float(spread[:3].sum() / spread.sum()), note=f"{len(rows)} models a seed")
    n = len(TAMPERING)
    yield Reading("predicts", rank_correlation(matrix[:, :n].mean(1), matrix[:, n:].mean(1)))
    says = ", ".join(f"{remover} {share:.2f}" for remover, share in regained.items())
    yield Reading("every_remover", min(regained.values()), note=f"seed {lab.seed}: {says}")


PAPER = Paper(
    "che2025", "Model tampering attacks enable more rigorous evaluations", "Che et al. 2025, arXiv:2502.05209",
    "five removers at three shares, six attacks on weights and hidden states, three on prompts; V is asked",
    "fifteen models from five removers, which are less unlike each other than the paper's sixty-five",
    measure,
    toy_only="fifteen removals under nine attacks take a pretrained model hours without a GPU; not tried",
)  # fmt: skip
