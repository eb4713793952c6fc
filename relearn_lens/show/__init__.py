"""Results as a person reads them: tables, captions, figures, a page. No model is run here."""

import lazy_loader as lazy

# Modules that are public names.
__getattr__, __dir__, __all__ = lazy.attach(__name__, ["plots"])
