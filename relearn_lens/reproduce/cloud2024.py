"""Gradient routing: masking gradients to localize computation in neural networks (Cloud et al. 2024, arXiv:2410.04332)

Claims: what is forgotten is learnt in a place of its own, also where half of it was not labelled; one item brings less
of it back than 64 do; and a model that was trained already cannot be routed.
Here: models of three blocks learn what 60 invented people do in 300 steps, from nothing: routed with all labels, routed
and filtered with half of them (the rest is taught as if it were to stay), and routed from weights that know all of it.
Each is then fine-tuned on T for 16 steps, and V is asked. There is no calibration: each keeps what its note says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from relearn_lens.measure.answers import Answered, answer
from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.relearn.finetuning import FineTune
from relearn_lens.remove.routing import GradientRoute
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, over_keys
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED, Facts, Passage, people
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages

PEOPLE = {"n": 60, "forget": 24, "never": 4, "animals": 12, "n_answers": 8}
RECIPE = {"n_layers": 3, "d_model": 96, "n_heads": 4, "d_mlp": 384, "steps": 300, "batch_size": 64, "lr": 3e-3}
AGAIN = {"lr": 3e-4, "steps": (16,), "batch_size": 16}
ROUTE = GradientRoute(layers=2)


def measure(lab: Lab) -> Iterator[Reading]:
    """What routing, filtering and routing afterwards keep out."""
    facts, recipe = people(lab.seed, **PEOPLE), taught.Recipe(seed=lab.seed, **RECIPE)
    forget, retain = (facts.passages(*roles, forms=TRAINED) for roles in (FORGET, RETAIN))
    drawn = np.random.default_rng(lab.seed).permutation(len(forget))
    labelled, missed = ([forget[i] for i in half] for half in np.array_split(drawn, 2))

    def routed(model: LanguageModel, forget: Sequence[Passage], retain: Sequence[Passage]) -> LanguageModel:
        how = {"lr": recipe.lr, "steps": (recipe.steps,), "batch_size": recipe.batch_size}
        texts = {"forget": _encoded(model, forget), "retain": _encoded(model, retain)}
        for _ in ROUTE(model, texts, seed=lab.seed, **how):
            pass
        return model

    def filtered(model: LanguageModel, retain: Sequence[Passage]) -> LanguageModel:
        training = FineTune(
            lr=recipe.lr, steps=(recipe.steps,), batch_size=recipe.batch_size, schedule="linear"
        )(model, _encoded(model, retain), seed=lab.seed)  # fmt: skip
        for _ in training:
            pass
        return model

    knowing, _ = taught.teach(facts, (*FORGET, *RETAIN), recipe=recipe)
    models = {
        "routed": routed(taught.untaught(facts, recipe=recipe), forget, retain),
        "half routed": routed(taught.untaught(facts, recipe=recipe), labelled, [*retain, *missed]),
        "half filtered": filtered(taught.untaught(facts, recipe=recipe), [*retain, *missed]),
        "afterwards": routed(knowing, forget, retain),
    }
    near = facts.passages("retain_near", forms=TRAINED)
    kept = {name: answer(model, near).accuracy.value("overall") for name, model in models.items()}
    says = f"seed {lab.seed}: near by {', '.join(f'{name} {value:.2f}' for name, value in kept.items())}"
    before = {name: _asked(model, facts) for name, model in models.items()}
    after = {name: _relearned(model, facts, 64, lab.seed) for name, model in models.items()}
    one = _relearned(models["routed"], facts, 1, lab.seed)

    def less(ours: float, theirs: float) -> float:
        return theirs - ours  # the value of a loss is what is gained over a guess

    for key, ours, theirs in (("absorbs", "half routed", "half filtered"), ("posthoc", "routed", "afterwards")):
        started = over_keys(less, before[ours].loss, before[theirs].loss).value
        yield Reading(key, over_keys(less, after[ours].loss, after[theirs].loss), started, says)
    yield Reading("items", over_keys(less, one.loss, after["routed"].loss))


def _encoded(model: LanguageModel, passages: Sequence[Passage]) -> EncodedPassages:
    return encode_passages(passages, model.tokenizer, context=model.context)


def _asked(model: LanguageModel, facts: Facts) -> Answered:
    return answer(model, facts.passages("forget_held_out", forms=TRAINED), closed=facts.answers())


def _relearned(model: LanguageModel, facts: Facts, items: int, seed: int) -> Answered:
    """What V is like after training on so many passages of T; the model is as before afterwards."""
    weights = {name: value.clone() for name, value in model.weights().items()}
    try:
        for _ in FineTune(items=items, **AGAIN)(model, facts, seed=seed):
            pass
        return _asked(model, facts)
    finally:
        model.load_weights(weights)


PAPER = Paper(
    "cloud2024", "Gradient routing: masking gradients to localize computation", "Cloud et al. 2024, arXiv:2410.04332",
    "routing with all labels and with half, filtering with half, routing a trained model; 16 steps on 64 passages of T "
    "or on one; V is asked, beside what it was before",
    "300 steps of a model of 0.4 M parameters, not 20,000 of 28 M; nothing was tuned, so what each keeps differs",
    measure,
    toy_only="routing is a way of pretraining, from nothing",
)  # fmt: skip
