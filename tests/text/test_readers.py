"""Small files with their reading worked out by hand; seqeval as oracle for spans; every error by message."""

import errno
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from relearn_lens import sources
from relearn_lens.text import readers
from relearn_lens.text.bsb import read_bsb_names
from relearn_lens.text.conll import read_conll
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.readers import CORPORA, read_hf, read_splits, read_splits_named


@pytest.fixture
def write(tmp_path):
    def save(text: str | bytes, name: str = "text.conll") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return save


def column(*tags: str) -> str:
    """A file of one sentence, its words w0, w1, ..."""
    return "".join(f"w{i}\t{tag}\n" for i, tag in enumerate(tags))


def read(corpus: Corpus) -> str:
    """Labels of all words, `*` before the one that opens a span, `/` between sentences."""
    out = []
    for i in range(len(corpus)):
        words = range(corpus.start[i], corpus.start[i + 1])
        out.append(" ".join("*" * bool(corpus.begins[w]) + corpus.label_names[corpus.label[w]] for w in words))
    return " / ".join(out)


def texts(corpus: Corpus) -> list[list[str]]:
    return [[word.text for word in sentence] for sentence in corpus]


# --- tag schemes: what was written, and what it means


@pytest.mark.parametrize(
    ("scheme", "tags", "meaning"),
    [
        ("bio", "B-A I-A B-A O B-B B-A", "*A A *A O *B *A"),
        ("io", "I-A I-A I-B O I-A", "*A A *B O *A"),
        ("io", "place place O art-work art-work place", "*place place O *art-work art-work *place"),
        ("io", "E-mail E-mail O letter", "*E-mail E-mail O *letter"),
        ("iob1", "I-A I-A B-A I-A O I-B I-A", "*A A *A A O *B *A"),
        ("bioes", "B-A I-A E-A S-A S-A O B-B E-B", "*A A A *A *A O *B B"),
        ("bioes", "B-A M-A E-A B-A E-A", "*A A A *A A"),
        ("bioes", "B-A I-A L-A U-A O U-B", "*A A A *A O *B"),
        ("bio", "B-creative-work I-creative-work O", "*creative-work creative-work O"),
    ],
)  # fmt: skip
def test_read_conll_understands_each_scheme(write, scheme, tags, meaning):
    path = write(column(*tags.split()))
    assert read(read_conll(path)) == meaning
    assert read(read_conll(path, scheme=scheme)) == meaning


def test_read_conll_reads_a_mixture_as_conlleval_does(write):
    path = write(column(*["I-A", "B-A", "I-B", "O", "B-B", "I-A", "I-A"]))
    assert read(read_conll(path)) == "*A *A *B O *B *A A"


def test_read_conll_opens_a_span_after_an_end(write):
    assert read(read_conll(write(column("B-A", "E-A", "I-A", "E-A")))) == "*A A *A A"


def test_read_conll_ends_spans_with_the_sentence(write):
    assert read(read_conll(write("a I-X\n\nb I-X\nc I-X\n"))) == "*X / *X X"


def test_read_conll_takes_the_first_of_several_annotations(write):
    path = write(column("B-person,B-location", "I-person,I-location", "O"))
    assert read(read_conll(path)) == "*person person O"


def test_read_conll_leaves_a_comma_in_a_plain_label(write):
    assert read_conll(write(column("a,b", "O"))).label_names == ("O", "a,b")


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(["BI", "I", "BIES"]))
def test_spans_agree_with_seqeval(tmp_path_factory, data, letters):
    tag = st.just("O") | st.builds("{}-{}".format, st.sampled_from(letters), st.sampled_from("AB"))
    sentences = data.draw(st.lists(st.lists(tag, min_size=1, max_size=8), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("oracle") / "x.conll"
    path.write_text("\n".join(column(*tags).replace("w", f"s{i}w") for i, tags in enumerate(sentences)))
    corpus = read_conll(path)
    for i, tags in enumerate(sentences):
        if letters == "BIES" and not any(t[0] in "BIS" for s in sentences for t in s):
            continue  # only E-: plain labels
        ours, first = [], int(corpus.start[i])
        for k in range(len(tags)):
            label = corpus.label_names[corpus.label[first + k]]
            if corpus.begins[first + k]:
                ours.append((label, k, k))
            elif label != "O":
                ours[-1] = (label, ours[-1][1], k)
        assert ours == get_entities(tags)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("OAB"), st.booleans()), min_size=1, max_size=8),
    st.sampled_from(["bio", "iob1", "bioes"]),
)
def test_spans_survive_writing_in_any_scheme(tmp_path_factory, words, scheme):
    labels = [label for label, _ in words]
    begins = [k != "O" and (new or i == 0 or labels[i - 1] != k) for i, (k, new) in enumerate(words)]
    tags = []
    for i, (label, opens) in enumerate(zip(labels, begins, strict=True)):
        inside_next = i + 1 < len(words) and labels[i + 1] == label and not begins[i + 1]
        touches = i > 0 and labels[i - 1] == label
        prefix = {
            "bio": "B" if opens else "I",
            "iob1": "B" if opens and touches else "I",
            "bioes": ("B" if inside_next else "S") if opens else ("I" if inside_next else "E"),
        }[scheme]
        tags.append("O" if label == "O" else f"{prefix}-{label}")
    path = tmp_path_factory.mktemp("scheme") / "x.conll"
    path.write_text(column(*tags))
    for corpus in (read_conll(path), read_conll(path, scheme=scheme)):
        assert corpus.begins.tolist() == begins
        assert [word.label for word in corpus.sentence(0)] == labels


@pytest.mark.parametrize(
    ("scheme", "tags", "message"),
    [
        ("auto", "B-A X-LOC O", r"text\.conll, line 2: tag 'X-LOC' .*'B-', 'I-'.*are \['auto', 'bio'"),
        ("auto", "B-A place", r"line 2: tag 'place' does not fit"),
        ("auto", "B-A B-", r"line 2: tag 'B-' does not fit"),
        ("auto", "B I O", r"line 1: tag 'B' has no type; write B-TYPE"),
        ("bio", "O B-A S-A", r"line 3: tag 'S-A' does not fit scheme 'bio'.*\['B-', 'I-'\]"),
        ("io", "I-A B-A", r"line 2: tag 'B-A' does not fit scheme 'io'.*\['I-'\]"),
        ("bio", "O I-A", r"line 2: 'I-A' opens a span without B-, against 'bio'; try scheme='auto'"),
        ("bioes", "B-A E-A I-A", r"line 3: 'I-A' opens a span without B-, against 'bioes'"),
        ("iob1", "I-A O B-A", r"line 3: 'B-A' touches no span of its type, against 'iob1'"),
        ("IOB2", "B-A", r"called 'IOB2'; the schemes are \['auto', 'bio', 'iob1', 'io', 'bioes'\]"),
    ],
)  # fmt: skip
def test_read_conll_refuses_tags_that_do_not_fit(write, scheme, tags, message):
    with pytest.raises(ValueError, match=message):
        read_conll(write(column(*tags.split())), scheme=scheme)


def test_read_conll_refuses_an_empty_label(write):
    with pytest.raises(ValueError, match=r"line 2: tag '' does not fit"):
        read_conll(write("a\tplace\tx\nb\t\tx\n"), column=1)


# --- columns, comments, documents


def test_read_conll_reads_conll2003(write):
    path = write(
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP I-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP I-PER\n\n"
        "-DOCSTART- -X- -X- O\n\nBRUSSELS NNP B-NP I-LOC\n"
    )
    corpus = read_conll(path)
    assert texts(corpus) == [["EU", "rejects"], ["Peter"], ["BRUSSELS"]]
    assert read(corpus) == "*ORG O / *PER / *LOC"
    assert corpus.group.tolist() == [1, 1, 2]
    assert corpus.name == "text"
    assert read_conll(path, column=1).label_names == ("O", "NNP", "VBZ")
    assert read_conll(path, column=2).label_names == ("O", "NP", "VP")


def test_read_conll_without_documents_makes_each_sentence_a_group(write):
    assert read_conll(write("a O\n\n\n\nb O\nc O\n\nd O")).group.tolist() == [0, 1, 2]


def test_read_conll_keeps_blanks_inside_tab_separated_words(write):
    assert texts(read_conll(write("New York\tB-LOC\n5 \tO\n"))) == [["New York", "5"]]


def test_read_conll_keeps_unusual_blanks_inside_words(write):
    words = ["10\u00a0km", "\u0085", "a\u2028b", "\u3000"]
    assert texts(read_conll(write("".join(f"{w} O\n" for w in words)))) == [words]


def test_read_conll_takes_runs_of_blanks_and_blank_lines_with_tabs(write):
    assert read(read_conll(write("a   B-X  \n\t\nb \t O\n"))) == "*X / O"


def test_read_conll_tells_hashtags_from_comments(write):
    path = write("# id = 7\n#UN\tB-ORG\n#\tO\n#farms\tO\n# text = #UN #farms\n#newdoc\n\nhold\tO\n")
    assert texts(read_conll(path)) == [["#UN", "#", "#farms"], ["hold"]]


def test_read_conll_tells_the_pound_sign_of_conll2000_from_comments(write):
    path = write("# doc two columns\n# sent 1\n# # B-NP\n100 CD B-NP\n")
    corpus = read_conll(path)
    assert texts(corpus) == [["#", "100"]]


def test_read_conll_reads_a_file_of_hashtags_only(write):
    assert texts(read_conll(write("# made by hand\n#a\tB-X\n#b\tO\n"))) == [["#a", "#b"]]


def test_read_conll_leaves_out_words_without_characters(write):
    assert texts(read_conll(write("a\tO\n\tO\nb\tB-X\n"))) == [["a", "b"]]


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfcaf\xc3\xa9 B-X\r\nb O\r\n", "café B-X\rb O".encode()])
def test_read_conll_accepts_byte_order_mark_and_line_ends(write, text):
    assert texts(read_conll(write(text))) == [["café", "b"]]


def test_read_conll_takes_an_encoding(write):
    assert texts(read_conll(write("café O".encode("latin-1")), encoding="latin-1")) == [["café"]]
    assert texts(read_conll(write("café O".encode("utf-16")), encoding="utf-16")) == [["café"]]


@pytest.mark.parametrize(
    ("text", "reading", "message"),
    [
        ("", {}, r"text\.conll has no words"),
        ("\n\n-DOCSTART- O\n# nothing here\n", {}, r"has no words; give a file"),
        ("\nonly\nwords\n", {}, r"text\.conll, line 2: 'only' is a single column.*tab or blanks"),
        ("a O\nb x O\n", {}, r"line 2: 3 column\(s\) where line 1 has 2: 'b x O'; give every word as many"),
        ("a\tO\n\nb O\n", {}, r"line 3: 1 column\(s\) where line 1 has 2"),
        ("a O\n", {"column": 2}, r"line 1: there is no label column 2; of 2 columns it may be 1 to 1, or -1"),
        ("a O\n", {"column": 0}, r"line 1: the label column 0 and the word column 0 must be two of the 2 columns"),
        ("a O\n", {"column": -2}, r"the label column 0 and the word column 0 must be two"),
        ("a O\n", {"column": -3}, r"there is no label column -3"),
        ("a O\n", {"word_column": 5}, r"the label column 1 and the word column 5 must be two.*give column= and"),
        ("a O\nb O\ncaf\u00e9 O".encode("latin-1"), {}, r"line 3: byte 11 \(0xe9\) is not utf-8.*encoding="),
        ("a O", {"encoding": "utf-9"}, r"no encoding is called 'utf-9'; try 'utf-8'"),
        (b"a O\nPK\x00\x03", {}, r"line 2: a NUL character, so this is no utf-8 text; .*encoding="),
    ],
)  # fmt: skip
def test_read_conll_refuses_what_is_no_labelled_text(write, text, reading, message):
    with pytest.raises(ValueError, match=message):
        read_conll(write(text), **reading)


def test_read_conll_refuses_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.conll does not exist; give a file"):
        read_conll(tmp_path / "nowhere.conll")


def test_read_conll_refuses_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is a folder; read_splits reads folders"):
        read_conll(tmp_path)


# --- columns before the words, blanks around cells, blanks in the text

CONLLU = """# newdoc id = d1
# sent_id = 1
1	He	he	PRON	_	_	3	nsubj	_	_
2-3	doesn't	_	_	_	_	_	_	_	_
2	does	do	AUX	_	_	4	aux	_	_
3	n't	not	PART	_	_	4	advmod	_	_
4	go	go	VERB	_	_	0	root	_	NER=O
5-6	au	_	_	_	_	_	_	_	SpaceAfter=No
5	à	à	ADP	_	_	7	case	_	_
6	le	le	DET	_	_	7	det	_	_
6.1	x	x	NOUN	_	_	_	_	_	_
7	,	,	PUNCT	_	_	4	punct	_	SpaceAfter=No|Lang=fr

1	No	no	INTJ	_	_	0	root	_	SpaceAfter=No

1	.	.	PUNCT	_	_	0	root	_	_
"""


def blanks(corpus: Corpus) -> list[str]:
    """Each sentence as it stands in the text."""
    return [
        "".join(
            " " * bool(b) + word.text for word, b in zip(sentence, corpus.after_blank[corpus.start[i] :], strict=False)
        )
        for i, sentence in enumerate(corpus)
    ]


def test_read_conll_reads_the_words_of_conllu_and_their_blanks(write):
    corpus = read_conll(write(CONLLU), column=3)
    assert texts(corpus) == [["He", "does", "n't", "go", "à", "le", ","], ["No"], ["."]]
    assert blanks(corpus) == [" He doesn't go à le,", " No", " ."]
    assert corpus.label_names == ("O", "ADP", "AUX", "DET", "INTJ", "PART", "PRON", "PUNCT", "VERB")
    assert read_conll(write(CONLLU), column=3, word_column=2).vocab[:3] == ("he", "do", "not")
    with pytest.raises(
        ValueError, match=r"column 9 of CoNLL-U holds attributes \('NER=O'\), no classes; choose another"
    ):
        read_conll(write(CONLLU))


def test_read_conll_takes_blanks_from_the_text_of_a_sentence(write):
    rows = "1\tHe\tO\n2\t(\tO\n3\tNora\tB-PER\n4\t)\tO\n5\tgoes\tO\n6\t.\tO\n\n"
    corpus = read_conll(write(f"# text = He  (Nora) goes.\n{rows}# text = another one\n{rows}{rows}"))
    assert blanks(corpus) == [" He (Nora) goes.", *[" He ( Nora ) goes ."] * 2]
    assert read_conll(write(rows)).spaced is None


@pytest.mark.parametrize(
    ("lines", "reading", "words"),
    [
        (["bc/cctv/00 0 0 In O", "bc/cctv/00 0 1 Kassel B-LOC", "", "bc/cctv/01 0 0 It O", "bc/cctv/01 0 1 is O"], {},
         ["In", "Kassel", "It", "is"]),  # OntoNotes: document, part, number
        (["1-1\t0-2\tIn\tO", "1-2\t3-9\tKassel\tLOC", "", "2-1\t11-13\tIt\tO", "2-2\t14-16\tis\tO"], {},
         ["In", "Kassel", "It", "is"]),  # WebAnno: sentence and word, characters
        (["0 In O x", "1 Kassel LOC x", "2 . O x"], {"column": 2}, ["In", "Kassel", "."]),  # counts from 0, to one end
        (["O\tIn", "B-LOC\tKassel", "O\t."], {"column": 0, "word_column": 1}, ["In", "Kassel", "."]),
        (["3 1990 B-DATE", "1 was O", "7 1991 B-DATE"], {"word_column": -2}, ["1990", "was", "1991"]),
        (["1990 B-DATE", "1991 O", "was O"], {}, ["1990", "1991", "was"]),  # numbers among the words
    ],
)  # fmt: skip
def test_read_conll_passes_over_columns_before_the_words(write, lines, reading, words):
    assert [w for sentence in texts(read_conll(write("\n".join(lines)), **reading)) for w in sentence] == words


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["1 O", "2 O", "3 B-X"],
            r"the words of column 0 are all numbers \(1, 2, 3\); .*word_column= \(data.word_column",
        ),
        (["7 x O", "3 y O", "5 z B-X"], "the words of column 0 are all numbers"),
        (["d O", "d O", "d B-X"], r"are all the same \(d, d, d\)"),
        (["O In", "B-LOC Kassel", "O ."], r"are all tags \(O, B-LOC, O\)"),
    ],
)
def test_read_conll_refuses_words_that_are_none(write, lines, message):
    with pytest.raises(ValueError, match=message):
        read_conll(write("\n".join(lines)))


def test_read_conll_strips_blanks_and_takes_the_underscore_for_outside(write):
    corpus = read_conll(write(" Nora \t B-PER\nsaw\t_ \nKassel\tB-LOC\n"))
    assert (texts(corpus), read(corpus)) == ([["Nora", "saw", "Kassel"]], "*PER O *LOC")


def test_read_conll_warns_of_a_text_whose_words_are_all_of_a_class(write):
    with pytest.warns(UserWarning, match=r"text\.conll: no word has the label 'O' \(column 1: DT, NN\), so every word"):
        corpus = read_conll(write("the DT\nroad NN\n"))
    assert corpus.notes[0].startswith("text.conll: no word has the label 'O'")
    assert read_conll(write("the O\nroad NN\n")).notes == ()


# --- folders


@pytest.mark.parametrize(
    "names",
    [
        ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
        ("restauranttrain.bio", "restaurantdev.bio", "restauranttest.bio"),
        ("onto.train.ner", "onto.development.ner", "onto.test.ner"),
        ("da_ddt-ud-train.iob2", "da_ddt-ud-dev.iob2", "da_ddt-ud-test.iob2"),
        ("train.char.bmes", "dev.char.bmes", "test.char.bmes"),
    ],
)
def test_read_splits_reads_files_as_they_are_published(write, tmp_path, names):
    for name in names:
        write(f"{name} B-X\nis O\n", name)
    write("{}", "test_scores.json")
    assert [part.sentence(0)[0].text for part in read_splits(tmp_path, seed=0)] == [*names]


def test_read_splits_leaves_out_joined_and_plain_files(write, tmp_path):
    for name in ("x-train.conllu", "x-dev.conllu", "x-test.conllu", "train_dev.tsv"):
        write(f"{name} B-X\nis O\n", name)
    write("A plain text.", "x-train.txt")
    assert [p.sentence(0)[0].text for p in read_splits(tmp_path, seed=0)] == [
        f"x-{k}.conllu" for k in ("train", "dev", "test")
    ]


def test_read_splits_says_what_to_do_about_a_part_that_is_missing(write, tmp_path):
    for name in ("train.txt", "dev.txt"):
        write("a O\n", name)
    with pytest.raises(
        ValueError, match=r"has \{'probe': \[\]\}.*split into all three by data\.parts: conll:.*train\.txt"
    ):
        read_splits(tmp_path, seed=0)


def test_read_splits_splits_between_sentences_where_documents_are_few(write):
    two = "-DOCSTART- O\n\na O\n\nb O\n\n-DOCSTART- O\n\nc O\n\nd O\n"
    split = read_splits(write(two), seed=0)
    assert sorted(w for part in split for (w,) in texts(part)) == ["a", "b", "c", "d"]
    assert {note for part in split for note in part.notes} == {
        "text: 2 document(s), too few to split between, so each sentence is a group of its own and one document's "
        "sentences may be in train and in probe"
    }
    assert read_splits(write(two + "-DOCSTART- O\n\ne O\n"), seed=0).train.notes == ()
    with pytest.raises(ValueError, match=r"'text' has 2 group\(s\)"):
        read_splits(write("a O\n\nb O\n"), seed=0)


def test_read_splits_reads_another_encoding(write):
    path = write("".join(f"é{i} O\n\n" for i in range(5)).encode("latin-1"))
    assert read_splits_named(f"conll:{path}", seed=0, encoding="latin-1").train.vocab[0][0] == "é"


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "dev.txt", "test.txt"),
        ("eng.train", "eng.testa", "eng.testb"),
        ("en_ewt-train.conll", "en_ewt-valid.conll", "en_ewt-test.conll"),
        ("TRAIN", "validation", "test"),
    ],
)
def test_read_splits_reads_a_folder_of_three_files(write, tmp_path, names):
    for name, tag in zip(names, ("B-B", "B-A", "B-C"), strict=True):
        write(f"{name} {tag}\nx B-B\n", name)
    write("Read me first", "README.txt")
    split = read_splits(tmp_path, seed=0)
    assert [part.label_names for part in split] == [("O", "A", "B", "C")] * 3
    assert [read(part) for part in split] == ["*B *B", "*A *B", "*C *B"]
    assert [part.sentence(0)[0].text for part in split] == list(names)
    assert [part.name for part in split] == [f"{tmp_path.name}/{k}" for k in ("train", "validation", "probe")]


def test_read_splits_splits_one_file_or_the_only_one(write, tmp_path):
    path = write("".join(f"w{i} O\n\n" for i in range(10)), "train.conll")
    write("The licence", "LICENSE")
    for given_path in (path, tmp_path):
        split = read_splits(given_path, seed=1, parts=(0.4, 0.3, 0.3))
        assert [len(part) for part in split] == [4, 3, 3]
        assert split.train.name == "train/train"
    assert texts(split.train) == texts(read_conll(path).split(seed=1, parts=(0.4, 0.3, 0.3)).train)


def test_read_splits_passes_reading_on(write, tmp_path):
    for name in ("train", "dev", "test"):
        write("a B-X O\n", name)
    assert read_splits(tmp_path, seed=0, column=1).probe.label_names == ("O", "X")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.txt", "test.txt"), r"\{'validation': \[\]\} among \['test.txt', 'train.txt'\]"),
        (("train.txt", "dev.txt"), r"it has \{'probe': \[\]\} among"),
        (("train.txt", "train.conll", "dev", "test"), r"it has \{'train': \['train.conll', 'train.txt'\]\}"),
        (("e.conll", "f.conll"), r"'train': \[\], 'validation': \[\], .*among \['e.conll', 'f.conll'\]"),
        ((), r"train\*.*dev\*, valid\*, testa\*.*test\*, testb\*.*among \[\]"),
    ],
)  # fmt: skip
def test_read_splits_says_which_file_of_a_folder_is_missing(write, tmp_path, names, message):
    for name in names:
        write("a O\n", name)
    with pytest.raises(ValueError, match=message):
        read_splits(tmp_path, seed=0)


# --- Hugging Face


def table(rows: int = 6, words: str = "tokens", tags: str = "ner_tags", kind: str = "class") -> datasets.Dataset:
    names = ["O", "B-LOC", "I-LOC"]
    value = {"class": datasets.ClassLabel(names=names), "string": datasets.Value("string")}
    labels = [0, 1, 2] if kind == "class" else names
    features = datasets.Features(
        {words: datasets.Sequence(datasets.Value("string")), tags: datasets.Sequence(value[kind])}
    )
    return datasets.Dataset.from_dict(
        {words: [[f"s{i}", "New", "York"] for i in range(rows)], tags: [labels] * rows}, features=features
    )


def save(folder: Path, **parts: datasets.Dataset) -> None:
    whole = datasets.DatasetDict()
    whole.update(parts)
    whole.save_to_disk(folder)


@pytest.mark.parametrize("kind", ["class", "string"])
@pytest.mark.parametrize(("words", "tags"), [("tokens", "ner_tags"), ("words", "labels"), ("words", "tags")])
def test_read_hf_splits_a_saved_table(tmp_path, words, tags, kind):
    table(10, words, tags, kind).save_to_disk(tmp_path / "set")
    split = read_hf(str(tmp_path / "set"), seed=0)
    assert [len(part) for part in split] == [6, 2, 2]
    assert split.train.label_names == ("O", "LOC")
    assert read(split.probe) == "O *LOC LOC / O *LOC LOC"


def test_read_hf_uses_the_sets_own_parts(tmp_path):
    save(tmp_path / "set", train=table(4), validation=table(2), test=table(1))
    split = read_hf(str(tmp_path / "set"), seed=0)
    assert [len(part) for part in split] == [4, 2, 1]
    assert split.validation.name == f"{tmp_path / 'set'}/validation"


def test_read_hf_splits_the_train_part_without_the_others(tmp_path):
    save(tmp_path / "set", train=table(5), test=table(3))
    split = read_hf(str(tmp_path / "set"), seed=0)
    assert sum(len(part) for part in split) == 5
    assert re.fullmatch(
        r"data set '.*set' has no validation part: its train part alone is split, test is not used",
        split.probe.notes[0],
    )


def test_read_hf_reads_a_folder_of_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    table(5, kind="string").to_parquet(tmp_path / "set" / "train.parquet")
    split = read_hf(str(tmp_path / "set"), seed=0)
    assert sum(part.n_words for part in split) == 15


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"text": ["a"], "tags": [["O"]]}, r"the columns \['text', 'tags'\]; needed are one of \('tokens'"),
        ({"tokens": [["a"]], "tags": [["O", "O"]]}, r"row 0: 'tokens' and 'tags' must be equally long lists"),
        ({"tokens": ["a"], "tags": ["O"]}, r"row 0: 'tokens' and 'tags' must be equally long lists"),
        ({"tokens": [["a"]], "tags": [[3]]}, r"row 0: 'tags' holds 3, which has no name"),
        ({"tokens": [["a"], ["b", "c"]], "tags": [["B-X"], ["O", "X"]]}, r"row 1: tag 'X' does not fit"),
    ],
)  # fmt: skip
def test_read_hf_refuses_other_columns(tmp_path, contents, message):
    datasets.Dataset.from_dict(contents).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        read_hf(str(tmp_path / "set"), seed=0)


def test_read_hf_refuses_hidden_labels(tmp_path):
    hidden = {"tokens": [["a"]], "ner_tags": [[-1]]}
    datasets.Dataset.from_dict(hidden, features=table().features).save_to_disk(tmp_path / "s")
    with pytest.raises(ValueError, match=r"row 0: 'ner_tags' holds -1, which has no name"):
        read_hf(str(tmp_path / "s"), seed=0)


def test_read_hf_refuses_parts_without_train(tmp_path):
    save(tmp_path / "set", a=table(3), b=table(3))
    with pytest.raises(ValueError, match=r"the parts \['a', 'b'\]; needed are \('train', 'validation'"):
        read_hf(str(tmp_path / "set"), seed=0)


def raises(error: Exception):
    def load(*args, **kwargs):
        raise error

    return load


def test_read_hf_says_what_to_do_without_a_network(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", raises(ConnectionError("Couldn't reach the Hub")))
    with pytest.raises(ConnectionError, match=r"'a/b' cannot be reached: Couldn't.*give a folder.*conll:PATH"):
        read_hf("a/b", seed=0)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_read_hf_says_where_to_put_a_cache_that_cannot_be_written(tmp_path, monkeypatch, number):
    (tmp_path / "set").mkdir()
    error = ValueError("cannot prepare")
    error.__cause__ = OSError(number, "of the system", str(tmp_path / "home" / ".cache"))
    monkeypatch.setattr(datasets, "load_dataset", raises(error))
    with pytest.raises(OSError, match=r"set' cannot be loaded: .*of the system.*; set HF_HOME to a folder.*conll:PATH"):
        read_hf(str(tmp_path / "set"), seed=0)


def test_read_hf_does_not_blame_the_cache_for_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    error = PermissionError(errno.EACCES, "of the system", str(tmp_path / "set" / "train.json"))
    monkeypatch.setattr(datasets, "load_dataset", raises(error))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*of the system.*train.json") as refusal:
        read_hf(str(tmp_path / "set"), seed=0)
    assert "HF_HOME" not in str(refusal.value)


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("doesn't exist"),
        ValueError("Config name is missing"),
        RuntimeError("other"),
    ],
)
def test_read_hf_says_what_to_do_about_an_unknown_name(monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", raises(error))
    with pytest.raises(ValueError, match=rf"'a/b' with configuration 'c' .*{error}.*hf:NAME:CONFIG"):
        read_hf("a/b", seed=0, config="c")


def test_read_hf_takes_the_hubs_parquet_copy_of_a_script_and_runs_no_code(monkeypatch):
    asked = []

    def load(name, config, **options):
        asked.append(options)
        if not options:
            raise RuntimeError("Dataset scripts are no longer supported, but found conll2003.py")
        return {"train": table(5)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sum(len(part) for part in read_hf("conll2003", seed=0)) == 5
    assert asked == [{}, {"revision": "refs/convert/parquet"}]


# --- the Berean Standard Bible

SOURCE = """id\tlemma\tstrongs
n1\tΠαῦλος\tG3972
n2\tἹεροσόλυμα\tG2414
n3\tἙβραϊστί\tG1447
n4\tλέγω\tG3004
n5\tἸησοῦς\tG2424
n6\tΧριστός\tG5547
"""
VERSES = [
    "He told Paul : Go to Jerusalem now",
    "Paul’s men spoke Hebrew ; Paul , he left",
    "He saw Jesus Christ . He He He",
]  # fmt: skip
ALIGNED = [  # Greek word, verse, English words counted from 1
    ("n4", 0, [2]),
    ("n1", 0, [3, 1]),
    ("n2", 0, [6, 7]),
    ("n1", 1, [1]),
    ("n3", 1, [4]),
    ("n5", 2, [3]),
    ("n6", 2, [4]),
]


def test_read_bsb_names_decides_by_form(tmp_path, monkeypatch):
    places = ["40001001", "40001002", "40002001"]
    words = [
        f"{place}{w:03}\t{place}\t{text}\t{'y' if text in ('told', 'Hebrew', 'left', 'Christ') else ''}"
        for place, verse in zip(places, VERSES, strict=True)
        for w, text in enumerate(verse.split(), start=1)
    ]
    records = [{"source": [greek], "target": [f"{places[verse]}{w:03}" for w in at]} for greek, verse, at in ALIGNED]
    (tmp_path / "SBLGNT.tsv").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "nt_BSB.tsv").write_text(
        "\n".join(["id\tsource_verse\ttext\tskip_space_after", *words]), encoding="utf-8"
    )
    (tmp_path / "SBLGNT-BSB-manual.json").write_text(json.dumps({"records": records}), encoding="utf-8")
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    corpus = read_bsb_names()
    assert texts(corpus) == [verse.split() for verse in VERSES]
    # of 5 "He" one is aligned, less than a third; of 3 "Paul" two are, and so all 3 are names
    assert read(corpus) == ("O O *person O O O *place O / *person O O O O *person O O O / O O *person person O O O O")
    assert corpus.group.tolist() == [40001, 40001, 40002]
    glued = [corpus.vocab[w] for w in corpus.word[~corpus.after_blank]]
    assert glued == ["Paul", ";", "."]  # what is after `left` opens the next verse


@pytest.fixture(scope="module")
def bsb() -> Corpus:
    if not sources.is_cached("bsb-names"):
        pytest.skip("the text is not in the cache: relearn-lens fetch bsb-names")
    return read_bsb_names()


def labels_of(corpus: Corpus, text: str) -> Counter[str]:
    return Counter(word.label for sentence in corpus for word in sentence if word.text == text)


@pytest.mark.artefacts
def test_bsb_has_the_counted_verses_words_and_labels(bsb):
    assert (bsb.n_sentences, bsb.n_words, len(set(bsb.group.tolist()))) == (7_940, 201_136, 260)
    assert bsb.label_names == ("O", "people", "person", "place")
    counts = bsb.words_per_label()
    assert counts["person"] > 4_000
    assert counts["place"] > 800
    assert counts["people"] > 500
    assert bsb.licence == "CC BY 4.0"


@pytest.mark.artefacts
@pytest.mark.parametrize(
    ("text", "label"),
    [("Jerusalem", "place"), ("Paul", "person"), ("Jesus", "person"), ("Pharisees", "people")],
)
def test_bsb_labels_names(bsb, text, label):
    assert set(labels_of(bsb, text)) == {label}


@pytest.mark.artefacts
@pytest.mark.parametrize("text", ["He", "Him", "They", "You", "I", "When", "But", "God", "Lord’s", "Son", "O", "A"])
def test_bsb_labels_no_pronoun_nor_title(bsb, text):
    assert set(labels_of(bsb, text)) == {"O"}


@pytest.mark.artefacts
def test_bsb_keeps_languages_out_and_joins_neighbours(bsb):
    assert labels_of(bsb, "Greek")["O"] == 3
    first = bsb.sentence(0)  # "This is the record of the genealogy of Jesus Christ, the son of David, ..."
    assert [word.text for word in first if word.label == "person"] == ["Jesus", "Christ", "David", "Abraham"]
    assert bsb.begins[: len(first)].sum() == 3
    assert bsb.split(seed=0).train.n_sentences > 4_000


@pytest.mark.artefacts
def test_bsb_knows_its_own_blanks(bsb):
    shown = [
        "".join(" " * bool(b) + w.text for w, b in zip(s, bsb.after_blank[bsb.start[i] :], strict=False))
        for i, s in zip(range(3), bsb, strict=False)
    ]
    assert shown[0] == " This is the record of the genealogy of Jesus Christ, the son of David, the son of Abraham:"
    assert bsb.after_blank[bsb.start[:-1]].all()
    assert bsb.n_words - bsb.spaced.sum() == 29_407  # as the file counts them


# --- by name


def test_read_splits_named_reads_each_form(write, tmp_path, monkeypatch):
    path = write("".join(f"w{i} B-X\n\n" for i in range(5)))
    assert read_splits_named(f"conll:{path}", seed=0).train.label_names == ("O", "X")
    table(5).save_to_disk(tmp_path / "set")
    assert read_splits_named(f"hf:{tmp_path / 'set'}", seed=0).train.label_names == ("O", "LOC")
    monkeypatch.setattr(readers, "read_bsb_names", lambda: read_conll(path))
    assert read_splits_named("bsb-names", seed=0).train.label_names == ("O", "X")


def test_read_splits_named_cuts_the_configuration_off(monkeypatch):
    asked = []

    def load(*name, **options):
        asked.append(name)
        return table(5)

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_splits_named("hf:a/b:c", seed=0)
    read_splits_named("hf:conll2003", seed=0)
    assert asked == [("a/b", "c"), ("conll2003", None)]


@pytest.mark.parametrize("spec", ["bible", "conll:", "hf:", "", "csv:x"])
def test_read_splits_named_lists_the_forms(spec):
    forms = re.escape(str(list(CORPORA)))
    with pytest.raises(ValueError, match=rf"no corpus is called '{spec}'; the forms are {forms}"):
        read_splits_named(spec, seed=0)


def test_read_splits_named_recognises_a_path(write):
    with pytest.raises(ValueError, match=r"did you mean 'conll:.*text\.conll'\?"):
        read_splits_named(str(write("a O")), seed=0)


# --- no code from data, and what is no text


@pytest.mark.parametrize("name", ["a.pkl", "deep/set.py", "words.npy", "all.tar", "all.zip", "model.bin", "no-suffix"])
def test_read_hf_refuses_a_folder_with_anything_but_data(tmp_path, name):
    folder = tmp_path / "set"
    (folder / name).parent.mkdir(parents=True)
    table(5).to_parquet(folder / "train.parquet")
    (folder / "README.md").write_text("what it is")
    (folder / name).write_bytes(b"\x80\x04K\x01.")
    file = name.rpartition("/")[2]
    with pytest.raises(ValueError, match=rf"{file}' is none of \.parquet, .*would run code\); move it out of"):
        read_hf(str(folder), seed=0)


def test_read_hf_never_unpickles(tmp_path, monkeypatch):
    """A name such as `pandas` is a reader of the package datasets, which would unpickle what lies around."""
    import pickle

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "it-ran",)

    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Runs()))
    monkeypatch.chdir(tmp_path)
    for name in ("pandas", "webdataset", "csv", "set.py", "no/such/set.py"):
        with pytest.raises(ValueError, match=rf"'{name}' is no data set, but code of the package datasets or a script"):
            read_hf(name, seed=0)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[1, 2]", b"PAR1 and no more PAR1"])
def test_read_hf_says_which_folder_is_damaged(tmp_path, monkeypatch, suffix, content):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"train.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=r"data set '.*set' (with configuration None cannot be|has the columns)"):
        read_hf(str(tmp_path / "set"), seed=0)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"[]", b"5", b'{"features": 5}', b'{"_data_files": 5}'])
def test_read_hf_says_which_saved_table_is_damaged(tmp_path, name, content):
    save(tmp_path / "set", train=table(5))
    (tmp_path / "set" / "train" / name).write_bytes(content)
    try:
        read_hf(str(tmp_path / "set"), seed=0)
    except ValueError as error:
        assert "cannot be loaded" in str(error) or "cannot be read" in str(error)  # noqa: PT017


def test_read_hf_refuses_words_that_are_no_text(tmp_path):
    datasets.Dataset.from_dict({"tokens": [[1, 2]], "tags": [["O", "O"]]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"row 0: 'tokens' holds 1, which is no word; words must be strings"):
        read_hf(str(tmp_path / "set"), seed=0)


@pytest.mark.parametrize("encoding", ["base64", "undefined", "idna", "no\0such", "hex"])
def test_read_conll_refuses_what_is_no_encoding_of_a_text(tmp_path, encoding):
    (tmp_path / "a.conll").write_bytes(b"Rome\xff B-LOC\n")
    with pytest.raises(ValueError, match=r"a\.conll(: no encoding is called| is not|, line 1: byte)"):
        read_conll(tmp_path / "a.conll", encoding=encoding)


def test_read_conll_says_why_a_file_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.conll").write_text("Rome B-LOC\n")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=r"a\.conll cannot be read \(Permission denied\); give a file that can be"):
        read_conll(tmp_path / "a.conll")
    with pytest.raises(OSError, match=r"cannot be read \(File name too long\)"):
        read_conll(tmp_path / ("a" * 300))


def test_read_conll_refuses_half_a_character(tmp_path):
    (tmp_path / "a.conll").write_bytes(rb"R\ud800me B-LOC" + b"\n")
    with pytest.raises(ValueError, match=r"corpus 'a' has the word 'R\\ud800me' with half a character .*encoding="):
        read_conll(tmp_path / "a.conll", encoding="unicode_escape")


def test_read_conll_refuses_a_column_that_is_no_labels(tmp_path):
    (tmp_path / "a.conll").write_text("".join(f"word{i} L{i}\n" for i in range(33_000)))
    with pytest.raises(ValueError, match=r"has 33,001 different labels, of at most 32,767; is its label column one of"):
        read_conll(tmp_path / "a.conll", scheme="io")
