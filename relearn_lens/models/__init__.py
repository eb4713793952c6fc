"""Transformers with a head on them: loaded, trained by the one loop, exported; and toys whose truth is known."""

import lazy_loader as lazy

# Modules that are public names.
__getattr__, __dir__, __all__ = lazy.attach(__name__, ["ioi", "taught", "toy"])
