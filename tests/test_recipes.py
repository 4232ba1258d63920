import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llada_jax import recipes
from llada_jax.recipes import RECIPES


def test_published_settings_of_some():
    block8 = RECIPES["gsm8k-instruct-block8"]
    assert (block8.gen_length, block8.block_length, block8.steps, block8.tasks) == (256, 8, 256, ("gsm8k",))
    assert block8.apply_chat_template and not block8.confidence_eos_eot_inf and "78.6" in block8.published
    assert RECIPES["truthfulqa-base"].cfg_scale == 2.0 and RECIPES["truthfulqa-base"].num_fewshot == 0
    base = RECIPES["gsm8k-base"]
    assert base.gen_length == base.block_length == base.steps == 1024 and base.num_fewshot is None
    assert RECIPES["humaneval-instruct"].logits_eos_inf and RECIPES["mmlu-instruct"].gen_length == 3


def test_settings_are_those_of_an_evaluation():
    from llada_jax.evaluation import Evaluation

    fields = {field.name for field in dataclasses.fields(Evaluation)}
    for recipe in RECIPES.values():
        assert recipe.settings().keys() <= fields and None not in recipe.settings().values()
    assert RECIPES["gsm8k-base"].settings()["steps"] == 1024
    assert "steps" not in RECIPES["arc-c-base"].settings()


def test_lm_eval_has_the_tasks():
    folder = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    text = "\n".join(path.read_text(errors="replace") for path in folder.glob("**/*.yaml"))
    named = set(re.findall(r"^(?:task|group|tag): *[\"']?([\w-]+)", text, re.MULTILINE))
    named |= set(re.findall(r"^tag:\n *- *([\w-]+)", text, re.MULTILINE))
    for recipe in RECIPES.values():
        assert set(recipe.tasks) - {"reversal"} <= named, recipe.name


def test_the_list_needs_neither_jax_nor_a_model():
    table = recipes.table()
    assert all(name in table for name in RECIPES) and max(map(len, table.splitlines())) < 220
    code = (
        "import sys\nfrom llada_jax import command_line, evaluate\ntry:\n    command_line.run(evaluate.main)\n"
        "finally:\n    assert 'jax' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    listed = subprocess.run([sys.executable, "-c", code, "--list"], capture_output=True, text=True, check=False)
    assert (listed.returncode, listed.stdout) == (0, table + "\n"), listed.stderr
    flags = ["--model=.", "--output=a.json", "--recipe=gsm8k"]
    wrong = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--recipe=gsm8k: there is none" in wrong.stderr
