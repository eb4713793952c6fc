"""Taking something out of a model: neurons, for a while, once or for as long as it trains; or, by training, what it
says of a text."""

import lazy_loader as lazy

# The public names, by module; heavy ones are imported when used.
__getattr__, *_ = lazy.attach(
    __name__,
    submod_attrs={
        "calibration": ["Calibration", "calibrate", "mixed_"],
        "recipes": ["RECIPES", "Recipe", "recipe"],
        "removal": ["Removing"],
        "losses": ["NPO", "GradDiff", "GradientAscent"],
        "pruning": ["Prune"],
        "removers": ["REMOVERS", "WRAPPERS", "remove_"],
        "representations": ["RMU"],
        "wrappers": ["SAM"],
    },
)
