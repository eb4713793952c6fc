"""Unlearning or obfuscating? Jogging the memory of unlearned LLMs via benign relearning (Hu et al. 2024,
arXiv:2406.13356)

Claim: text about the topic, without any answer, brings answers back.
Here: after gradient ascent, fine-tuning on four kinds of text of equal length (about T's keys or not, in the form of
the questions or not), none of which holds an answer; T is asked, since V's keys are in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from relearn_lens.relearn.finetuning import Benign
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, over_keys

STEPS = (1, 2, 4, 8, 16)
ROLE = "forget_attacked"


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
    taught = twin[last].loss.value("overall") - twin[0].loss.value("overall")
    yield Reading("falls", over_keys(gains, *both), taught)
    form, topic = arms["form"][0], arms["topic"][0]
    yield Reading("form", over_keys(lambda f, t: f - t, form[last].loss, topic[last].loss))
    yield Reading("twin", over_keys(lambda n, t: t - n, twin[0].accuracy, twin[last].accuracy))


PAPER = Paper(
    "hu2024", "Jogging the memory of unlearned LLMs via benign relearning", "Hu et al. 2024, arXiv:2406.13356",
    "gradient ascent at equal retained ability, then 16 steps on text without answers: on the topic or not, in the "
    "form or not",
    "every fact was taught equally often, so repetitions are not varied; the text is made, not found",
    measure,
)  # fmt: skip
