"""Probes fitted to a sample of words: scores by what a classifier reads, with its quality on held-out words.

1. Sentences are split in two: no sentence has words on both sides. (The same word can still occur on both.)
2. Neurons are standardised by the training words.
3. A probe is fitted to the training words of all layers together.
4. Its AUROC on the held-out words stands beside that of the same probe for labels dealt anew to the word types: what
   it would say of labels that mean nothing, by knowing words that it has met.

A probe shows that a concept can be read there, not that the model uses it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from beartype import beartype as typechecker
from einops import rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from relearn_lens.neurons.sites import ordered
from relearn_lens.neurons.streaming import ROUNDING, WordSample
from relearn_lens.text.concept import Classes, label_shuffles

HELD_OUT = 0.3
"""Share of the words that are held out, as near as whole sentences allow."""


class AtK(NamedTuple):
    """Held-out AUROC of a probe of `k` neurons, beside its controls (means over their repeats)."""

    k: int
    held_out: float
    control: float
    random_neurons: float


@dataclass(frozen=True)
class Quality:
    """How well a fitted probe does on words that it was not fitted to, beside the same with nothing to be found."""

    held_out: float
    """Chance that a held-out concept word scores above another held-out word: 0.5 is chance, 1 perfect."""
    control: float
    """The same for labels dealt anew to word types (`label_shuffles`), mean of the probes fitted to them; NaN where
    too few types are as frequent as each other to deal labels between."""
    average_precision: float
    """On the held-out words; a probe without anything to find has `base_rate`."""
    base_rate: float
    """Share of the held-out words that are the concept's: that of the sample, not of the text."""
    n_train: int
    n_held_out: int
    says: str
    """How the probe was fitted, and whether the fit converged."""
    random_neurons: float | None = None
    """AUROC of probes on as many neurons drawn at random, their mean; None where that is not a control of the probe."""
    by_k: tuple[AtK, ...] = ()
    """For k-sparse probes: each number of neurons in turn; the last is the one above."""
    metric: str = "AUROC"


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False)
class Split:
    """Words of a sample cut in two by sentence, and their neurons standardised by the training words."""

    train: Int[Tensor, " train_word"]
    """Rows of the sample."""
    held_out: Int[Tensor, " held_out_word"]
    x: Float[Tensor, "word feature"]
    """All neurons of all layers in standard deviations of the training words, float32; 0 for a constant neuron."""
    y: Bool[Tensor, " word"]
    """Whether the word carries the concept."""


def split(sample: WordSample, carries: Bool[Tensor, " class"]) -> Split:
    """About 70 % of a sample's words to train on and the rest held out, whole sentences; both hold both kinds of words.

    Depends on the sample's words and its seed alone, so every probe of one sample has the same split.

    Raises:
        ValueError: the concept's words, or the others, are all in one sentence.
    """
    from transformer_lens.tools.analysis.sparse_probing import fit_sparse_probe

    y = carries[sample.of_word]
    for side, which in (("words that carry the concept", y), ("words that do not carry it", ~y)):
        n = len(sample.group[which].unique())
        if n < 2:
            raise ValueError(
                f"the sample's {side} are in {n} sentence(s), and a probe needs at least 2, one to train on and one to "
                "hold out; use a larger probe corpus or draw more words"
            )
    # The split does not depend on the features: a column of noise gets the one that k-sparse probes of the same seed
    # have, and with it what to standardise by.
    noise = torch.randn(len(y), 1, generator=torch.Generator().manual_seed(sample.seed))
    fit = fit_sparse_probe(noise, y, k=1, test_fraction=HELD_OUT, groups=sample.group, seed=sample.seed)
    x = rearrange(sample.activations, "w l n -> w (l n)").float()
    mean, sd = x[fit.train_indices].mean(0), x[fit.train_indices].std(0, correction=0)
    constant = sd <= (ROUNDING * mean.abs()).clamp(min=torch.finfo(torch.float32).tiny)
    x = torch.where(constant, 0.0, (x - mean) / sd.masked_fill(constant, 1.0))
    return Split(fit.train_indices, fit.test_indices, x, y)


def elastic_net(
    sample: WordSample,
    carries: Bool[Tensor, " class"],
    contrast: str = "rest",
    *,
    l1_ratio: float | int = 0.5,
    strength: float | int = 0.01,
    n_shuffles: int = 1,
    max_iter: int = 50,
) -> tuple[Float[Tensor, "layer neuron"], Quality]:
    """|weight| of every neuron in a logistic regression with an elastic net; logits per standard deviation.

    The regression minimises the mean loss in nats per word, both classes weighing the same, plus
    strength * (l1_ratio |w| + (1 - l1_ratio) |w|^2 / 2). Weights that the L1 part holds at 0 tie; the L2 part gives
    neurons that say the same equal weights. For the control, labels are dealt anew to the word types, of training
    and held-out words alike. `contrast` is not used: it is always the concept against all other words.

    Raises:
        ValueError: as `split`; l1_ratio is not 0 to 1, strength is not above 0, or there is no shuffle.
    """
    if not 0 <= l1_ratio <= 1 or strength <= 0 or n_shuffles < 1 or max_iter < 1:
        raise ValueError(
            "l1_ratio must be 0 to 1, strength above 0, n_shuffles and max_iter at least 1; got "
            f"l1_ratio={l1_ratio}, strength={strength}, n_shuffles={n_shuffles}, max_iter={max_iter}"
        )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, roc_auc_score

    parts = split(sample, carries)
    train, held_out, x, y = (t.numpy() for t in (parts.train, parts.held_out, parts.x, parts.y))
    x_train, x_held_out = np.ascontiguousarray(x[train]), x[held_out]

    def fit(labels: np.ndarray) -> tuple[LogisticRegression, np.ndarray]:
        probe = LogisticRegression(
            C=1 / (strength * len(train)), l1_ratio=l1_ratio, solver="saga", tol=0.01, max_iter=max_iter,
            class_weight="balanced", random_state=sample.seed % 2**32,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `Quality.says` tells
            probe.fit(x_train, labels[train])
        return probe, probe.decision_function(x_held_out)

    probe, logits = fit(y)
    dealt = _dealt(sample, y, n_shuffles, [np.isin(np.arange(len(y)), side) for side in (train, held_out)])
    control = [float(roc_auc_score(labels[held_out], fit(labels)[1])) for labels in dealt]
    weight = torch.from_numpy(np.abs(probe.coef_[0])).float().view(sample.activations.shape[1:])
    n_iter = int(probe.n_iter_[0])
    done = "converged after" if n_iter < max_iter else "stopped, perhaps before it converged, after"
    quality = Quality(
        held_out=float(roc_auc_score(y[held_out], logits)),
        control=float(np.mean(control)) if control else float("nan"),
        average_precision=float(average_precision_score(y[held_out], logits)),
        base_rate=float(y[held_out].mean()),
        n_train=len(train),
        n_held_out=len(held_out),
        says=f"elastic net of strength {strength:g}, {l1_ratio:g} of it L1: {int((weight > 0).sum()):,} of "
        f"{weight.numel():,} weights are not 0; {done} {n_iter} passes over the training words; control: "
        f"{len(control)} label shuffle(s) over word types",
    )
    return weight, quality


def _dealt(sample: WordSample, y: np.ndarray, n: int, sides: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """`n` times, labels dealt anew to the word types; fewer where both kinds of words seldom come to be on all sides,
    and, as for the labels themselves, in two sentences."""
    classes = Classes(("rest", "concept"), y.astype(np.int64), np.array([False, True]))
    rng = np.random.default_rng([sample.seed, 1])
    group, deals = sample.group.numpy(), []
    for _ in range(5 * n):
        (of_word,) = label_shuffles(classes, sample.types.numpy(), 1, seed=int(rng.integers(2**32)))
        labels = of_word == 1
        spread = all(len(np.unique(group[which])) > 1 for which in (labels, ~labels))
        if spread and all(labels[side].any() and not labels[side].all() for side in sides):
            deals.append(labels)
        if len(deals) == n:
            break
    return deals


def k_sparse(
    sample: WordSample,
    carries: Bool[Tensor, " class"],
    contrast: str = "rest",
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16, 32),
    n_shuffles: int = 10,
    n_random: int = 5,
) -> tuple[Float[Tensor, "layer neuron"], Quality]:
    """1 / place of every neuron in the order in which k-sparse probes take them in: 1, 1/2, 1/3, ...; no unit.

    A probe of k neurons takes those whose means on the training words differ most, in standard deviations, so a smaller
    probe's neurons are all in a larger one's. Neurons beyond the largest k are in the same order, though no probe was
    fitted with them; constant neurons score 0. What the probes add is `Quality.by_k`: how few neurons suffice. The
    controls are k neurons drawn at random, and the same choice and fit for labels dealt anew to the word types; `ks`
    larger than the number of neurons are left out. `contrast` is not used.

    Source: Gurnee et al. 2023 (neurons in a haystack), by mean difference; fitted by TransformerLens `sparse_probing`.
    Standardising before the choice is ours, and the deal over word types (there the labels of the training words are
    shuffled, and probes tested on the true ones).

    Raises:
        ValueError: as `split`; ks are not ascending, or there is no repeat of a control.
    """
    from transformer_lens.tools.analysis.sparse_probing import SparseProbeConvergenceError, sweep_sparse_probe

    n_neurons = sample.activations[0].numel()
    if not ks or list(ks) != sorted(set(ks)) or not 0 < ks[0] <= n_neurons or n_shuffles < 1 or n_random < 1:
        raise ValueError(
            f"ks must ascend from at least 1 (the site has {n_neurons:,} neurons), n_shuffles and n_random be at least "
            f"1; got ks={tuple(ks)}, n_shuffles={n_shuffles}, n_random={n_random}"
        )
    parts = split(sample, carries)
    how: dict[str, Any] = {
        "ks": [k for k in ks if k <= n_neurons],
        "test_fraction": HELD_OUT,
        "groups": sample.group,
        "seed": sample.seed,
    }
    sweep = sweep_sparse_probe(parts.x, parts.y, n_random_subsets=n_random, **how)
    control, n_failed = [], len(sweep.rejections)
    for labels in _dealt(sample, parts.y.numpy(), n_shuffles):
        try:
            by_chance = sweep_sparse_probe(parts.x, torch.from_numpy(labels), **how)
        except SparseProbeConvergenceError:
            n_failed += 1
        else:
            control.append([one.metrics.roc_auc for one in by_chance.results])
    shuffled = np.mean(control, axis=0).tolist() if control else [float("nan")] * len(sweep.ks)
    by_k = tuple(
        AtK(k, one.metrics.roc_auc, chance, float(random.roc_auc.mean()))
        for k, one, chance, random in zip(
            sweep.ks, sweep.results, shuffled, sweep.random_coordinate_controls, strict=True
        )
    )
    largest = sweep.results[-1]
    difference = largest.feature_scores.abs()
    place = ordered(difference).argsort()
    score = torch.where(difference > 0, 1 / (place + 1), 0.0).float().view(sample.activations.shape[1:])
    by = ", ".join(f"{at.k}: {at.held_out:.3f}" for at in by_k)
    failed = f"; {n_failed} control fit(s) did not converge and are left out" if n_failed else ""
    quality = Quality(
        held_out=by_k[-1].held_out,
        control=by_k[-1].control,
        average_precision=largest.metrics.average_precision,
        base_rate=largest.test_positive_count / len(largest.test_indices),
        n_train=len(largest.train_indices),
        n_held_out=len(largest.test_indices),
        says=f"logistic probes of k neurons, every fit converged; AUROC by k: {by}; controls: {len(control)} label "
        f"shuffles over word types and {n_random} random sets each{failed}",
        random_neurons=by_k[-1].random_neurons,
        by_k=by_k,
    )
    return score, quality
