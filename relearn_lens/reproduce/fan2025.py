"""Towards LLM unlearning resilient to relearning attacks: a sharpness-aware minimization perspective and beyond (Fan et
al. 2025, arXiv:2502.05374)

Claims: SAM around NPO makes relearning harder at equal ability, because the loss is flatter; the released gradient
penalty and curvature terms have no gradient of their own.
Here: NPO and NPO with SAM, calibrated, then fine-tuned on 20, 40 and 60 passages of T; V is asked. Flatness is one step
of AdamW on the forgotten facts whose length is SAM's radius. Released terms are compared by where three steps without
clipping lead: AdamW does not see the length of a gradient, so 2 grad f + grad r is NPO with half of the retain weight.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.models.training import Step
from relearn_lens.models.training import plain as plain_step
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.remove.losses import NPO
from relearn_lens.remove.wrappers import Curvature, GradientPenalty
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, State, averaged, distance, over_keys

ITEMS = (20, 40, 60)
RATE = {"toy": 3e-4, "real": 5e-5}
RADIUS = 0.1
FEW = {"steps": (3,), "clip": 1e6}
"""The steps that terms are compared by."""


def measure(lab: Lab) -> Iterator[Reading]:
    """What comes back with SAM and without, and how flat it is."""
    states = {name: lab.removed(name) for name in ("npo", "npo+sam")}
    each = []
    for items in ITEMS:
        attack = FineTune(lr=RATE[lab.scale], items=items, steps=(16,))
        plain, sam = (lab.course(state, attack) for state in states.values())
        ends = [course[step].accuracy for course in (plain, sam) for step in (16, 0)]
        each.append(over_keys(lambda p, p0, s, s0: (p - p0) - (s - s0), *ends))
    yield Reading("resists", averaged(each), note=f"seed {lab.seed}: {', '.join(f'{one.value:.3f}' for one in each)}")
    step = FineTune(lr=RADIUS / lab.n_weights**0.5, steps=(1,), batch_size=128, weight_decay=0, warmup=0)
    roles = ("forget_attacked",)
    plain, sam = (lab.course(state, step, *roles) for state in states.values())
    falls = over_keys(
        lambda p, p1, s, s1: ((p1 - p) - (s1 - s)) / abs(p1 - p), plain[0].loss, plain[1].loss, sam[0].loss, sam[1].loss
    )
    yield Reading("flatter", falls)
    plain, doubled = _few(lab, NPO()), _few(lab, NPO(alpha=0.5))
    released, mended = (
        [_few(lab, NPO(), term(faithful=faithful)) for term in (GradientPenalty, Curvature)]
        for faithful in (True, False)
    )
    ways = [distance(state, plain, lab.base) for state in mended]
    yield Reading("penalty_released", distance(released[0], plain, lab.base), ways[0])
    yield Reading("curvature_released", distance(released[1], doubled, lab.base), distance(plain, doubled, lab.base))
    yield Reading("mended", min(ways), note=f"seed {lab.seed}: penalty {ways[0]:.3f}, curvature {ways[1]:.3f}")


def _few(lab: Lab, remover: NPO, step: Step = plain_step) -> State:
    with lab.loaded(lab.base) as model:
        for _ in remover(model, lab.facts, seed=lab.seed, step=step, lr=RATE[lab.scale], **FEW):
            pass
        return State({name: value.clone() for name, value in model.weights().items()}, "few")


PAPER = Paper(
    "fan2025", "LLM unlearning resilient to relearning attacks: sharpness-aware minimization", "Fan et al. 2025, "
    "arXiv:2502.05374",
    "NPO with and without SAM at equal retained ability, fine-tuned on 20, 40, 60 passages of T for 16 steps",
    "a toy whose facts are answered in one token; SAM's radius is the released one, not tuned",
    measure,
)  # fmt: skip
