"""Unlearning or obfuscating? Jogging the memory of unlearned LLMs via benign relearning (Hu et al. 2024,
arXiv:2406.13356)

Claim: text about the topic, without any answer, brings answers back.
Here: after gradient ascent, fine-tuning on four kinds of text of equal length (about T's keys or not, in the form of
the questions or not), none of which holds an answer; T is asked, since V's keys are in none of them. For repetitions
the twin is taught T's facts anew, each quarter of the keys twice as often as the last, and forgets them uncalibrated.
Beside it what the same text does to facts that were to stay: text that damages all answers jogs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from relearn_lens.relearn.finetuning import Benign, FineTune
from relearn_lens.remove.recipes import recipe
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, State, over_keys, rank_correlation
from relearn_lens.text.facts import TRAINED
from relearn_lens.text.facts.encoded import encode_passages

STEPS = (1, 2, 4, 8, 16)
ROLE = "forget_attacked"
OFTEN = (1, 2, 4, 8)


def measure(lab: Lab) -> Iterator[Reading]:
    """What each kind of text does to the loss on answers that it does not hold."""
    removed = lab.removed("gradient_ascent")
    arms = {}
    for arm in ("topic and form", "topic", "form"):
        attack = Benign(arm=arm, lr=3e-4, steps=STEPS)
        arms[arm] = lab.course(removed, attack, ROLE), lab.course(lab.never, attack, ROLE)
    last = max(STEPS)

    def gains(b: float, a: float, n: float, t: float) -> float:
        return (a - b) - (t - n)  # the value of a loss is what is gained over a guess

    course, twin = arms["topic and form"]
    both = [course[0].loss, course[last].loss, twin[0].loss, twin[last].loss]
    near = lab.course(removed, Benign(arm="topic and form", lr=3e-4, steps=(last,)), "retain_near")
    damage = near[last].loss.value("overall") - near[0].loss.value("overall")
    left = course[0].accuracy.value("overall")
    says = f"seed {lab.seed}: {left:.2f} of T answered before; what was to stay changes by {damage:.2f} nats"
    yield Reading("falls", over_keys(gains, *both), damage, says)
    form, topic = arms["form"][0], arms["topic"][0]
    yield Reading("form", over_keys(lambda f, t: f - t, form[last].loss, topic[last].loss))
    yield Reading("twin", over_keys(lambda n, t: t - n, twin[0].accuracy, twin[last].accuracy))
    often = _often(lab)
    repeated = lab.course(_removed(lab, often), Benign(arm="topic and form", lr=3e-4, steps=(last,)), ROLE)
    gained, control = ({key: a[0].loss.by_key()[key] - a[last].loss.by_key()[key] for key in often}
                       for a in (repeated, twin))  # fmt: skip
    beyond = [gained[key] - control[key] for key in often]
    of_twin = rank_correlation(list(often.values()), list(control.values()))
    says = ", ".join(f"{n} times {sum(gained[k] for k in often if often[k] == n) * len(OFTEN) / len(often):.2f} nats"
                     for n in OFTEN)  # fmt: skip
    yield Reading("repeats", rank_correlation(list(often.values()), beyond), of_twin, f"seed {lab.seed}: {says}")


def _often(lab: Lab) -> dict[str, int]:
    """How often the facts of each key of T are in what the twin is taught: a quarter of the keys each, by seed."""
    keys = list(dict.fromkeys(p.key for p in lab.facts.passages(ROLE)))
    order = np.random.default_rng(lab.seed).permutation(len(keys))
    return {keys[i]: OFTEN[place * len(OFTEN) // len(keys)] for place, i in enumerate(order)}


def _removed(lab: Lab, often: Mapping[str, int]) -> State:
    """The twin that was taught T's facts so often, after gradient ascent on them."""
    passages = [p for p in lab.facts.passages(ROLE, forms=TRAINED) for _ in range(often[p.key])]
    with lab.loaded(lab.never) as model:
        text = encode_passages(passages, model.tokenizer, context=model.context)
        for _ in FineTune(lr=1e-3, steps=(96,), batch_size=32)(model, text, seed=lab.seed):
            pass
        for _ in recipe("toy", "gradient_ascent")(model, lab.facts, seed=lab.seed):
            pass
        return State({name: value.clone() for name, value in model.weights().items()}, "repeated")


PAPER = Paper(
    "hu2024", "Jogging the memory of unlearned LLMs via benign relearning", "Hu et al. 2024, arXiv:2406.13356",
    "gradient ascent at equal retained ability, then 16 steps on text without answers: on the topic or not, in the "
    "form or not",
    "facts of one token; the text is made, not found",
    measure,
    toy_only="a pretrained model has no twin that never knew; `relearn-lens bench facts-smollm2` teaches it "
    "facts, and a twin",
)  # fmt: skip
