"""Labelled text: which words carry what is looked for, and a reader for each format."""

import lazy_loader as lazy

# Modules that are public names.
__getattr__, __dir__, __all__ = lazy.attach(__name__, ["facts"])
