"""Taking something out of a model: neurons, for a while, once or for as long as it trains; or, by training, what it
says of a text."""

import lazy_loader as lazy

# The public names, by module; heavy ones are imported when used.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "arithmetic": ["TaskVector"],
        "calibration": ["Calibration", "calibrate", "mixed_"],
        "distillation": ["UNDIAL", "Undo", "WhoIs"],
        "editing": ["Editor", "Mend"],
        "edits": ["DINM"],
        "layering": ["Layered"],
        "losses": ["ILU", "NPO", "GradDiff", "GradientAscent", "SimNPO"],
        "masks": ["SelectivePrune", "SetDifferencePrune"],
        "preference": ["DPO", "IDK", "AltPO"],
        "pruning": ["Prune"],
        "recipes": ["RECIPES", "Recipe", "recipe"],
        "removal": ["Removing"],
        "removers": ["REMOVERS", "WRAPPERS", "remove_"],
        "representations": ["RMU", "CircuitBreaker", "RepNoise"],
        "routing": ["SGTM", "GradientRoute"],
        "weighting": ["CEU", "PDU", "WGA", "SatImp"],
        "wrappers": ["LAT", "SAM", "Averaged", "Curvature", "GradientPenalty", "Smoothed", "TARLight"],
    },
)
