"""Transformers with a head on them: loaded, trained by the one loop, exported; and toys whose truth is known."""

import lazy_loader as lazy

# Modules that are public names.
__getattr__, *_ = lazy.attach(__name__, ["ioi", "taught", "toy"])
