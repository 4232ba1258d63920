import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llada_jax.config import UserError
from llada_jax.evaluation import recipes
from llada_jax.evaluation.recipes import RECIPES


def test_published_settings_of_some():
    block8 = RECIPES["gsm8k-instruct-block8"]
    assert (block8.gen_length, block8.block_length, block8.num_fewshot, block8.tasks) == (256, 8, 4, ("gsm8k",))
    assert block8.apply_chat_template and not block8.confidence_eos_eot_inf and "78.6" in block8.published
    assert RECIPES["truthfulqa-base"].cfg_scale == 2.0 and RECIPES["truthfulqa-base"].num_fewshot == 0
    base = RECIPES["gsm8k-base"]
    assert base.gen_length == 1024 and base.block_length is None and base.num_fewshot is None
    assert RECIPES["humaneval-instruct"].logits_eos_inf and RECIPES["mmlu-instruct"].gen_length == 3
    shots = {name: RECIPES[f"{name}-instruct"].num_fewshot for name in ("mmlu", "mmlu-pro", "gsm8k", "math", "gpqa")}
    assert shots == {"mmlu": 5, "mmlu-pro": 0, "gsm8k": 4, "math": 0, "gpqa": 5}


def test_settings_are_those_of_an_evaluation():
    from llada_jax.evaluation.run import Evaluation

    fields = {field.name for field in dataclasses.fields(Evaluation)}
    for recipe in RECIPES.values():
        assert recipe.settings().keys() <= fields and None not in recipe.settings().values()
        assert "steps" not in recipe.settings(), "the default is one step per token, for any gen_length"
        assert recipe.source and recipe.published


def test_what_is_given_overrides_a_recipe():
    from llada_jax.sampling.text_completion import Options

    def sampler(name, **given):
        settings = {"steps": None, "temperature": 0.0, **RECIPES[name].settings(given)}
        options = Options(**{f.name: settings[f.name] for f in dataclasses.fields(Options) if f.name in settings})
        config = options.sampler(0, options.gen_length)
        return config.gen_length, config.block_length, config.steps

    assert sampler("gsm8k-base") == (1024, 1024, 1024)
    assert sampler("gsm8k-base", gen_length=256) == (256, 256, 256), "still one block, and one step per token"
    assert sampler("gsm8k-base", block_length=32) == (1024, 32, 1024)
    assert sampler("gsm8k-instruct-block8", gen_length=512) == (512, 8, 512)
    assert sampler("gsm8k-instruct", steps=128) == (512, 512, 128)
    assert sampler("gsm8k-base", length="append", block_length=32) == (1024, 32, 1024)
    with pytest.raises(UserError, match="gsm8k-base has one block of all tokens: with --length=append, pass --block_"):
        RECIPES["gsm8k-base"].settings({"length": "append"})
    assert RECIPES["arc-c-base"].settings({"cfg_scale": 0.0})["cfg_scale"] == 0.0
    assert "block_length" not in RECIPES["arc-c-base"].settings()


def test_lm_eval_has_the_tasks():
    folder = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    text = "\n".join(path.read_text(errors="replace") for path in folder.glob("**/*.yaml"))
    named = set(re.findall(r"^(?:task|group|tag): *[\"']?([\w-]+)", text, re.MULTILINE))
    named |= set(re.findall(r"^tag:\n *- *([\w-]+)", text, re.MULTILINE))
    for recipe in RECIPES.values():
        assert set(recipe.tasks) - {"reversal"} <= named, recipe.name


@pytest.mark.slow
def test_lm_eval_takes_their_examples():
    """Tests that the tasks accept the number of examples: their files neither set 0 nor list fixed examples."""
    folder = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    for recipe in RECIPES.values():
        if recipe.num_fewshot:
            name = re.compile(rf"^(?:task|group): *[\"']?{recipe.tasks[0]}[\"']? *$", re.MULTILINE)
            (file,) = (path for path in folder.glob("**/*.yaml") if name.search(path.read_text(errors="replace")))
            text = "".join(path.read_text() for path in (file, *file.parent.glob("_*yaml")))
            assert not re.search(r"num_fewshot.*\b0\b|list_fewshot_samples", text), recipe.name


def test_the_list_needs_neither_jax_nor_a_model():
    table = recipes.table()
    assert all(name in table for name in RECIPES) and max(map(len, table.splitlines())) < 240
    code = (
        "import sys\nfrom llada_jax import evaluate\nfrom llada_jax.cli import entry_point\ntry:\n"
        "    entry_point.run(evaluate.main)\n"
        "finally:\n    assert 'jax' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    listed = subprocess.run([sys.executable, "-c", code, "--list"], capture_output=True, text=True, check=False)
    assert (listed.returncode, listed.stdout) == (0, table + "\n"), listed.stderr
    flags = ["--model=.", "--output=a.json", "--recipe=gsm8k"]
    wrong = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert (
        wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--recipe=gsm8k: there is no recipe" in wrong.stderr
    )
