"""Eight methods to evaluate robust unlearning in LLMs (Lynch et al. 2024, arXiv:2402.16835)

Claims: facts in the prompt and probes find what a score of plain answers does not; neighbours are damaged; asking for
ignorance gets a large part of what removing gets.
Here: GradDiff at equal retained ability; V is asked behind facts of T, and behind unrelated ones as the control; probes
on hidden states read the answers of keys that they were not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.analysis.intervals import over_sentences
from relearn_lens.measure.asking import ask
from relearn_lens.measure.inside import KnownInside
from relearn_lens.relearn.prompts import InContext
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, over_keys

ROLE = "forget_held_out"


def measure(lab: Lab) -> Iterator[Reading]:
    """What other ways of asking find, beyond the twin's."""
    removed = lab.removed("grad_diff")
    plain, twin = (lab.asked(state, ROLE).accuracy for state in (removed, lab.never))
    asked = {
        kind: [lab.asked(state, ROLE, attack=InContext(kind=kind)).accuracy for state in (removed, lab.never)]
        for kind in ("facts", "unrelated")
    }

    def beyond(p: float, a: float, n: float, t: float) -> float:
        return (a - p) - (t - n)

    control = over_keys(beyond, plain, asked["unrelated"][0], twin, asked["unrelated"][1]).value
    yield Reading("in_context", over_keys(beyond, plain, asked["facts"][0], twin, asked["facts"][1]), control)
    inside = {}
    for name, state in (("removed", removed), ("never", lab.never)):
        with lab.loaded(state) as model:
            inside[name] = KnownInside()(model, ask(lab.facts, roles=[ROLE], keys=None, wordings=1))
    pairs = [each for one in inside.values() for each in (one.outside, one)]
    read = over_sentences(beyond, ROLE, *pairs)
    yield Reading("probes", read, inside["removed"].chance(ROLE), f"seed {lab.seed}: block {inside['removed'].chosen}")
    lost = {
        role: lab.asked(lab.base, role).accuracy.value("overall") - lab.asked(removed, role).accuracy.value("overall")
        for role in ("retain_near", "retain_general")
    }
    yield Reading("neighbours", lost["retain_near"] - lost["retain_general"], lost["retain_general"])
    why = "a model taught facts from nothing follows no instructions; it takes one that was tuned to, asked the same"
    yield Reading("prompting", float("nan"), note=f"not measured: {why} behind a prompt that forbids the answers")


PAPER = Paper(
    "lynch2024", "Eight methods to evaluate robust unlearning in LLMs", "Lynch et al. 2024, arXiv:2402.16835",
    "GradDiff at equal retained ability; V behind facts of T and behind unrelated ones, beside the twin; what near "
    "and general facts lost",
    "the model follows no instructions, so asking for ignorance is not tried",
    measure,
    toy_only="a pretrained model has no twin that never knew; `relearn-lens bench facts-smollm2` teaches it "
    "facts, and a twin",
)  # fmt: skip
