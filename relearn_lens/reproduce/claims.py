"""What the papers claim, each as one number with a bar: fixed before anything was run, and the same in both directions.

A claim is put so that a positive number speaks for it. Its interval is over seeds, and never narrower than the one over
what was asked inside them (`verdict_of`):

* beyond a bar: *reproduced* where the whole interval lies above the bar, *reversed* where it lies below minus the bar,
  *not reproduced at this scale* where it lies below the bar, else *inconclusive*;
* within a bar: *reproduced* where the whole interval lies within plus and minus the bar, *not reproduced at this scale*
  where it lies outside, else *inconclusive*.

Bars are the papers' own numbers where they give one for the same quantity, else the smallest difference that one would
act upon: .05 of a share, .1 nats, a tenth of a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from relearn_lens.analysis.intervals import FEWEST_SEEDS, Estimate

Verdict = Literal["reproduced", "not reproduced at this scale", "reversed", "inconclusive"]
Rule = Literal["beyond", "within"]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, as a number that can fail."""

    key: str
    says: str
    unit: str
    bar: float
    published: str = ""
    """The paper's number, where it gives one."""
    rule: Rule = "beyond"


def verdict_of(claim: Claim, effect: Estimate) -> Verdict:
    """What an effect with its interval says of a claim; without an interval, or of fewer than three seeds, nothing."""
    if effect.interval is None or (effect.n is not None and effect.n < FEWEST_SEEDS):
        return "inconclusive"
    low, high = effect.interval
    if claim.rule == "within":
        inside, outside = -claim.bar <= low and high <= claim.bar, high < -claim.bar or low > claim.bar
        return "reproduced" if inside else "not reproduced at this scale" if outside else "inconclusive"
    if low > claim.bar:
        return "reproduced"
    if high < -claim.bar or (claim.bar == 0 and high < 0):
        return "reversed"
    return "not reproduced at this scale" if high < claim.bar else "inconclusive"


def _claims(*rows: Sequence[object]) -> dict[str, Claim]:
    return {str(row[0]): Claim(*row) for row in rows}  # pyright: ignore[reportArgumentType]


CLAIMS: dict[str, dict[str, Claim]] = {
    "lo2024": _claims(
        ("returns", "retraining brings back what pruning the concept's neurons took", "share of the lost score", 0.8,
         "nearly all within 4 to 8 epochs"),
        ("earlier", "what comes back is salient nearer the input than in a model that was not pruned",
         "share of the depth", 0.05),
        ("primed", "who takes over was already near the concept", "rank correlation, beyond the unpruned arm", 0.05),
        ("where", "one part of the model alone, as retrained, brings it back",
         "share of the return, beyond control grafts", 0.5),
    ),
    "chhabra2025": _claims(
        ("flips", "five epochs of poisoned data turn the logit difference negative", "logits below 0", 0.0,
         "3.55 > -11.06"),
        ("concentrated", "7 % of the heads (10 of GPT-2's 144) carry most of the cross-model patching effect",
         "share of the absolute effect", 0.7, "more than .70"),
        ("same_heads", "clean retraining restores the same heads", "rank correlation of heads' effects", 0.8),
        ("faithful", "the heads found before poisoning explain the cleaned model", "share of the logit difference",
         0.9, "95 to 96 %"),
        ("savings", "a poisoned model is cleaned in fewer steps than a fresh one learns", "ln of the ratio of steps",
         0.4),
    ),
    "fan2025": _claims(
        ("resists", "after 20, 40 and 60 relearned passages NPO gives back more than NPO with SAM, at equal retained "
         "ability", "share of held-out answers, mean of the three", 0.05, ".65 against .51 on Llama-3-8B"),
        ("flatter", "within rho of the removed weights the forget loss falls less with SAM",
         "share of NPO's fall", 0.1),
        ("penalty_released", "the released gradient penalty has no gradient: it is plain NPO",
         "relative distance of the two gradients", 0.01, "", "within"),
        ("curvature_released", "the released curvature term doubles the forget gradient",
         "relative distance from 2 grad f + grad r", 0.01, "", "within"),
        ("mended", "with a gradient both do something else than plain NPO", "smaller relative distance of the two",
         0.01),
    ),
    "che2025": _claims(
        ("low_rank", "three components hold most of the variance of models x attacks", "share of the variance", 0.8,
         "more than .80 for 65 models"),
        ("predicts", "how well tampering works says how well prompts do", "Spearman correlation over models", 0.5),
        ("every_remover", "sixteen steps bring back more than half of the gap, whatever removed it",
         "share of the gap, least over removers, best over attacks", 0.5),
    ),
    "guo2024": _claims(
        ("options", "at equal greedy accuracy, four options are answered less after editing the lookup than after "
         "editing by output tracing", "share answered right", 0.05),
        ("lookup", "less comes back after editing the lookup than after editing all MLPs", "share of held-out answers",
         0.05, "20 against 47 %"),
        ("tracing", "less comes back after editing all MLPs than after editing by output tracing",
         "share of held-out answers", 0.05, "47 against 63 %"),
    ),
    "cloud2024": _claims(
        ("absorbs", "with half of the labels missing, routing keeps more out than filtering does, after relearning",
         "nats per answer token", 0.1),
        ("items", "relearning on 64 items recovers more than on one", "nats per answer token", 0.1),
        ("posthoc", "routing a trained model keeps less out than routing from the first step",
         "nats per answer token, after relearning", 0.1, "an independent try: 1.92 > 1.57 after relearning"),
    ),
    "hu2024": _claims(
        ("falls", "the loss on answers that never appear falls, beyond the twin's", "nats per answer token", 0.1),
        ("repeats", "more of it the more often the pair was trained on", "rank correlation with repetitions", 0.0),
        ("form", "after gradient ascent, text of the same form does at least as much as text on the topic",
         "nats per answer token", 0.0),
        ("twin", "a twin that never knew gains nothing", "share of held-out answers", 0.05, "", "within"),
    ),
    "wang2024": _claims(
        ("strength", "extraction strength before relearning says more about after than the truth ratio does",
         "difference of rank correlations over models", 0.1),
        ("ranking", "removers rank differently at equal retained ability", "1 - Kendall's tau", 0.1),
    ),
    "wang2024dinm": _claims(
        ("located", "editing the located layer generalises better than editing a random one",
         "share of paraphrases", 0.1, "more than 10 points"),
        ("divergence", "a KL term with a gradient keeps more general knowledge than the released one without",
         "share of retained answers", 0.02),
        ("unnormalised", "the distance without normalisation picks the last layers", "depth of the layer, 0 to 1", 0.8),
    ),
    "wang2024concept": _claims(
        ("reliable", "a concept's definition can be edited", "share of edits that hold", 0.9, "more than .9"),
        ("instances", "few instances follow the edit", "share of answers about instances below .3", 0.0,
         "less than .3"),
    ),
    "lynch2024": _claims(
        ("in_context", "examples in the prompt find what greedy answers do not, beyond the twin's",
         "share of held-out answers", 0.05),
        ("probes", "probes read more than answers show, beyond the twin's", "share of held-out answers", 0.05),
        ("neighbours", "near facts are damaged more than general ones", "share of retained answers", 0.02),
        ("prompting", "asking for ignorance gets a large part of what removing gets", "share of the removal's effect",
         0.3),
    ),
    "tian2024": _claims(
        ("instructed", "one editor with instructions does better on several tasks than one without",
         "share of edits that hold", 0.05),
        ("direction", "instructions turn the direction of the edit", "1 - cosine between two tasks' edits", 0.1),
    ),
    "bayazit2023": _claims(
        ("target", "without 2 % of the weights the target's perplexity is ten times as high", "ln of the ratio", 2.303,
         "10 x and more"),
        ("control", "and that of other text at most a tenth higher", "ln of the ratio", 0.095, "10 % and less",
         "within"),
        ("random", "a random mask of the same size does nothing", "ln of the target's ratio", 0.095, "", "within"),
        ("relearns", "less comes back than after pruning neurons at the same retained ability",
         "share of held-out answers", 0.05, "not asked"),
    ),
    "deeb2024": _claims(
        ("back", "relearning half of the facts brings the other half back, beyond the twin's", "share of the gap", 0.5,
         ".88"),
        ("pretrained", "more comes back of pretrained facts than of facts taught by fine-tuning", "share of the gap",
         0.05),
    ),
    "uds2026": _claims(
        ("base", "the base's unlearning depth is 0", "share", 0.02, "0", "within"),
        ("twin", "the twin's unlearning depth is 1", "distance from 1", 0.02, "1", "within"),
        ("course", "depth falls while the model relearns", "share", 0.05, "not asked"),
    ),
}  # fmt: skip
"""By paper and key."""
