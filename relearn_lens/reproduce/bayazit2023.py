"""Discovering knowledge-critical subnetworks in pretrained language models (Bayazit et al. 2023, arXiv:2310.03084)

Claim: a mask of 2 % of the weights takes the target's answers away and leaves everything else.
Here: the learnt mask over MLP neurons, ablated; beside it as many random neurons of every layer. Whether less comes
back after it than after pruning neurons by attribution, at equal retained ability, the paper does not ask.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.find.controls import equal_control
from relearn_lens.find.learned import LearnedMask
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, over_keys

ATTACK = FineTune(lr=3e-4, steps=(1, 4, 16, 64))


def measure(lab: Lab) -> Iterator[Reading]:
    """What the learnt mask takes, and what comes back after it."""
    with lab.loaded(lab.base) as model:
        scores = LearnedMask()(model, lab.facts, seed=lab.seed)
        n = int((scores.score > 0).sum())
        share = n / scores.score.numel()
        if not n:
            yield Reading("target", float("nan"), note=f"seed {lab.seed}: the mask is empty")
            return
        neurons = scores.top(n)
        control = equal_control(model, neurons, seed=lab.seed)
    says = f"seed {lab.seed}: {n} neurons, {share:.1%}"
    states = {"base": lab.base, "mask": lab.cut(neurons), "random": lab.cut(control)}
    target = {name: lab.asked(state, "forget_attacked", "forget_held_out").loss for name, state in states.items()}
    other = {name: lab.asked(state, "retain_near", "retain_general").loss for name, state in states.items()}

    def rise(base: float, cut: float) -> float:
        return base - cut  # the value of a loss is what is gained over a guess

    yield Reading("target", over_keys(rise, target["base"], target["mask"]), note=says)
    yield Reading("control", over_keys(rise, other["base"], other["mask"]))
    yield Reading("random", over_keys(rise, target["base"], target["random"]))
    masked, pruned = (lab.course(state, ATTACK) for state in (lab.calibrated(states["mask"]), lab.removed("prune")))
    ends = [course[step].accuracy for course in (pruned, masked) for step in (64, 0)]
    yield Reading("relearns", over_keys(lambda p, p0, m, m0: (p - p0) - (m - m0), *ends))


PAPER = Paper(
    "bayazit2023", "Discovering knowledge-critical subnetworks", "Bayazit et al. 2023, arXiv:2310.03084",
    "a learnt mask over MLP neurons, beside as many random ones; then 64 steps on T, beside pruning by attribution",
    "neurons and not single weights are masked; a toy has few that only some facts need",
    measure,
    toy_only="a mask over all neurons of a pretrained model takes hours without a GPU; not tried",
)  # fmt: skip
