"""Ways back: training, compressing, prompting a model from which something was removed."""

import lazy_loader as lazy

# The public names, by module; heavy ones are imported when used.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "attack": ["Attack", "Passing"],
        "attacks": ["ATTACKS", "Point", "Strongest", "points", "strongest"],
        "compression": ["Pruned", "Quantised"],
        "finetuning": [
            "Benign",
            "FineTune",
            "General",
            "Gibberish",
            "RepairThenRelearn",
            "RetainOnly",
            "retrain_",
        ],
        "inputs": ["DirectionAblated", "Embedding", "Latent", "SoftPrompt"],
        "prompts": ["InContext", "OtherForm", "Paraphrase"],
    },
)
