import subprocess
import sys

import numpy as np
import pytest

from llada_jax.data.prepare.pool import Batch, Pool, tokenize
from llada_jax.data.prepare.text import PIECE_CHARACTERS
from llada_jax.text.tokenizer import load_tokenizer

from .conftest import story


def batches(count: int):
    for i in range(count):
        yield Batch([story(3 * i + j) for j in range(3)], [False, True, False], tag=i)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(tokenizer_folder, workers):
    tokenizer = load_tokenizer(tokenizer_folder)
    with Pool(tokenizer_folder, workers) as pool:
        results = list(pool.map(batches(20)))
    assert [batch.tag for batch, _ in results] == list(range(20))
    for batch, tokens in results:
        expected = tokenize(tokenizer, tokenizer.token_bytes(), batch)
        assert tokens.ids.tolist() == expected.ids.tolist()
        assert tokens.bytes.tolist() == expected.bytes.tolist()
        assert tokens.lengths == expected.lengths


def test_reads_only_a_few_batches_ahead(tokenizer_folder):
    taken = []

    def source():
        for batch in batches(50):
            taken.append(batch.tag)
            yield batch

    with Pool(tokenizer_folder, 2) as pool:
        results = pool.map(source())
        for i in range(10):
            assert next(results)[0].tag == i
            assert len(taken) <= i + 1 + 4


def test_bytes_add_up_whatever_the_tokenizer_does(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    texts = [story(1), "x", "", "\u00e9 \U0001f600"]
    for counts in (tokenizer.token_bytes(), np.zeros(tokenizer.size, np.int32), 3 * tokenizer.token_bytes() + 1):
        tokens = tokenize(tokenizer, counts, Batch(texts, [False] * 4))
        start = 0
        for text, length in zip(texts, tokens.lengths, strict=True):
            assert tokens.bytes[start : start + length].sum() == len(text.encode())
            start += length


@pytest.mark.parametrize("kind", ["tokenizer_folder", "prefixing_model"])
def test_long_text_is_one_text(request, kind):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    text = "".join(story(i, words=400) for i in range(30))
    assert len(text) > 3 * PIECE_CHARACTERS
    tokens = tokenize(tokenizer, tokenizer.token_bytes(), Batch([text, "x"], [False, False]))
    assert tokenizer.decode(tokens.ids[: tokens.lengths[0]]) == text
    assert tokens.bytes[: tokens.lengths[0]].sum() == len(text.encode())


def test_worker_that_fails_or_dies(tokenizer_folder):
    bad = Batch(["\ud800"], [False])
    for workers in (1, 2):
        with Pool(tokenizer_folder, workers) as pool, pytest.raises((RuntimeError, UnicodeEncodeError)):
            list(pool.map([bad]))
    with Pool(tokenizer_folder, 2) as pool:
        results = pool.map(batches(30))
        next(results)
        for process in pool._processes:
            process.kill()
        with pytest.raises(RuntimeError, match="tokenisation process died"):
            list(results)


def test_closing_in_the_middle_ends_the_processes(tokenizer_folder):
    pool = Pool(tokenizer_folder, 2)
    processes = list(pool._processes)
    results = pool.map(batches(1000))
    next(results)
    pool.close()
    assert all(process.poll() is not None for process in processes)


def test_a_worker_needs_no_jax():
    script = (
        "import sys, llada_jax.prepare, llada_jax.data.prepare.pool; "
        "sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
