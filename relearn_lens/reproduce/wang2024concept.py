"""Editing conceptual knowledge for large language models (Wang et al. 2024, arXiv:2403.06259)

Claims: what a concept is can be edited, and its instances hardly follow.
Here: a model that was taught invented concepts with a class and ten instances each; training on new definitions and
classes of T's concepts; what is asked is the edit, and yes or no of each instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from relearn_lens.measure.edits import INSTANCES, RELIABILITY, edited
from relearn_lens.models import taught
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.reproduce.protocol import Lab, Paper, Reading
from relearn_lens.text.facts import FORGET, RETAIN, ontology
from relearn_lens.text.facts.encoded import encode_passages

EDITED = ("definition", "class")


def measure(lab: Lab) -> Iterator[Reading]:
    """Whether edits hold, and which answers about instances flip with them."""
    facts = ontology(lab.seed)
    recipe = taught.Recipe(seed=lab.seed)
    model, _ = taught.teach(facts, (*FORGET, *RETAIN), recipe=recipe)
    base = taught.untaught(facts, recipe=recipe)
    base.load_weights(model.weights())
    passages = [p for p in facts.passages("forget_attacked") if p.relation in EDITED]
    # Each concept is said to be what another one is.
    keys = list(dict.fromkeys(p.key for p in passages))
    after = dict(zip(keys, [*keys[1:], *keys[:1]], strict=True))
    answers = {(p.key, p.relation): p.answer for p in passages}
    edits = [
        replace(p, answer=answers[after[p.key], p.relation], choices=())
        for p in passages
        if answers[after[p.key], p.relation] != p.answer
    ]
    trained = [p for p in edits if p.form == "statement"]
    text = encode_passages(trained, model.tokenizer, context=model.context)
    for _ in FineTune(lr=3e-4, steps=(64,), batch_size=16)(model, text, seed=lab.seed):
        pass
    scores = edited(model, base, facts, edits)
    says = ", ".join(f"{name} {each.shown('overall'):.2f}" for name, each in scores.scores.items())
    yield Reading("reliable", scores[RELIABILITY].value("overall"), note=f"seed {lab.seed}: {says}")
    change = scores[INSTANCES].value("overall")
    yield Reading("instances", 0.3 - change, 0.3)


PAPER = Paper(
    "wang2024concept", "Editing conceptual knowledge for large language models",
    "Wang et al. 2024, arXiv:2403.06259",
    "64 steps on new definitions and classes of T's concepts; the edit, and yes or no of their instances",
    "four invented concepts a seed; no editor beside fine-tuning",
    measure,
    toy_only="its concepts are invented, so no pretrained model knows them",
)  # fmt: skip
