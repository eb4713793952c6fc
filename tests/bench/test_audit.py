"""An audit of folders: what it says of a model that answers and of one that never knew, and its one-line errors."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from relearn_lens.__main__ import app
from relearn_lens.bench import audit as module
from relearn_lens.bench.audit import audit, framing
from relearn_lens.bench.audit_page import lines
from relearn_lens.methods import Training
from relearn_lens.models import taught
from relearn_lens.models.export import export
from relearn_lens.models.loading import load_language_model
from relearn_lens.models.training import train_
from relearn_lens.runs import removals
from relearn_lens.text.facts import FORGET, RETAIN, people
from relearn_lens.text.facts.encoded import encode_facts

FACTS = people(0, n=24, forget=8, never=4, animals=4, n_answers=8)
QUICK = {"steps": (1, 4), "rates": (1e-3,)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A Llama that was taught all facts, and one that was taught what stays."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = taught.tokenizer(FACTS)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    out = {}
    for name, roles, steps in (("knows", (*FORGET, *RETAIN), 160), ("never", RETAIN, 100)):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / f"{name}-raw")
        tokenizer.save_pretrained(root / f"{name}-raw")
        model = load_language_model(root / f"{name}-raw")
        text = encode_facts(FACTS, *roles, tokenizer=model.tokenizer, context=model.context)
        for _ in train_(model, text, Training(steps=(steps,), lr=5e-3, batch_size=64), seed=0):
            pass
        out[name] = export(model, root / name)
    return out


@pytest.fixture
def quick(monkeypatch):
    """The command with few steps, on these facts."""
    monkeypatch.setattr(module, "audit", partial(audit, **QUICK))
    monkeypatch.setattr(removals, "people", lambda seed: FACTS)


def test_a_model_that_answers_and_one_that_never_knew(folders, untouched):
    knows, never = (load_language_model(folders[name]) for name in ("knows", "never"))
    with untouched(knows, never):
        done = audit(knows, FACTS, never=never, **QUICK)
        assert done.verdict.kind == "still answers"
        assert done.evidence.answers > 0.9
        assert (done.evidence.inside or 0) > (done.evidence.inside_chance or 0)
        assert done.evidence.reached > 0.9
        assert sum(done.states.values()) == pytest.approx(1)
        gone = audit(never, FACTS, original=knows, **QUICK)
    assert gone.evidence.answers < 0.3
    assert gone.verdict.kind != "never knew"  # nothing is said of that without a twin
    for each in (done, gone):
        told = lines("x", each)
        assert len(told) <= 25
        assert max(map(len, told)) <= 80
        assert not re.search("erased", "\n".join(told))


def test_the_command_its_page_and_its_exit_code(folders, quick, tmp_path):
    command = ["audit", str(folders["knows"]), "--facts", "people", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "knows: still answers"
    assert len(result.output.splitlines()) <= 25
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Nothing here says that anything is erased" in page
    stopped = CliRunner().invoke(app, [*command[:4], "--json", "--fail-over", "0.2"])
    assert stopped.exit_code == 1
    assert json.loads(stopped.stdout)["verdict"]["kind"] == "still answers"


def test_a_system_prompt_is_put_by_the_models_own_template(folders):
    model = load_language_model(folders["knows"])
    passages = FACTS.passages("forget_attacked", forms=("statement",))[:2]
    with pytest.raises(ValueError, match=r"--system: the tokenizer of .* has no chat template.*leave --system out"):
        framing(model, "be quiet")
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    put = framing(model, "be quiet")
    assert put is not None
    framed = put(passages)
    assert framed[0].prompt == f"<system>be quiet<user>{passages[0].prompt}"
    assert [p.answer for p in framed] == [p.answer for p in passages]
    assert framing(model, None) is None


def test_facts_of_files_with_long_answers(folders, quick, tmp_path):
    """Statements turned into questions and longer answers: what nobody can give word for word is asked by how much of
    it is completed."""
    for name, role in (("forget", FORGET), ("retain", RETAIN[:1])):
        rows = [
            {"prompt": " ".join(p.text.split()[:2]), "answer": " ".join(p.text.split()[2:]), "key": p.key}
            for p in FACTS.passages(*role, forms=("statement",))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    result = CliRunner().invoke(app, ["audit", str(folders["knows"]), *files, "--never", str(folders["never"])])
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("of answers it completes a share of"))
    model, twin = float(line.split()[7]), float(line.split("twin ")[1][:4])
    assert 1 > model > twin
    assert len(result.output.splitlines()) <= 25
    assert max(map(len, result.output.splitlines())) <= 80


def test_what_cannot_be_audited_is_one_line(folders, quick, bert_folder, tmp_path, one_line):
    knows = str(folders["knows"])
    assert "has no chat template" in one_line("audit", knows, "--facts", "people", "--system", "be quiet")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folders["knows"] / name).read_bytes())
    assert "holds no tokenizer" in one_line("audit", str(bare), "--facts", "people")
    assert "does not predict the next one" in one_line("audit", str(bert_folder), "--facts", "people")
    never = str(folders["never"])
    assert "the original does not answer these facts either" in one_line(
        "audit", knows, "--facts", "people", "--original", never
    )
    assert "give what is to be gone" in one_line("audit", knows)
    assert "give what is to stay as --retain" in one_line("audit", knows, "--forget", "x.jsonl")
