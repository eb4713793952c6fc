"""Pure questions about results: numbers, intervals and verdicts. No model is touched here."""

import lazy_loader as lazy

# Modules that are public names.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__, ["claims", "migration", "priming", "questions", "recovery", "relearned", "story"]
)
