"""Passages read with some activations put in the place of others: what all ways of patching share.

A passage is read beside a contrasting one that has as many tokens, so that positions answer to each other; passages go
through the model in groups of equal length, without padding. One number says what the model gives for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.methods import MAX_TOKENS
from relearn_lens.models.model import LanguageModel, hidden
from relearn_lens.names import known_name
from relearn_lens.neurons.sites import Site, kept
from relearn_lens.text.encoding import Batch
from relearn_lens.text.facts import Passage
from relearn_lens.text.facts.encoded import encode_passages
from relearn_lens.text.facts.passages import grouped

Readout = str | Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A name in `READOUTS`, or a function of its own with the signature of theirs."""


def logprob(logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"], _: Tensor | None) -> Tensor:
    """log p of the answer given the prompt, by token; nats."""
    return -F.cross_entropy(logits, target, reduction="none")


def logit_difference(
    logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"], rival: Int[Tensor, " token"] | None
) -> Tensor:
    """Logit of the answer's first token less that of the first other choice's; 0 at further tokens."""
    assert rival is not None
    there = rival >= 0
    gap = logits.gather(1, target[:, None]) - logits.gather(1, rival.clamp(min=0)[:, None])
    return gap[:, 0] * there


READOUTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor | None], Tensor], str]] = {
    "logprob": (logprob, "nats per answer"),
    "logit_difference": (logit_difference, "logits"),
}
"""Name to the function, whose values by answer token are summed for each passage, and its unit."""


class Prompts:
    """Passages, and what is asked of a model's answers to them: one number for each.

    `metric` is by default `logit_difference` where every passage has two choices, else `logprob`.

    Raises:
        ValueError: no passage, one without a prompt, an unknown metric, or choices that begin with the same token.
    """

    def __init__(self, model: LanguageModel, passages: Sequence[Passage], metric: Readout = "auto"):
        if not isinstance(model, LanguageModel):
            raise ValueError(
                f"passages are asked of a language model, and this is a {type(model).__name__}; for a tagger use a "
                "score of a concept's words"
            )
        if bare := [p for p in passages if not p.prompt]:
            raise ValueError(
                f"{len(bare)} of {len(passages)} passages have no prompt, such as {bare[0].answer[:60]!r}, so nothing "
                "is asked there; use passages of a prompt and an answer"
            )
        self.model, self.passages = model, tuple(passages)
        self.encoded = encode_passages(self.passages, model.tokenizer, context=model.context)
        if metric == "auto":
            metric = "logit_difference" if all(len(p.choices) == 2 for p in passages) else "logprob"
        if isinstance(metric, str):
            known_name("metric", metric, ["auto", *READOUTS])
        self.metric, self.unit = READOUTS[metric] if isinstance(metric, str) else (metric, "")
        self.name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
        self.rivals = self._rivals() if self.name == "logit_difference" else None

    def _rivals(self) -> Int[np.ndarray, " passage"]:
        """The first token of what each passage could have been answered instead."""
        if lone := [p for p in self.passages if len(p.choices) < 2]:
            raise ValueError(
                f"logit_difference compares the answer with another choice, and {lone[0].prompt[:60]!r} has none; use "
                "metric 'logprob', or passages with choices"
            )
        others = [replace(p, answer=next(c for c in p.choices if c != p.answer)) for p in self.passages]
        encoded = encode_passages(others, self.model.tokenizer, context=self.model.context)
        own, rival = (each.ids[_first_scored(each.scored, each.piece_start)] for each in (self.encoded, encoded))
        if len(alike := np.flatnonzero(own == rival)):
            p = self.passages[int(alike[0])]
            raise ValueError(
                f"{p.answer!r} and {others[int(alike[0])].answer!r} begin with the same token, so logits cannot tell "
                "them apart there; use metric 'logprob'"
            )
        return rival.astype(np.int64)

    @property
    def lengths(self) -> Int[np.ndarray, " passage"]:
        """Tokens of each passage, special tokens included."""
        return self.encoded.lengths

    def groups(self) -> list[Int[np.ndarray, " passage"]]:
        """The passages of each batch, all of one length: every passage once."""
        groups = []
        for length in np.unique(self.lengths):
            here = np.flatnonzero(self.lengths == length)
            size = max(1, MAX_TOKENS // int(length))
            groups += [here[i : i + size] for i in range(0, len(here), size)]
        return groups

    def batch(self, group: Int[np.ndarray, " passage"]) -> Batch:
        """Some passages, on the model's device."""
        return self.encoded.batch(group).to(self.model.device)

    def values(self, batch: Batch) -> Float[Tensor, " passage"]:
        """What the model gives for each passage of a batch, with whatever hooks it has now."""
        states = hidden(self.model.bridge, batch.ids, batch.mask)
        logits = self.model.logits(states.flatten(0, 1)[batch.subword - 1]).float()
        rival = None
        if self.rivals is not None:
            rival = torch.full_like(batch.subword, -1)
            rival[batch.first] = torch.from_numpy(self.rivals[batch.pieces.cpu().numpy()]).to(rival.device)
        by_token = self.metric(logits, batch.ids.flatten()[batch.subword], rival)
        return torch.zeros(len(batch.ids), device=by_token.device).index_add(0, batch.sentence, by_token)


def _first_scored(scored: Bool[np.ndarray, " token"], start: np.ndarray) -> Int[np.ndarray, " piece"]:
    return np.array([begin + int(scored[begin:end].argmax()) for begin, end in pairwise(start)])


def units_of(site: Site, neuron: int) -> slice:
    """The units of one neuron of a site."""
    return slice(neuron * site.size, (neuron + 1) * site.size)


def contrasted(
    passages: Sequence[Passage], others: Sequence[Passage], *, seed: int = 0
) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
    """Passages, each with a contrasting prompt before the same answer: the same thing said of another key, drawn by
    `seed` from those of other answers; or, of passages whose `others` are given (form `abc` of `ioi`), the next of them
    that has the same key and answer.

    Passages without any are left out.

    Raises:
        ValueError: no passage has one.
    """
    pairs: list[tuple[Passage, Passage]] = []
    if others:
        waiting = grouped(reversed(others), lambda p: (p.key, p.relation, p.answer))
        for p in passages:
            if there := waiting.get((p.key, p.relation, p.answer)):
                pairs.append((p, there.pop()))
    else:
        rng = np.random.default_rng(seed)
        alike = grouped(passages, lambda p: (p.template, p.relation))
        for p in passages:
            if there := [q for q in alike[p.template, p.relation] if q.answer != p.answer]:
                pairs.append((p, there[int(rng.integers(len(there)))]))
    if not pairs:
        raise ValueError(
            f"none of {len(passages)} passages has another with the same template and another answer to be contrasted "
            "with; use causal_tracing, which needs none, or give contrasting passages"
        )
    return tuple(p for p, _ in pairs), tuple(replace(p, prompt=q.prompt) for p, q in pairs)


class Pairs:
    """Passages and contrasting ones, pair by pair of as many tokens; pairs of different lengths are left out.

    Raises:
        ValueError: as `Prompts`; or lists of different lengths, or no pair has as many tokens.
    """

    def __init__(
        self, model: LanguageModel, passages: Sequence[Passage], corrupt: Sequence[Passage], metric: Readout = "auto"
    ):
        if len(passages) != len(corrupt):
            raise ValueError(
                f"there are {len(passages)} passages and {len(corrupt)} contrasting ones; give one for each"
            )
        lengths = [Prompts(model, each, "logprob").lengths for each in (passages, corrupt)]
        same = np.flatnonzero(lengths[0] == lengths[1]).tolist()
        if not same:
            raise ValueError(
                f"none of {len(passages)} passages has as many tokens as its contrasting one, so their positions do "
                "not answer to each other; give others"
            )
        self.clean = Prompts(model, [passages[i] for i in same], metric)
        self.corrupt = Prompts(model, [corrupt[i] for i in same], metric)
        self.n_left_out = len(passages) - len(same)


def subjects(prompts: Prompts) -> list[Int[np.ndarray, " token"]]:
    """Where every passage's prompt names its key: by passage, the places of its tokens, special tokens counted.

    Raises:
        ValueError: a prompt does not.
    """
    passages = prompts.passages
    if lost := [p for p in passages if not _named(p)]:
        raise ValueError(
            f"{len(lost)} of {len(passages)} prompts do not name their key, such as {lost[0].prompt[:60]!r} of "
            f"{lost[0].key[:60]!r}, so it cannot be said where the subject is; give rows whose key stands in the prompt"
        )
    texts = prompts.model.tokenizer(
        [p.text for p in passages], add_special_tokens=False, return_offsets_mapping=True, padding=False
    )
    first = len(prompts.encoded.prefix)
    tokens = []
    for p, offsets in zip(passages, texts["offset_mapping"], strict=True):
        spans = [span.span() for span in _named(p)]
        inside = [i for i, (a, b) in enumerate(offsets) if any(a < end and b > begin for begin, end in spans)]
        tokens.append(np.array(inside, dtype=np.int64) + first)
    return tokens


def _named(passage: Passage) -> list[re.Match[str]]:
    """Where the prompt names the key as words of its own: `he` is not in `the`."""
    return list(re.finditer(rf"(?<!\w){re.escape(passage.key)}(?!\w)", passage.prompt)) if passage.key else []


def mean_by_length(prompts: Prompts, site: Site) -> Mapping[int, Float[Tensor, "layer token unit"]]:
    """The mean activation of every unit of a site at each position, over the passages of each length."""
    sums: dict[int, Tensor] = {}
    with kept(prompts.model.bridge, site, units=True) as activations:
        for group in prompts.groups():
            prompts.values(prompts.batch(group))
            total = torch.stack([activations[layer].float().sum(0) for layer in range(len(site.layers))])
            length = int(prompts.lengths[group[0]])
            sums[length] = sums[length] + total if length in sums else total
    return {length: total / int((prompts.lengths == length).sum()) for length, total in sums.items()}


def refusal(gap: Float[np.ndarray, " passage"], what: str, *, falls: bool = False) -> str | None:
    """Why no share can be taken of a difference, whose mean over passages is within noise; None where one can.

    `falls`: nor of one below 0, which is no fall.
    """
    error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else np.inf
    mean = float(gap.mean())
    if (mean if falls else abs(mean)) > 2 * error:
        return None
    return f"{what} is {mean:.3g} on {len(gap)} passages, not beyond two standard errors ({error:.2g})"


def shares(
    parts: Float[np.ndarray, "*part passage"], gap: Float[np.ndarray, " passage"], refused: str | None
) -> Tensor:
    """What each part is of a difference, both summed over passages first; NaN where that is refused."""
    sums = torch.from_numpy(np.asarray(parts.sum(-1)))
    return (torch.full_like(sums, torch.nan) if refused else sums / float(gap.sum())).float()
