import jax
import numpy as np
import pytest
from small_sampler import make_model, settings

import llada_jax
from llada_jax.config import UserError
from llada_jax.sampling.sampler import denoise
from llada_jax.sampling.warming import pad, warm_up


def test_after_warming_up_nothing_is_compiled(make_mesh):
    model, widths = make_model(make_mesh(), sharpness=12), (8, 16)
    config = settings(commit="threshold", gen_length=8)
    llada_jax.warm_up(model, config, widths, batch_size=2)
    before = denoise._cache_size()
    lengths = ((3, 5), (7, 7), (8, 2), (15, 0))
    outputs = {}
    for pair in lengths:
        prompts = [list(range(1, length + 1)) for length in pair]
        prompt_BT, real_BT = pad(prompts, widths)
        assert prompt_BT.shape == (2, 8 if max(pair) < 8 else 16)
        other = settings(commit="threshold", gen_length=8, commit_bound=0.5)
        outputs[pair] = np.asarray(llada_jax.generate(model, prompt_BT, other, jax.random.key(0), real_BT))
    assert denoise._cache_size() == before
    # A row has the same text in any width.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(2))
    alone_BT = llada_jax.generate(model, np.arange(1, 9)[None], other, keys[:1])
    np.testing.assert_array_equal(outputs[8, 2][0, 8:], alone_BT[0])
    before = denoise._cache_size()
    warm_up(model, config, [32], batch_size=2)
    assert denoise._cache_size() == before + 1


def test_a_prompt_that_is_too_long_is_told():
    with pytest.raises(UserError, match="16 tokens: it must have fewer than the largest width, 16"):
        pad([[1] * 16], (8, 16))
    with pytest.raises(UserError, match="there is no width"):
        pad([[1]], ())


def test_no_prompt_for_warming_up_contains_mask(make_mesh):
    model = make_model(make_mesh())
    config = settings(commit="threshold", gen_length=4, length="daedal", eos_id=5, mask_id=0)
    warm_up(model, config, [8])  # with MASK in a prompt, this length would be refused
