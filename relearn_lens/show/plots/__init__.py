"""One figure per question. Every function takes results and returns a plotly Figure; nothing is shown.

Where a figure is of a run it draws the controls beside the concept arm; every docstring says how to read the picture
and what a blank cell means.
"""

from relearn_lens.show.plots.audits import audit_curve, audit_layers, audit_parts, audit_states
from relearn_lens.show.plots.benches import (
    bench_components,
    bench_curves,
    bench_layers,
    bench_matrix,
    bench_metric,
    bench_parts,
    bench_ranks,
)
from relearn_lens.show.plots.cards import VERDICTS, neuron_card, verdicts
from relearn_lens.show.plots.curves import attribution, migration, pruned_share, recovery_curves
from relearn_lens.show.plots.film import film, save_gif
from relearn_lens.show.plots.interventions import blocked, dose, grafts
from relearn_lens.show.plots.maps import flow, layer_map, neuron_map, saliency_against_similarity, score_against
from relearn_lens.show.plots.papers import against_bars, head_courses, head_roles, reproductions
from relearn_lens.show.plots.style import ARM_COLOURS, NotMeasuredError, config, live, said, save_html, save_png, shown

__all__ = [
    "ARM_COLOURS",
    "VERDICTS",
    "NotMeasuredError",
    "against_bars",
    "attribution",
    "audit_curve",
    "audit_layers",
    "audit_parts",
    "audit_states",
    "bench_components",
    "bench_curves",
    "bench_layers",
    "bench_matrix",
    "bench_metric",
    "bench_parts",
    "bench_ranks",
    "blocked",
    "config",
    "dose",
    "film",
    "flow",
    "grafts",
    "head_courses",
    "head_roles",
    "layer_map",
    "live",
    "migration",
    "neuron_card",
    "neuron_map",
    "pruned_share",
    "recovery_curves",
    "reproductions",
    "said",
    "saliency_against_similarity",
    "save_gif",
    "save_html",
    "save_png",
    "score_against",
    "shown",
    "verdicts",
]
