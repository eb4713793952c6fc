"""Prune a concept out of a transformer, retrain, and see where it comes back.

corpus = rl.read_conll("train.conll").split(seed=0)
tagger = rl.load_tagger("minilm", labels=corpus.train.label_names)
place = rl.Concept("place", labels=["LOC"])
for pause in rl.finetune_(tagger, corpus.train, epochs=3, seed=0): print(pause)
before = rl.measure(tagger, corpus.probe, place)
chosen = before.saliency.top(fraction=0.5)
control = rl.random_neurons(like=chosen, seed=0)
rl.prune_(tagger, chosen)
path = rl.track(tagger, corpus.probe, place, rl.retrain_(tagger, corpus.train), before=before, removed=chosen)
rl.plots.layer_map(path)
"""

import sys

import lazy_loader as lazy

from relearn_lens.names import suggesting_

# The names stand in __init__.pyi, once, for this and for type checkers; nothing heavy is imported before it is used.
__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
suggesting_(sys.modules[__name__])
