"""How claims that were not reproduced are read: written after the runs, by hand, of the notes that stand with them."""

from __future__ import annotations

READINGS: dict[str, dict[str, str]] = {
    "lo2024": {
        "earlier": "no nearer the input, to within a thirtieth of the depth. The toy has four blocks, and a centre of "
        "mass hardly moves; `relearn-lens run lo2024` asks it at the paper's scale",
        "primed": "two seeds of opposite sign; in the third the rank correlation is not defined. Nothing is learnt",
        "where": "no block alone brings back even a tenth more than a control graft: what returns is spread, and much "
        "of it is in the cut weights themselves, which a graft of a block leaves out",
    },
    "chhabra2025": {
        "flips": "all seeds turn negative, and three cannot say it. None comes near the published size: the poisoned "
        "toy stops telling the two names apart where GPT-2 names the wrong one",
        "concentrated": "two heads of 24 carry several times what two heads that are like all others would, and still "
        "not .7: 7 % of a small model is too few heads for a circuit that reads and moves names",
        "same_heads": "the same heads in one seed, half of the order in another, less in the third, always above the "
        "poisoned model's: repair may take the old heads, and need not",
        "faithful": "one seed above the bar and one below; in the third the cleaned model's heads add nothing beyond "
        "noise on these pairs, so that there is nothing to be faithful to",
        "savings": "from none to a factor of more than two, by seed",
    },
    "fan2025": {
        "resists": "less comes back with SAM in every seed, from .03 to .23: the published gap (.14) lies inside the "
        "interval, and so does none",
        "flatter": "flatter in every seed and by more than the bar; the interval of three ends just below it",
    },
    "che2025": {
        "every_remover": "the claim is about the worst remover. Ascent, NPO and RMU are undone by half or more in most "
        "seeds, GradDiff not at all and pruning hardly: what a toy learnt from nothing a removal can take away, not "
        "only hide",
    },
    "guo2024": {
        "options": "four options see no more than greedy answers do: whichever place was edited, the choice is lost "
        "with the answer",
        "lookup": "less comes back after lookup in two seeds of three, and it had removed less to begin with: at equal "
        "retained ability lookup takes less than all MLPs, so the comparison at equal forgetting is not had",
        "tracing": "no difference beyond noise, either way: two or three of four blocks are most of all MLPs",
    },
    "hu2024": {
        "falls": "nothing is jogged: what was to stay is damaged nearly as much by the same text. A toy taught answers "
        "alone has never learnt to predict a question, and learning it moves all weights. At a tenth of the rate (one "
        "seed, by hand) nothing moves, in either direction. After calibration four fifths of T are still answered, so "
        "little was hidden",
        "repeats": "no order, for the same reason: what is seen is damage",
        "form": "text in the form of the questions does most damage, on the topic or not: it trains the position that "
        "answers are read at",
    },
    "wang2024": {
        "strength": "both keep their order, the truth ratio better. Answers are one token, so extraction strength is "
        "accuracy, which is 0 for several models at once where the truth ratio still ranks them",
        "ranking": "one pair of ten changes places in two seeds, none in the third; five removers are too few",
    },
    "lynch2024": {
        "in_context": "facts before the question harm, and unrelated ones nearly as much: the toy was never taught to "
        "read anything before a question. It takes a model that learns in context",
        "probes": "probes read what answers show and no more, at chance: after GradDiff at equal ability nothing is "
        "left to be read, as nothing comes back (`deeb2024`)",
        "neighbours": "calibration keeps 95 % of what is near, so little can be lost there; general facts lose nothing",
        "prompting": "not asked: the toy follows no instruction",
    },
    "deeb2024": {
        "back": "the mean hides three removers: half of what NPO took is back in two seeds of three, and nothing of "
        "what GradDiff and RMU took. A toy's facts can be gone; the paper's were known from pretraining",
        "pretrained": "not asked: it takes a pretrained model that is taught facts beside its own",
    },
    "bayazit2023": {
        "target": "four times the perplexity, not ten: the mask is over neurons, of which it takes a quarter. A toy "
        "has few neurons that only some facts need",
        "control": "and so it costs other facts half a nat",
        "random": "as many random neurons cost little: within the bar in each seed, the interval just beyond it",
        "relearns": "more comes back, not less; it had taken less to begin with",
    },
    "wang2024dinm": {
        "located": "the located block is the last one, by either distance, and generalises worst of all four in every "
        "seed: its edit says a refusal where these words are read, an early one changes what is known of the subject. "
        "The interval of three seeds ends at 0, so it is not called reversed",
    },
    "tian2024": {
        "instructed": "edits hold nearly always, also without words: an edit of a toy's fact tells its task by its "
        "answer, and there is little left to gain. Words that name no task cost a little in some seeds",
        "direction": "edits of different relations stand at right angles without any words, so nothing is left to turn",
    },
    "cloud2024": {
        "absorbs": "filtering keeps more out, and did before relearning (the control): in 300 steps with half of the "
        "labels the rest of the facts is learnt wherever the gradient may go, and nothing is absorbed",
        "items": "16 steps on one passage over and over and 16 on 64 different ones; V gains from neither",
        "posthoc": "routing from the start keeps more out in every seed, by .7 to 2.1 nats; three seeds that differ so "
        "cannot say it",
    },
    "wang2024concept": {
        "instances": "between .28 and .36 of the instances follow in every seed, about the bar: three seeds of four "
        "concepts cannot say on which side",
    },
    "fan2025 on smollm2": {
        "resists": "with SAM more came back in every seed, in none beyond noise: eleven held-out countries a seed are "
        "few, and after 20, 40 and 60 passages it is the same",
        "flatter": "one seed of three steeper with SAM, two alike; the released radius is small beside these weights",
        "curvature_released": "three hundredths off, where a term that has a gradient is half off or more: the mistake "
        "is there, and not exact to a hundredth at this size; how much of that is rounding was not looked into",
    },
    "wang2024dinm on smollm2": {
        "located": "at the published values the edit does not reach the statements: in two seeds no block changes any, "
        "located or random, so that there is nothing to compare",
    },
}
"""By paper and claim; `on` and the model where it is not the toy."""
