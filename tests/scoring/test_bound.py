"""Tests the bound of Eq. 6: exact masks, no bias against enumeration, equal results in every run and on every mesh."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

from llada_jax.config import ValidationConfig
from llada_jax.data.rows import HeldOut
from llada_jax.devices import mesh
from llada_jax.diffusion import forward
from llada_jax.model.transformer import split
from llada_jax.scoring import bound


def draw_masks(length, masked, count, width=6):
    keys = forward.row_keys(forward.step_key(0, 0), jnp.arange(count))
    full = lambda n: jnp.full(count, n, jnp.int32)  # noqa: E731
    return np.asarray(jax.jit(bound.exact_mask, static_argnums=3)(keys, full(length), full(masked), width))


@pytest.mark.parametrize(("length", "masked"), [(6, 3), (6, 1), (6, 6), (4, 2), (1, 1)])
def test_exact_mask_is_uniform_over_subsets(length, masked):
    """Tests that masks have the right size, avoid the padding, and are equally frequent (chi-squared test at 0.1 %)."""
    count = 12000
    mask = draw_masks(length, masked, count)
    assert (mask.sum(axis=1) == masked).all() and not mask[:, length:].any()
    numbers = (mask << np.arange(6)).sum(axis=1)
    subsets = [sum(1 << i for i in c) for c in itertools.combinations(range(length), masked)]
    assert set(numbers) == set(subsets)
    counts, expected = np.bincount(numbers, minlength=64)[subsets], count / len(subsets)
    degrees = len(subsets) - 1
    assert ((counts - expected) ** 2 / expected).sum() <= degrees + 3.1 * math.sqrt(2 * degrees) + 5


def test_exact_mask_of_rows_of_all_lengths(rng):
    length = rng.integers(1, 40, 200).astype(np.int32)
    masked = (length * rng.uniform(size=200)).astype(np.int32)
    keys = forward.row_keys(forward.step_key(0, 1), jnp.arange(200))
    mask = np.asarray(bound.exact_mask(keys, length, masked, 40))
    np.testing.assert_array_equal(mask.sum(axis=1), masked)
    assert not (mask & (np.arange(40) >= length[:, None])).any()


def eq_6(nll):
    """Computes the expectation of L / l * sum of nll over l ~ U{1..L} and all subsets of size l by enumeration."""
    length = nll.shape[1]
    total = 0.0
    for size in range(1, length + 1):
        sums = [sum(nll[sum(1 << i for i in s)][list(s)]) for s in itertools.combinations(range(length), size)]
        total += length / size * np.mean(sums) / length
    return total


def run_bound(toy, device_mesh, rows, key, first_row=0):
    """Computes the bound for `rows` rows, every fourth of which is short, and returns it with their lengths."""
    with jax.set_mesh(device_mesh):
        graphdef, params = split(toy.model)
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.typeof(x).sharding.spec), params)
        length = np.where(np.arange(rows) % 4 == 3, 3, 6).astype(np.int32)
        tokens = np.where(np.arange(6) < length[:, None], toy.x_0, 7).astype(np.int32)
        row = np.arange(first_row, first_row + rows, dtype=np.int32)
        placed = mesh.place_rows(tokens, length, np.zeros_like(length), row)
        nats = bound.bound(graphdef, params, *placed, key, chunk=512, mask_id=toy.config.mask_id)
        return np.asarray(nats, np.float64), length


def test_bound_is_unbiased(toy, make_mesh):
    """Compares the bound with the enumeration of every l and every subset, for rows with and without padding."""
    values = {6: [], 3: []}
    for sample in range(10):
        nats, length = run_bound(toy, make_mesh(2, 2, 2), 2048, jax.random.fold_in(jax.random.key(5), sample))
        for n, seen in values.items():
            seen.append(nats[length == n])
    for n, seen in values.items():
        seen, exact = np.concatenate(seen), eq_6(toy.nll[n])
        error = seen.std() / math.sqrt(len(seen))
        assert error < 0.005 * exact
        assert abs(seen.mean() - exact) < 3.5 * error


def test_bound_of_an_answer_is_unbiased(toy, make_mesh):
    """Compares the bound of Eq. 14, where the prompt is never masked, with the enumeration of the answer's subsets."""
    prompts, rows = (2, 3, 5), 3072
    prompt = np.array(prompts, np.int32)[np.arange(rows) % 3]
    tokens = np.tile(np.r_[toy.x_0, 7].astype(np.int32), (rows, 1))
    values = {n: [] for n in prompts}
    with jax.set_mesh(make_mesh(2, 2, 2)):
        graphdef, params = split(toy.model)
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.typeof(x).sharding.spec), params)
        placed = mesh.place_rows(tokens, np.full(rows, 6, np.int32), prompt, np.arange(rows, dtype=np.int32))
        for sample in range(4):
            key = jax.random.fold_in(jax.random.key(8), sample)
            nats = np.asarray(bound.bound(graphdef, params, *placed, key, chunk=512, mask_id=15), np.float64)
            for n, seen in values.items():
                seen.append(nats[prompt == n])
    for n, seen in values.items():
        seen = np.concatenate(seen)
        exact = eq_6(toy.nll[6][np.arange(2 ** (6 - n)) << n][:, n:])
        error = seen.std() / math.sqrt(len(seen))
        assert error < 0.01 * exact
        # An answer of one token has no sampling error, but its rounding.
        assert abs(seen.mean() - exact) < 3.5 * error + rounding.of_nll(toy.config, 7) * exact


def test_every_number_of_masked_tokens_is_drawn_alike(toy, monkeypatch, make_mesh):
    """Tests that l covers 1..L evenly over the rows of a batch, far more evenly than independent draws would."""
    # With nll = 1 / weight ** 2 the sum of a row reveals l: l * (L / l) / (L / l) ** 2 = l ** 2 / L.
    telling = lambda h, head, targets, weight, chunk: (0.0, jnp.where(weight > 0, weight**-2.0, 0.0))  # noqa: E731
    monkeypatch.setattr(bound, "linear_cross_entropy", telling)
    nats, length = run_bound(toy, make_mesh(), 1200, jax.random.key(0), first_row=7)
    masked = np.sqrt(nats * length)
    # A sum over at most 6 tokens of what two quotients and a square give, then a product and a root.
    np.testing.assert_allclose(masked, masked.round(), rtol=rounding.of_chain(6, roundings=6))
    for n, rows in ((3, 300), (6, 900)):
        counts = np.bincount(masked[length == n].round().astype(int), minlength=n + 1)
        assert counts[0] == 0 and len(counts) == n + 1
        assert np.abs(counts[1:] - rows / n).max() <= 8


def held_out(toy, count):
    length = np.where(np.arange(count) % 5 == 2, 3, 6).astype(np.int32)
    tokens = np.where(np.arange(6) < length[:, None], (toy.x_0 + np.arange(count)[:, None]) % 14, 7).astype(np.int32)
    return HeldOut(tokens, length, np.zeros_like(length), 2 * length.astype(np.int64))


def validate(toy, device_mesh, rows, batch_size, **settings):
    with jax.set_mesh(device_mesh):
        graphdef, params = split(toy.model)
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.typeof(x).sharding.spec), params)
        config = ValidationConfig(**settings)
        return bound.validate(graphdef, params, rows, config, batch_size=batch_size, chunk=64, mask_id=15)


def test_validation_is_the_same_number_again_and_anywhere(toy, make_mesh):
    rows = held_out(toy, 21)  # the last batch of 8 is not full
    first = validate(toy, make_mesh(), rows, 8)
    assert validate(toy, make_mesh(), rows, 8) == first  # bitwise equal
    for device_mesh, batch_size in ((make_mesh(), 32), (make_mesh(2, 2, 2), 8)):
        other = validate(toy, device_mesh, rows, batch_size)
        assert other["nats_per_token"] == pytest.approx(first["nats_per_token"], rel=rounding.FIRST_STEP)
    assert validate(toy, make_mesh(), rows, 8, seed=1)["nats_per_token"] != first["nats_per_token"]


def test_validation_is_the_mean_of_its_bounds(toy, make_mesh):
    """Tests that every row counts once, that the mean is over all tokens, and that samples of a row differ in noise."""
    tokens, length, prompt, size = rows = held_out(toy, 13)
    got = validate(toy, make_mesh(), rows, 8, samples=3, seed=9)
    with jax.set_mesh(make_mesh()):
        graphdef, params = split(toy.model)
        placed = mesh.place_rows(tokens, length, prompt, np.arange(13, dtype=np.int32))
        keys = [jax.random.fold_in(jax.random.key(9), sample) for sample in range(3)]
        bounds = [
            np.asarray(bound.bound(graphdef, params, *placed, key, chunk=64, mask_id=15), np.float64) for key in keys
        ]
    assert not np.allclose(bounds[0], bounds[1])
    nats, tolerance = np.mean([b.sum() for b in bounds]) / length.sum(), rounding.of_nll(toy.config, 6, 3 * 13)
    assert got["nats_per_token"] == pytest.approx(nats, rel=tolerance)
    assert got["perplexity"] == pytest.approx(math.exp(nats), rel=nats * tolerance)
    assert got["bits_per_byte"] == pytest.approx(nats * length.sum() / math.log(2) / size.sum(), rel=tolerance)


def test_validation_of_answers_counts_their_tokens_alone(toy, make_mesh):
    rows = held_out(toy, 11)
    rows = rows._replace(prompt_N=np.where(np.arange(11) % 2, 1, 2).astype(np.int32))
    got = validate(toy, make_mesh(), rows, 8)
    with jax.set_mesh(make_mesh()):
        graphdef, params = split(toy.model)
        placed = mesh.place_rows(*rows[:3], np.arange(11, dtype=np.int32))
        key = jax.random.fold_in(jax.random.key(0), 0)
        nats = np.asarray(bound.bound(graphdef, params, *placed, key, chunk=64, mask_id=15), np.float64).sum()
    tolerance = rounding.of_nll(toy.config, 6, 11)
    assert got["nats_per_token"] == pytest.approx(nats / (rows.length_N - rows.prompt_N).sum(), rel=tolerance)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / rows.bytes_N.sum(), rel=tolerance)


def test_rows_without_bytes_do_not_divide_by_zero(toy, make_mesh):
    got = validate(toy, make_mesh(), held_out(toy, 3)._replace(bytes_N=np.zeros(3, np.int64)), 8)
    assert all(math.isfinite(value) for value in got.values())
