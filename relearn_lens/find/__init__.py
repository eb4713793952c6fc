"""What carries a concept: one number per neuron, with kind and unit; and where in a model facts are held."""

import lazy_loader as lazy

# The public names, by module; heavy ones are imported when used.
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "circuits": ["Faithfulness", "PathPatching", "Paths", "faithfulness", "path_patching"],
        "controls": ["AllMLPs", "Everything", "RandomMLPs", "RandomNeurons", "equal_control"],
        "layers": ["Distance", "LayerDistance", "layer_distance"],
        "localisers": ["LOCALISERS", "locate"],
        "learned": ["LearnedMask"],
        "lookups": ["Lookup", "LookupProbe", "lookup_probe"],
        "patching": ["Pairs", "contrasted"],
        "scored": ["AttributionPatching", "ByScore", "attribution_patching"],
        "tracing": ["CausalTracing", "Traces", "causal_tracing"],
    },
)
