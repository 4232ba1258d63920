from llada_jax.data.prepare import stdlib
from llada_jax.data.prepare.text import Corpus


def test_sources_of_this_interpreter():
    files = stdlib.source_files()
    names = [file.name for file in files]
    assert {"argparse.py", "dataclasses.py", "textwrap.py"} <= set(names)
    assert not any(name.startswith("test_") for name in names)
    assert not any({"tests", "test", "site-packages", "pydoc_data"} & set(file.parts) for file in files)
    assert files == stdlib.source_files()
    assert sum(file.stat().st_size for file in files) > 5_000_000


def test_each_file_is_one_document():
    corpus = Corpus(["stdlib"])
    pieces = list(corpus)
    assert all(piece.last for piece in pieces)
    assert corpus.file_count(0) >= len(pieces) > 400
    assert any("def dedent(" in piece.text for piece in pieces)


def test_file_in_no_valid_encoding(tmp_path):
    (tmp_path / "a.py").write_bytes(b"# coding: nonsense\n")
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "c.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    assert stdlib.read_source(tmp_path / "a.py") == ""
    assert stdlib.read_source(tmp_path / "b.py") == ""
    assert stdlib.read_source(tmp_path / "c.py").endswith("'\u00e9'\n")
