"""Many runs: settings crossed, spread over processes or a cluster, gathered in one table."""

import lazy_loader as lazy

# Modules and functions that are public names.
__getattr__, __dir__, __all__ = lazy.attach(__name__, ["sweeps"], {"benches": ["run"], "plan": ["Bench", "bench_of"]})
