# The public names, told once: `lazy_loader` and type checkers read this file.
from .methods import (
    Attributing as Attributing,
    Measuring as Measuring,
    Training as Training,
)
from . import sources as sources
from .text import facts as facts
from .text.concept import Concept as Concept
from .text.corpus import (
    Corpus as Corpus,
    build_corpus as build_corpus,
)
from .text.encoding import encode as encode
from .text.bsb import read_bsb_names as read_bsb_names
from .text.conll import read_conll as read_conll
from .text.readers import (
    read_hf as read_hf,
    read_splits as read_splits,
)
from .models import ioi as ioi, taught as taught, toy as toy
from .models.export import export as export
from .models.loading import (
    load_bridge as load_bridge,
    load_language_model as load_language_model,
    load_tagger as load_tagger,
)
from .models.lora import adapted as adapted
from .models.model import (
    LanguageModel as LanguageModel,
    Tagger as Tagger,
    computing as computing,
)
from .models.training import (
    Checkpoint as Checkpoint,
    finetune_ as finetune_,
    train_ as train_,
)
from .neurons.sites import (
    Neuron as Neuron,
    Neurons as Neurons,
    Site as Site,
    random_neurons as random_neurons,
    site_of as site_of,
)
from .neurons.weights import (
    WeightMask as WeightMask,
    parts as parts,
)
from .neurons.streaming import (
    ClassStats as ClassStats,
    class_stats as class_stats,
    stream as stream,
)
from . import find as find
from .find.attribution import (
    Attribution as Attribution,
    attribute as attribute,
    attribution_plan as attribution_plan,
)
from .find.saliency import (
    Saliency as Saliency,
    score_many as score_many,
)
from . import remove as remove
from .remove.ablation import (
    ablated as ablated,
    held as held,
    prune_ as prune_,
)
from . import relearn as relearn
from .relearn.finetuning import retrain_ as retrain_
from .measure.alarm import ReturnAlarm as ReturnAlarm
from .measure.answers import (
    answer as answer,
    choose as choose,
    known as known,
)
from .measure.asking import (
    Asked as Asked,
    Metric as Metric,
    Reference as Reference,
    ask as ask,
)
from .measure.battery import Battery as Battery, battery as battery
from .measure.edits import Edited as Edited, edited as edited
from .measure.course import (
    FactsSnapshot as FactsSnapshot,
    FactsTrajectory as FactsTrajectory,
)
from .measure.metrics import METRICS as METRICS
from .measure.crosspatch import (
    CrossPatch as CrossPatch,
    HeadRoles as HeadRoles,
    cross_patch as cross_patch,
    head_roles as head_roles,
)
from .measure.evaluation import (
    SpanScores as SpanScores,
    TokenLoss as TokenLoss,
    evaluate as evaluate,
)
from .measure.grafting import (
    Grafts as Grafts,
    grafts as grafts,
)
from .measure.meaning import (
    concept_similarity as concept_similarity,
    concept_words as concept_words,
    polysemy as polysemy,
)
from .measure.similarity import (
    ActivationSimilarity as ActivationSimilarity,
    activation_similarity as activation_similarity,
)
from .measure.topwords import (
    TopWords as TopWords,
    top_words as top_words,
)
from .measure.tracking import (
    Snapshot as Snapshot,
    Trajectory as Trajectory,
    measure as measure,
    track as track,
)
from .measure.vectors import (
    input_embeddings as input_embeddings,
    vectors_from_file as vectors_from_file,
)
from .analysis import claims as claims
from .analysis import migration as migration
from .analysis import priming as priming
from .analysis import recovery as recovery
from .analysis import relearned as relearned
from .runs import published as published
from .runs.presets import (
    preset as preset,
    settings_of as settings_of,
)
from .runs.results import Run as Run
from .runs.settings import Experiment as Experiment
from .runs.store import (
    load_run as load_run,
    run as run,
)
from .show import plots as plots
from .show.explore import examples as examples, explore as explore
from .show.plots.cards import neuron_card as neuron_card
from .show.report import write_report as write_report
from . import bench as bench
from .bench import sweeps as sweeps
from .bench.audit import audit as audit
