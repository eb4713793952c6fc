"""Integrated gradients of all layers at once, against their own passes and against captum."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from relearn_lens.find.attribution import _Run, attribute
from relearn_lens.find.targets import TARGETS
from relearn_lens.methods import Attributing
from relearn_lens.neurons.sites import site_of, streaming, token_site, token_vectors
from relearn_lens.text.concept import Concept
from relearn_lens.text.encoding import encode
from tests.benchmarks.__main__ import _interleaved, _model_and_text

STEPS = 16


def _timed(side: Callable[[], object]) -> float:
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


def attribution(sentences: int = 16) -> None:
    """`attribute` against a bare loop over its forward and backward passes, and against captum a layer at a time."""
    tagger, text = _model_and_text(8 * sentences)
    place = Concept("place")
    encoded = encode(text, tagger.tokenizer, context=tagger.context)
    run = _Run(tagger, encoded, place, Attributing(steps=STEPS, sentences=sentences), "resid", "conductance", 0)
    with run.hooked():
        plan, chunks = run.plan()

    def whole() -> None:
        attribute(tagger, encoded, place, steps=STEPS, sentences=sentences)

    def bare() -> None:
        """As many passes over the same batches, backward to the first layer: no path, target, plan or sums."""
        batches = [(encoded.batch(pieces), at_once) for pieces, at_once in chunks]
        flags = [(weight, weight.requires_grad) for weight in tagger.parameters()]
        for weight, _ in flags:
            weight.requires_grad_(False)
        start: list[Tensor] = []

        def leaf(layer: int, x: Tensor) -> Tensor | None:
            if layer or not torch.is_grad_enabled():
                return None
            start[:] = [x.detach().requires_grad_()]
            return start[0]

        with streaming(tagger.bridge, run.site, leaf):
            for batch, at_once in batches:
                with torch.no_grad():
                    tagger(batch.ids.repeat(2, 1), batch.mask.repeat(2, 1))
                for nodes in torch.arange(STEPS).split(at_once):
                    ids, mask = batch.ids.repeat(len(nodes), 1), batch.mask.repeat(len(nodes), 1)
                    torch.autograd.grad(tagger(ids, mask).sum(), start[0])
        for weight, flag in flags:
            weight.requires_grad_(flag)

    seconds = _interleaved(bare, whole)
    print(
        f"attribution, {plan}: {seconds[1] / seconds[0]:.3f} x its own forward and backward passes (goal <= 1.15); "
        f"{seconds[1]:.1f} s, {plan.tokens / seconds[1]:,.0f} tokens/s, {torch.get_num_threads()} threads"
    )
    try:
        from captum.attr import LayerConductance
    except ImportError:
        print("(captum is not installed: no comparison)")
        return

    kind = text.label_names.index("place")
    with torch.no_grad():
        mask_id = tagger.tokenizer.mask_token_id or tagger.tokenizer.pad_token_id
        reference = token_vectors(tagger.bridge, torch.tensor([mask_id]))
    is_concept = torch.tensor([tag.endswith("-place") for tag in tagger.tags])

    def captum(per_call: int) -> Tensor:
        """Every layer by LayerConductance, on the same sentences, longest first, so many in one call."""
        rows = []
        batches = [encoded.batch(pieces) for pieces in np.array_split(run.pieces, -(-len(run.pieces) // per_call))]
        for hook in site_of(tagger.bridge).hooks:
            total = torch.zeros(int(tagger.bridge.cfg.d_model))
            for batch in batches:
                first = torch.zeros(batch.ids.numel(), dtype=torch.bool)
                first[batch.subword[batch.first[batch.label == kind]]] = True
                first = first.view_as(batch.ids)
                is_word = torch.zeros(batch.ids.numel(), dtype=torch.bool)
                is_word[batch.subword] = True
                with torch.no_grad():
                    end = token_vectors(tagger.bridge, batch.ids.flatten()).view(*batch.ids.shape, -1)
                start = torch.where(is_word.view(*batch.ids.shape, 1), reference, end)

                def said(x: Tensor, batch=batch, first=first) -> Tensor:
                    n = len(x) // len(batch.ids)
                    with streaming(tagger.bridge, token_site(tagger.bridge), lambda *_: x):
                        logits = tagger(batch.ids.repeat(n, 1), batch.mask.repeat(n, 1))
                    words = TARGETS["margin"].of(logits.flatten(0, 1), is_concept).view(x.shape[:2])
                    return (words * first.repeat(n, 1)).sum(1)

                oracle = LayerConductance(said, tagger.bridge.hook_dict[hook])
                theirs = oracle.attribute(end, baselines=start, n_steps=STEPS, method="gausslegendre")
                total += theirs[batch.mask.bool()].sum(0).detach()
            rows.append(total)
        return torch.stack(rows)

    def ours() -> Tensor:
        found = attribute(tagger, encoded, place, steps=STEPS, sentences=sentences, quadrature="captum-gauss-legendre")
        return found.score * found.n_words

    theirs, mine = captum(4), ours()
    apart = float(((theirs - mine).norm(dim=1) / theirs.norm(dim=1)).max())
    for per_call, how in ((len(run.pieces), "all in one call"), (4, "four to a call, kinder to the cache")):
        took = [_timed(side) for side in (ours, lambda n=per_call: captum(n), ours)]
        one = (took[0] + took[2]) / 2
        print(
            f"captum's LayerConductance, {len(theirs)} layers one by one, {STEPS} steps, {len(run.pieces)} sentences, "
            f"{how}: {took[1]:.1f} s, {took[1] / one:.1f} x one pass for all ({one:.1f} s; goal >= 5 x)"
        )
    print(f"the furthest layer differs by {apart:.1e} of its norm")


if __name__ == "__main__":
    attribution()
