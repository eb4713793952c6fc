"""Prune a concept out of a transformer, retrain, and see where it comes back.

corpus = rl.read_conll("train.conll").split(seed=0)
tagger = rl.load_tagger("minilm", labels=corpus.train.label_names)
place = rl.Concept("place", labels=["LOC"])
for pause in rl.finetune_(tagger, corpus.train, epochs=3, seed=0): print(pause)
before = rl.measure(tagger, corpus.probe, place)
chosen = before.saliency.top(fraction=0.5)
control = rl.random_neurons(like=chosen, seed=0)
rl.prune_(tagger, chosen)
path = rl.track(tagger, corpus.probe, place, rl.retrain_(tagger, corpus.train), before=before, pruned=chosen)
rl.plots.layer_map(path)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relearn_lens import (
        analysis,
        captions,
        claims,
        explore,
        migration,
        plots,
        priming,
        recovery,
        reference,
        report,
        sources,
        sweeps,
        toy,
    )
    from relearn_lens.ablation import ablated, held, prune_
    from relearn_lens.attribution import Attribution, attribute, attribution_plan
    from relearn_lens.checkpoints import export
    from relearn_lens.concept import Concept
    from relearn_lens.corpus import Corpus, build_corpus
    from relearn_lens.encoding import encode
    from relearn_lens.evaluation import SpanScores, TokenLoss, evaluate
    from relearn_lens.loading import load_bridge, load_language_model, load_tagger
    from relearn_lens.lora import adapted
    from relearn_lens.meaning import concept_similarity, concept_words, polysemy
    from relearn_lens.models import LanguageModel, Tagger, computing
    from relearn_lens.neurons import Neuron, Neurons, Site, random_neurons, site_of
    from relearn_lens.presets import preset, settings_of
    from relearn_lens.readers import read_bsb_names, read_conll, read_hf, read_splits
    from relearn_lens.results import Run
    from relearn_lens.retraining import Checkpoint, finetune_, retrain_
    from relearn_lens.saliency import Saliency, score_many
    from relearn_lens.settings import Experiment
    from relearn_lens.similarity import ActivationSimilarity, activation_similarity
    from relearn_lens.store import load_run, run
    from relearn_lens.streams import ClassStats, class_stats, stream
    from relearn_lens.topwords import TopWords, top_words
    from relearn_lens.tracking import Snapshot, Trajectory, measure, track
    from relearn_lens.vectors import input_embeddings, vectors_from_file

_HOME = {
    "ablation": ("ablated", "held", "prune_"),
    "attribution": ("Attribution", "attribute", "attribution_plan"),
    "checkpoints": ("export",),
    "concept": ("Concept",),
    "corpus": ("Corpus", "build_corpus"),
    "encoding": ("encode",),
    "evaluation": ("SpanScores", "TokenLoss", "evaluate"),
    "results": ("Run",),
    "loading": ("load_bridge", "load_language_model", "load_tagger"),
    "lora": ("adapted",),
    "meaning": ("concept_similarity", "concept_words", "polysemy"),
    "models": ("LanguageModel", "Tagger", "computing"),
    "neurons": ("Neuron", "Neurons", "Site", "random_neurons", "site_of"),
    "readers": ("read_bsb_names", "read_conll", "read_hf", "read_splits"),
    "retraining": ("Checkpoint", "finetune_", "retrain_"),
    "saliency": ("Saliency", "score_many"),
    "streams": ("ClassStats", "class_stats", "stream"),
    "settings": ("Experiment",),
    "presets": ("preset", "settings_of"),
    "similarity": ("ActivationSimilarity", "activation_similarity"),
    "store": ("load_run", "run"),
    "topwords": ("TopWords", "top_words"),
    "tracking": ("Snapshot", "Trajectory", "measure", "track"),
    "vectors": ("input_embeddings", "vectors_from_file"),
}
_MODULES = (
    "analysis", "captions", "claims", "explore", "migration", "plots", "priming", "recovery", "reference", "report",
    "sources", "sweeps", "toy",
)  # fmt: skip
_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_OF, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Lazy: the command line's --help and the checking of settings must not wait for torch.
    if name in _OF:
        return getattr(importlib.import_module(f"relearn_lens.{_OF[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"relearn_lens.{name}")
    raise AttributeError(f"module 'relearn_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
