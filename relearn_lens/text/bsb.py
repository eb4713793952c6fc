"""The New Testament with its named entities, from pinned sources."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import groupby, pairwise
from operator import itemgetter

from relearn_lens import sources
from relearn_lens.text.corpus import OUTSIDE, Corpus, build_corpus
from relearn_lens.text.tags import Row, decode


def _columns(text: str, *wanted: str) -> Iterator[tuple[str, ...]]:
    """The wanted columns of a tab-separated table with a header and no quoting, faster than `csv`."""
    header, *lines = text.rstrip("\n").split("\n")
    pick = itemgetter(*map(header.split("\t").index, wanted))
    return (pick(line.split("\t")) for line in lines)


def read_bsb_names() -> Corpus:
    """Persons, places and peoples in the Berean Standard Bible's New Testament.

    A sentence is a verse, a group a chapter. Human alignments lead from an English word to a Greek one, and
    `bsb_names.tsv` says what each Greek name names. A capitalised English word form is a name if at
    least a third of its occurrences are aligned to one. Each occurrence of a name carries the label that it is
    itself aligned to, and where it is aligned to none, the label that most occurrences have; one that is aligned
    to what the table calls `other` (a language, a title) carries none. `Paul’s` counts as `Paul`. Neighbouring
    words of one label are one span.

    Asking the form first mends both faults of the alignments: a `He`, `When` or `God` aligned to a name now and
    then (no such form in a third of its occurrences), and the names that translators put for a Greek pronoun or
    verb, which are aligned to no name (4 in 10 of `Jesus`).

    Raises:
        OSError, ValueError: as `sources.fetch`, where the text is not yet in the cache.
    """
    folder = sources.fetch("bsb-names")
    files = [folder / name for name in ("SBLGNT.tsv", "nt_BSB.tsv", "SBLGNT-BSB-manual.json")]
    greek, verses, alignments = (file.read_text(encoding="utf-8") for file in files)
    table = resources.files("relearn_lens.text").joinpath("bsb_names.tsv").read_text(encoding="utf-8")
    kinds = {(lemma, strongs): kind for lemma, strongs, kind in _columns(table, "lemma", "strongs", "label")}
    names = {id: kinds.get((a, b)) for id, a, b in _columns(greek, "id", "lemma", "strongs")}
    aligned: dict[str, str] = {}
    for record in json.loads(alignments)["records"]:
        if kind := next(filter(None, map(names.get, record["source"])), None):
            for id in record["target"]:
                aligned.setdefault(id, kind)

    words = list(_columns(verses, "id", "source_verse", "text", "skip_space_after"))
    forms = [re.sub("’s?$", "", text) if text[:1].isupper() else "" for _, _, text, _ in words]
    occurs: Counter[str] = Counter(forms)
    votes: dict[str, Counter[str]] = {}
    for (id, _, _, _), form in zip(words, forms, strict=True):
        if form and aligned.get(id, "other") != "other":
            votes.setdefault(form, Counter())[aligned[id]] += 1
    label = {form: n.most_common(1)[0][0] for form, n in votes.items() if 3 * n.total() >= occurs[form]}

    def kind_of(id: str, form: str) -> str:
        kind = aligned.get(id, label[form]) if form in label else OUTSIDE
        return OUTSIDE if kind == "other" else kind

    rows = [Row(int(verse), text, kind_of(id, form)) for (id, verse, text, _), form in zip(words, forms, strict=True)]
    sentences = [list(verse) for _, verse in groupby(rows, key=lambda row: row.number)]
    glued = [skip == "y" and verse == after for (_, verse, _, skip), (_, after, _, _) in pairwise(words)]
    return build_corpus(
        decode(sentences, "io", "verse"),
        name="bsb-names",
        groups=[verse[0].number // 1000 for verse in sentences],  # BBCCCVVV
        source="Berean Standard Bible, New Testament; Clear Bible alignments",
        licence="CC BY 4.0",
        spaced=[True, *(not skip for skip in glued)],
    )
