"""An experiment as settings, as events that come one by one, and as a folder that keeps them."""

import lazy_loader as lazy

# Modules that are public names.
__getattr__, __dir__, __all__ = lazy.attach(__name__, ["published"])
