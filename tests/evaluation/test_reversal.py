import json
import math

import bench
import jax
import pytest

import llada_jax
from llada_jax.config import UserError
from llada_jax.evaluation import reversal
from llada_jax.evaluation.reversal import Couplet, read_couplets
from llada_jax.sampling.text_completion import Options

COUPLETS = [Couplet("窈窕淑女", "君子好逑"), Couplet("如切如磋", "如琢如磨"), Couplet("一日不见", "如三秋兮")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return llada_jax.load(bench.write_model(tmp_path_factory.mktemp("model") / "m"))


class Poet:
    """Replaces the sampler. It knows the second line of all couplets, but the first line only of the first couplet."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __call__(self, model, tokenizer, prompts, options, key, batch_size):
        self.asked.append(([list(prompt) for prompt in prompts], options))
        return [self.answer(tokenizer.decode(prompt)) for prompt in prompts]

    def answer(self, prompt):
        if "[MASK]" in prompt:
            gap = max(prompt.split("[MASK]"), key=len)
            couplet = next(c for c in COUPLETS if c.first in gap or c.second in gap)
            return f"{couplet.first}，{couplet.second}。" if couplet is not COUPLETS[1] else "如切如磋，如磨如琢。"
        if "下一句" in prompt:
            couplet = next(c for c in COUPLETS if c.first in prompt)
            return couplet.second + "。" if couplet is not COUPLETS[2] else f"是“{couplet.second}”"
        return "“窈窕淑女”" if "君子好逑" in prompt else "不知道"


def test_known_answers(monkeypatch, loaded):
    model, tokenizer = loaded
    poet, told = Poet(tokenizer), {}
    monkeypatch.setattr(reversal, "complete_ids", poet)
    found = reversal.evaluate(model, tokenizer, COUPLETS, Options(temperature=0.5), jax.random.key(0),
                              report=told.__setitem__)  # fmt: skip
    wanted = {"reversal_forward": 2 / 3, "reversal_backward": 1 / 3}
    wanted |= {"reversal_forward_infill": 2 / 3, "reversal_backward_infill": 2 / 3}
    assert {task: figures["exact_match,none"] for task, figures in found.items()} == pytest.approx(wanted)
    assert found["reversal_forward"]["contains,none"] == 1.0 and "contains,none" not in found["reversal_forward_infill"]
    for figures in found.values():
        rate = figures["exact_match,none"]
        assert figures["exact_match_stderr,none"] == pytest.approx(math.sqrt(rate * (1 - rate) / 3))
        assert figures["sample_len"] == 3
    assert told["reversal_backward"][0] == ("君子好逑", "窈窕淑女", "“窈窕淑女”")

    forward, backward, fill_forward, fill_backward = poet.asked
    assert tokenizer.decode(forward[0][0]) == "窈窕淑女的下一句是什么？ 直接输出句子即可。\n"
    assert tokenizer.decode(backward[0][0]) == "君子好逑的上一句是什么？ 直接输出句子即可。\n"
    assert forward[1] == Options(gen_length=28, temperature=0.5)
    assert fill_forward[1].gen_length == 0 and fill_forward[1].temperature == 0.5
    masks = "[MASK]" * len(tokenizer.encode("君子好逑", continuation=True))
    assert tokenizer.decode(fill_forward[0][0]) == f"窈窕淑女，{masks}。"
    masks = "[MASK]" * len(tokenizer.encode("窈窕淑女"))
    assert tokenizer.decode(fill_backward[0][0]) == f"{masks}，君子好逑。"
    assert tokenizer.mask_id in fill_backward[0][0]


def test_through_the_chat_template(monkeypatch, loaded):
    model, tokenizer = loaded
    poet = Poet(tokenizer)
    monkeypatch.setattr(reversal, "complete_ids", poet)
    options = Options(gen_length=12, block_length=4)
    reversal.evaluate(model, tokenizer, COUPLETS[:1], options, jax.random.key(0), chat=True)
    (prompt,), used = poet.asked[0]
    assert prompt == tokenizer.encode_chat([{"role": "user", "content": "窈窕淑女的下一句是什么？ 直接输出句子即可。"}])
    assert used == options


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "not a JSON list"),
        ("{}", "no couplet in it"),
        ('[{"first": "a"}]', "not a JSON list of .*second"),
        ('[{"first": "a", "second": 3}]', "not a JSON list"),
        ('[{"first": "a", "second": " "}]', "an empty line"),
        ("[3]", "not a JSON list"),
        ("[" * 100_000, "not a JSON list.*nested too deeply"),
        ('[{"first": "\\ud800", "second": "a"}]', "not a JSON list.*half a character"),
    ],
)
def test_data_that_is_none(tmp_path, content, words):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_couplets(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_couplets(tmp_path / "none.json")
    path.write_text(json.dumps([{"first": "a ", "second": "b", "source": "c"}]))
    assert read_couplets(path) == [Couplet("a", "b")]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_couplets(path) == [Couplet("a", "b")]
    path.write_bytes(b"[\n\xff]")
    with pytest.raises(UserError, match=f"{path} is not text in UTF-8: line 2"):
        read_couplets(path)


def test_what_the_tokenizer_puts_in_front_of_a_text(monkeypatch, loaded):
    model, tokenizer = loaded
    prompts = {}
    for prefix in ((), (tokenizer.bos_id,)):
        poet = Poet(tokenizer)
        bos = tokenizer.decode([tokenizer.bos_id])
        poet.answer = lambda prompt, poet=poet, bos=bos: Poet.answer(poet, prompt.removeprefix(bos))
        monkeypatch.setattr(tokenizer, "prefix", prefix)
        monkeypatch.setattr(reversal, "complete_ids", poet)
        found = reversal.evaluate(model, tokenizer, COUPLETS[:1], Options(), jax.random.key(0))
        prompts[prefix] = [given for given, _ in poet.asked]
        assert found["reversal_backward_infill"]["exact_match,none"] == 1.0
    assert prompts[tokenizer.bos_id,] == [[[tokenizer.bos_id, *ids]] for (ids,) in prompts[()]]
