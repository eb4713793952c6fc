"""Neuroplasticity and corruption in model mechanisms: a case study of indirect object identification (Chhabra et al.
2025, arXiv:2503.01896)

Claims: poisoned data turn the task around within five epochs, through few heads; clean data bring back the same
circuit, faster than it was learned.
Here: a model of 24 heads that was taught the task from nothing, poisoned (the answer is the name that comes twice) and
cleaned for five passes each; heads are read by path patching and by cross-model patching on pairs of names that were
never taught together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from relearn_lens.find.circuits import faithfulness
from relearn_lens.measure.answers import choose
from relearn_lens.measure.crosspatch import cross_patch, head_roles
from relearn_lens.models import ioi, taught
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading
from relearn_lens.text.facts.encoded import encode_facts

PASSAGES = 60
HEADS = 10 / 144
"""The paper's ten heads of GPT-2's."""
CIRCUIT = 0.25
"""Share of the heads whose circuit is asked for its faithfulness."""
STEPS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384)
LEARNED = 0.8


def measure(lab: Lab) -> Iterator[Reading]:
    """The heads of the taught, the poisoned and the cleaned model."""
    stages = ioi.load(seed=lab.seed)
    model, asked, abc = stages.model, stages.asked()[:PASSAGES], stages.asked("abc")[:PASSAGES]
    roles = head_roles(model, stages.weights, asked, abc, metric="logit_difference")
    before, after, _ = roles.clean
    yield Reading("flips", -after, -before)
    n = roles.site.n_neurons
    patched = cross_patch(model, stages.weights["poisoned"], stages.weights["taught"], asked, metric="logit_difference")
    k = math.ceil(HEADS * n)
    yield Reading("concentrated", patched.concentration(k), k / n, f"{k} of {n} heads; {patched.refused or ''}")
    yield Reading(
        "same_heads", roles.rank_correlation("taught", "cleaned"), roles.rank_correlation("taught", "poisoned")
    )
    circuit = roles.top("taught", round(CIRCUIT * n))
    model.load_weights(stages.weights["cleaned"])
    faithful = faithfulness(model, asked, abc, circuit, metric="logit_difference")
    yield Reading("faithful", faithful.value, CIRCUIT, f"{faithful.n_heads} heads; {faithful.refused or ''}")
    yield Reading("savings", math.log(_steps(stages, taught.untaught(stages.facts, recipe=_recipe(lab)).weights())
                                      / _steps(stages, stages.weights["poisoned"])))  # fmt: skip


def _recipe(lab: Lab) -> taught.Recipe:
    return taught.Recipe(**{**vars(ioi.RECIPE), "seed": lab.seed})


def _steps(stages: ioi.Stages, start) -> int:
    """Steps of the same training on clean sentences until the right name is preferred; the last where it never is."""
    model = stages.model
    model.load_weights(start)
    text = encode_facts(stages.facts, *ioi.ROLES, tokenizer=model.tokenizer, context=model.context)
    how = FineTune(steps=STEPS, lr=ioi.AGAIN.lr, batch_size=ioi.AGAIN.batch_size)
    for pause in how(model, text, seed=1):
        if choose(model, stages.asked()[:PASSAGES]).value("overall") >= LEARNED:
            return pause.step
    return STEPS[-1]


PAPER = Paper(
    "chhabra2025", "Neuroplasticity and corruption in model mechanisms: indirect objects",
    "Chhabra et al. 2025, arXiv:2503.01896",
    "a native model taught the task, poisoned and cleaned for five passes each, read by path and cross-model patching",
    "three blocks of eight heads, so 7 % of the heads are two",
    measure,
    toy_only="poisoning and cleaning are ten passes over 2,000 sentences, hours of a pretrained model without a GPU",
)  # fmt: skip
