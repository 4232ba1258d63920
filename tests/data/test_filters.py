"""Tests the filters of `prepare` on texts whose fate is known, and in a set."""

import json

import numpy as np
import pytest

from llada_jax.config import UserError
from llada_jax.data.manifest import load_manifest
from llada_jax.data.prepare import duplicates, overlap, quality
from llada_jax.data.prepare.filters import EXACT, NEAR, OVERLAP, Filters
from llada_jax.data.prepare.prepare_text import prepare

from .conftest import split_documents, story, write_jsonl

PROSE = (
    "The quiet fox walked to the river and sang a song of the green hills. It was cold, but that did not worry it. "
    'A child asked: "What do you have with you?" The fox had nothing to show! They sat down and talked of the engine '
    "that never stops, of the small boats, and of the long way home. Then the moon rose over the trees and both slept."
)


def small(inputs, output, tokenizer, **options):
    settings = {"sequence_length": 32, "workers": 1, "progress": False, "validation_fraction": 0.1, **options}
    return prepare(inputs, output, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, ""),
        ("A few words of the text.", quality.WORDS),
        ("extraordinary " * 60, quality.LENGTH),
        (PROSE + " #tag" * 30, quality.SYMBOLS),
        ("\n".join(f"- {part}." for part in PROSE.split(".")), quality.BULLETS),
        (PROSE.replace(". ", "...\n"), quality.TRAILING),
        (PROSE + " 1234" * 40, quality.LETTERS),
        ("Der Fuchs ging an den Fluss und sang ein Lied von den Bergen. " * 6, quality.STOP_WORDS),
    ],
)
def test_gopher(text, reason):
    assert quality.gopher(text) == reason


def test_gopher_repetition():
    assert quality.gopher_repetition(PROSE) == ""
    assert quality.gopher_repetition("\n\n".join([PROSE, PROSE])) == quality.PARAGRAPHS
    assert quality.gopher_repetition("\n".join(["Home", PROSE, *["Home"] * 3])) == quality.LINES
    assert quality.gopher_repetition(PROSE + " click here now" * 12) == quality.TOP
    assert quality.gopher_repetition(f"{PROSE} {PROSE[:150]}") == quality.REPEATED


def test_c4_removes_lines_and_documents():
    menu = "Home\nAbout us\nPlease enable Javascript to see this page.\nWe use cookies to serve you better.\n"
    assert quality.c4(menu + PROSE[:-1] + "\n" + PROSE) == ("", PROSE, 5)
    assert quality.c4("Only one sentence is here.")[0] == quality.SENTENCES
    assert quality.c4(PROSE + "\nLorem ipsum is a text.")[0] == quality.LOREM
    assert quality.c4(PROSE + "\nif (x) { return it now.")[0] == quality.BRACKET


def test_same_verdicts_as_datatrove():
    """datatrove's word tokenizers need more packages; with words between blanks its filters say the same as ours."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Blanks(WordTokenizer):
        def word_tokenize(self, text):
            return text.split()

        def sent_tokenize(self, text):
            raise NotImplementedError

        def span_tokenize(self, text):  # as we count sentences
            return [(match.start(), match.end()) for match in quality._SENTENCE_END.finditer(text)] or [(0, len(text))]

    rng = np.random.default_rng(0)
    lines = [
        *PROSE.split(". "),
        "Home",
        "- one point.",
        "and so on...",
        "#tag #tag",
        "1 2 3 4 5 6",
        "{ }",
        "A {b} c d.",
    ]
    texts = [PROSE, *(" ".join(PROSE.split()[i : i + 60]) for i in range(8))]
    for i in range(400):
        chosen = rng.choice(lines if i % 2 else lines[:8], rng.integers(1, 40), replace=True)
        texts.append(str(rng.choice(["\n", ".\n", ". ", "\n\n"])).join(map(str, chosen)))
    verdicts = set()
    for name, theirs, ours in (
        ("gopher", GopherQualityFilter(language=Blanks()), quality.gopher),
        ("repetition", GopherRepetitionFilter(language=Blanks()), quality.gopher_repetition),
        ("c4", C4QualityFilter(language=Blanks()), lambda text: quality.c4(text)[0]),
    ):
        for text in texts:
            document = Document(text=text, id="")
            result = theirs.filter(document)
            reason = ours(text)
            verdicts.add(reason)
            assert (result is True) == (reason == ""), (name, result, reason, text)
            if name == "c4" and not reason:
                assert document.text == quality.c4(text)[1]
    assert len(verdicts) >= 10  # the texts are kept, and left out for many reasons


def test_decontamination(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"question": PROSE, "choices": ["yes", {"text": "Seven words: a b c d e f"}]})
    )
    (tmp_path / "b.json").write_text(json.dumps([["only seven words are in this text"]]))
    runs = overlap.runs_of([str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")])
    assert {n: len(found) for n, found in runs.items()} == {8: 1, 13: len(overlap.words_of(PROSE)) - 12}
    words = PROSE.split()
    assert overlap.overlaps("Intro. " + " ".join(words[20:33]).upper(), runs)
    assert not overlap.overlaps("Intro. " + " ".join(words[20:32]), runs)
    assert overlap.overlaps("say: seven words - A, B, C, D, E, F!", runs)
    assert not overlap.overlaps("only seven words are in this text", runs)
    with pytest.raises(UserError, match="no text of at least 8 words"):
        overlap.runs_of([str(tmp_path / "b.json")])


def test_near_duplicates_are_those_of_datasketch():
    """The same pairs as datasketch's index finds, and hashes that estimate the true Jaccard similarity."""
    datasketch = pytest.importorskip("datasketch", reason="datasketch is not installed")
    rng = np.random.default_rng(1)
    texts = [story(i, words=120) for i in range(40)]
    for i in range(40):
        words = texts[i].split()
        for k in rng.choice(len(words), i // 4, replace=False):
            words[k] = f"other{k}"
        texts.append(" ".join(words))
    index = datasketch.MinHashLSH(num_perm=112, params=(duplicates.BANDS, duplicates.ROWS))
    expected, errors = [], []
    for i, text in enumerate(texts):
        signature = duplicates.signature(text)
        expected.append(bool(index.query(signature)))
        index.insert(i, signature)
        if i >= 40:
            a, b = (
                {" ".join(words[k : k + 5]) for k in range(len(words) - 4)}
                for words in map(overlap.words_of, (text, texts[i - 40]))
            )
            errors.append(signature.jaccard(duplicates.signature(texts[i - 40])) - len(a & b) / len(a | b))
    assert np.abs(errors).max() < 0.17 and abs(np.mean(errors)) < 0.02
    keys = np.array([duplicates.near_keys(text) for text in texts])
    found = np.any([duplicates.repeated(keys[:, band]) for band in range(duplicates.BANDS)], axis=0)
    assert found.tolist() == expected
    assert 5 < sum(expected) < 40 and not any(expected[:40])


def test_repeated_keys():
    keys = np.array([[1, 2], [1, 3], [1, 2], [2, 2], [1, 3], [1, 2]], np.uint64)
    assert duplicates.repeated(keys).tolist() == [False, False, True, False, True, True]
    assert duplicates.repeated(keys[:0]).tolist() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_filtered_set(tmp_path, tokenizer_folder, workers):
    """The set is that of the texts that stay; the manifest counts by input why the others were left out."""
    stories = [f"{story(i)} {PROSE}" for i in range(6)]
    first = write_jsonl(tmp_path / "a.jsonl", [stories[0], "Too short.", stories[1], stories[0], stories[2]])
    second = write_jsonl(tmp_path / "b.jsonl.gz", [stories[1], stories[3] + "{", stories[4], stories[5]])
    (tmp_path / "test.txt").write_text(story(4))
    filters = Filters("exact", ("gopher",), (), (str(tmp_path / "test.txt"),))
    manifest = small([first, second], tmp_path / "set", tokenizer_folder, filters=filters, workers=workers)
    kept = write_jsonl(tmp_path / "kept.jsonl", [*stories[:3], stories[3] + "{", stories[5]])
    plain = small([kept], tmp_path / "plain", tokenizer_folder)
    assert (manifest.train, manifest.validation) == (plain.train, plain.validation)
    assert plain.filtered is None and '"filtered"' not in plain.to_json()
    assert load_manifest(tmp_path / "set") == manifest
    found = manifest.filtered
    assert [(each.documents, each.removed) for each in found.sources] == [
        (5, {quality.WORDS: 1, EXACT: 1}),
        (4, {OVERLAP: 1, EXACT: 1}),
    ]
    assert found.examples[quality.WORDS] == (f"{first}, line 2: Too short.",)
    assert [each.split(": ")[0] for each in found.examples[EXACT]] == [f"{first}, line 4", f"{second}, line 1"]
    assert found.decontaminate[0].startswith("test.txt sha256:")


def test_lines_and_pieces_of_a_long_text(tmp_path, tokenizer_folder):
    """A piece of a long .txt file is judged on its own; what is left of its neighbours does not run on over the gap."""
    good = [f"{story(i, words=30).splitlines()[1]} is a line of number {i}." for i in range(2000)]
    text = "".join(f"{line}\nmenu\n" for line in good)
    middle = len(text) // 2
    (tmp_path / "long.txt").write_text(text[:middle] + "word\n" * 8000 + text[middle:])
    manifest = small(
        [str(tmp_path / "long.txt")],
        tmp_path / "set",
        tokenizer_folder,
        filters=Filters(quality=("c4",)),
        validation_fraction=0,
        sequence_length=512,
    )
    (source,) = manifest.filtered.sources
    assert source.removed == {quality.SENTENCES: source.removed[quality.SENTENCES]} and source.lines > 1900
    documents = split_documents(tmp_path / "set", manifest, "train")
    assert len(documents) == 2
    lines = [line for document in documents for line in document.splitlines()]
    assert len(lines) >= 1998 and set(lines) <= {*good, *(line[i:] for line in good for i in range(len(line)))}


def test_near_needs_datasketch_and_other_mistakes(tmp_path, tokenizer_folder, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [story(i) for i in range(5)])
    for filters, words in (
        (Filters(quality=("goffer",)), "quality=goffer: choose from gopher, gopher_repetition, c4"),
        (Filters(dedupe="maybe"), "dedupe=maybe"),
        (Filters(quality=("gopher",)), "leave out all 5 documents; most often"),
        (Filters(decontaminate=(str(tmp_path / "none.txt"),)), "none.txt cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            small([path], tmp_path / "set", tokenizer_folder, filters=filters)
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(
        UserError, match=r"dedupe=near needs the package datasketch: pip install 'llada_jax\[filters\]'"
    ):
        small([path], tmp_path / "set", tokenizer_folder, filters=Filters("near"))
    assert not (tmp_path / "set").exists()


def test_languages_and_near_duplicates_in_a_set(tmp_path, tokenizer_folder):
    pytest.importorskip("py3langid", reason="py3langid is not installed")
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    german = "Der kleine Fuchs lief am Fluss entlang und sang ein Lied von den gr\u00fcnen Bergen und dem M\u00e4dchen."
    texts = [PROSE, german, PROSE.replace("quiet", "small"), story(1, words=100), PROSE, story(2, words=100)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    filters = Filters("near", languages=("en",))
    (source,) = small([path], tmp_path / "set", tokenizer_folder, filters=filters).filtered.sources
    assert source.removed == {"another language": 1, NEAR: 1, EXACT: 1}
    with pytest.raises(UserError, match="languages=xx: py3langid knows .*, en, "):
        Filters(languages=("xx",)).checked()
