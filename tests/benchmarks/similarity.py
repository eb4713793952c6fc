"""Activation similarity against two bare forward passes of the batches: `python -m tests.benchmarks.similarity`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from relearn_lens.measure.similarity import Plan, activation_similarity
from relearn_lens.models.model import hidden, reading
from relearn_lens.neurons.sites import site_of
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import encode
from tests.benchmarks.__main__ import _interleaved, _model_and_text


def similarity(sentences: int = 60) -> None:
    """Two copies of the model: all words; the concept's too; weights kept from before; and in parts."""
    (before, text), (after, _) = _model_and_text(sentences), _model_and_text(sentences)
    encoded, site = encode(text, after.tokenizer, context=after.context), site_of(after.bridge)
    matrix = 4 * site.n_neurons**2
    ways: dict[str, dict[str, Any]] = {
        "all words": {},
        "all words and the concept's": {"concept": Concept("place")},
        "all words, weights kept from before": {
            "before": {name: value.clone() for name, value in after.weights().items()}
        },
        "all words, in parts": {"max_memory": 1.7 * matrix / 2**20},
    }
    plans: dict[str, Plan] = {}

    def bare() -> None:
        for model in (before, after):
            with reading(model):
                for batch in encoded.batches():
                    hidden(model.bridge, batch.ids, batch.mask)

    def compare(name: str) -> None:
        settings = {"before": before, **ways[name]}
        activation_similarity(**settings, after=after, text=encoded, on_plan=lambda plan: plans.update({name: plan}))

    plain, *seconds = _interleaved(bare, *(partial(compare, name) for name in ways))
    print(
        f"activation similarity, {site.name}, {site.n_neurons:,} neurons, {encoded.n_tokens:,} tokens, "
        f"{torch.get_num_threads()} threads; float32 matrix of all pairs {matrix / 2**20:,.0f} MiB; two bare forward "
        f"passes {plain:.2f} s"
    )
    for name, took in zip(ways, seconds, strict=True):
        plan = plans[name]
        print(
            f"  {name}: {took / plain:.2f} x two bare forward passes over the same batches; passes: {plan.passes}, at "
            f"most {plan.n_bytes / 2**20:,.0f} MiB = {plan.n_bytes / matrix:.2f} x the matrix"
        )


if __name__ == "__main__":
    similarity()
