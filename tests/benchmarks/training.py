"""Training between measurements, against a plain PyTorch loop and Hugging Face's Trainer on the bare model."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from relearn_lens import evaluate, sources
from relearn_lens.models import toy
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Tagger
from relearn_lens.models.training import finetune_
from relearn_lens.text.bsb import read_bsb_names
from relearn_lens.text.encoding import Encoded
from tests.benchmarks.__main__ import _interleaved, _model_and_text

BATCH, STEPS = 16, 12


def _bare(tagger: Tagger) -> Any:
    """Hugging Face's own model with a fresh head of the same size."""
    from transformers import AutoModelForTokenClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForTokenClassification.from_pretrained(
        sources.fetch("minilm"), num_labels=len(tagger.tags), attn_implementation="eager"
    )


def _batches(encoded: Encoded) -> list[dict[str, torch.Tensor]]:
    """The batches that `finetune_` takes, padded, with a label for every token."""
    made = []
    for pieces in itertools.islice(encoded.shuffled(batch_size=BATCH, seed=0, epoch=0), STEPS):
        batch = encoded.batch(pieces)
        labels = torch.full((batch.ids.numel(),), -100)
        labels[batch.subword] = batch.tag
        made.append({"input_ids": batch.ids, "attention_mask": batch.mask, "labels": labels.view_as(batch.ids)})
    return made


def training() -> None:
    """Steps of `finetune_` against the same steps in a plain loop and in Trainer."""
    tagger, text = _model_and_text(BATCH * STEPS)
    if text.name == toy.corpus(sentences=2).name:
        print("(training is compared on minilm alone)")
        return
    encoded = tagger.encode(text)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in _batches(encoded))
    model = _bare(tagger)
    from transformers import Trainer, TrainingArguments

    def ours() -> None:
        list(finetune_(tagger, encoded, epochs=STEPS / -(-encoded.n_pieces // BATCH), batch_size=BATCH, seed=0))

    def plain() -> None:
        decays = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-5, fused=True)
        model.train()
        for batch in _batches(encoded):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def trainer() -> None:
        rows = []
        for pieces in itertools.islice(encoded.shuffled(batch_size=BATCH, seed=0, epoch=0), STEPS):
            for piece in np.asarray(pieces):
                one = encoded.batch(np.array([piece]))
                labels = torch.full((one.ids.numel(),), -100)
                labels[one.subword] = one.tag
                rows.append({"input_ids": one.ids[0].tolist(), "labels": labels.tolist()})
        from transformers import DataCollatorForTokenClassification

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=BATCH, num_train_epochs=1, max_steps=STEPS, save_strategy="no",
                report_to="none", disable_tqdm=True, learning_rate=2e-5, weight_decay=0.01, logging_strategy="no",
                use_cpu=True, optim="adamw_torch_fused",
            )  # fmt: skip
            Trainer(
                model, arguments, train_dataset=rows,  # pyright: ignore[reportArgumentType]
                data_collator=DataCollatorForTokenClassification(tagger.tokenizer),
            ).train()  # fmt: skip

    mine, loop, theirs = _interleaved(ours, plain, trainer)
    print(
        f"training, {STEPS} steps of {BATCH} sentences: {mine / loop:.3f} x a plain PyTorch loop over the same batches "
        f"on the bare Hugging Face model (goal <= 1.05), {mine / theirs:.3f} x Hugging Face Trainer (batches not "
        f"bucketed by length); {tokens / mine:,.0f} tokens/s, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    training()


def defaults() -> None:
    """Does `finetune_` without a field learn the names of 900 verses? F1 on 150 others, and by 2e-5 in batches of 8."""
    names = read_bsb_names().labelled().split(seed=0)
    train, probe = names.train.sample(900, seed=0), names.probe.sample(150, seed=0)
    sides: tuple[tuple[str, dict[str, Any]], ...] = (
        ("as it comes", {}),
        ("lr 2e-5, batches of 8", {"lr": 2e-5, "batch_size": 8}),
    )
    for says, fields in sides:
        tagger = load_tagger("minilm", labels=train.label_names)
        for _ in finetune_(tagger, train, seed=0, **fields):
            pass
        print(f"{says}: {evaluate(tagger, probe)}", flush=True)
