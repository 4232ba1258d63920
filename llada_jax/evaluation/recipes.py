"""Holds the published settings of LLaDA for each benchmark by name: python -m llada_jax.evaluate --recipe=NAME

The settings come from arXiv 2502.09992 (Sections 3.2 and 3.3, Tables 1, 2 and 4), and from EVAL.md and the scripts of
the authors' repository. The authors measured the base model with lm-evaluation-harness (lm_eval), so the tasks for the
base model are the same here. They did not measure the instruct models with lm_eval. Their figures for these models
come from an internal toolkit, and from OpenCompass, whose figures differ by up to 2.4 points. The recipes for the
instruct models name the most similar tasks of lm_eval, which have their own prompts and their own way to extract
answers. It is not known how far their scores can be compared with the published ones: according to an earlier EVAL.md,
lm_eval gave LLaMA3-8B-Instruct 11 to 23 points less than the internal toolkit on MMLU-Pro, GSM8K and HumanEval.
"""

import dataclasses
from collections.abc import Mapping

from llada_jax.config import UserError
from llada_jax.sampling import lengths


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One benchmark as the authors ran it. None means that they give no value, or that the task does not use it."""

    name: str
    tasks: tuple[str, ...]  # names of lm_eval tasks
    published: str  # the published score in percent, and further published scores by name
    source: str  # the tool that measured the score, and the document that states it
    num_fewshot: int | None = None  # None means the number that the task itself sets
    apply_chat_template: bool = False
    # Settings of likelihoods.
    mc_samples: int | None = None
    # Settings of generation, which takes one step per token.
    gen_length: int | None = None
    block_length: int | None = None  # None means a single block of gen_length tokens
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    # Settings of both.
    cfg_scale: float = 0.0

    def settings(self, given: Mapping[str, object] | None = None) -> dict[str, object]:
        """Returns the recipe's settings, named like the flags of `evaluate.py`, with the user's values in their place.

        The number of steps is not among them, because `evaluate.py` takes one step per token by default, for any
        gen_length.

        Args:
          given: The settings that the user has set. They override the recipe's settings of the same names.

        Raises:
          UserError: If the length is not fixed, but nobody says how long blocks are.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own = {k: v for k, v in own.items() if k not in ("name", "tasks", "published", "source") and v is not None}
        merged = own | dict(given or {})
        if self.block_length is None and self.gen_length is not None:
            if merged.get("length", lengths.FIXED) != lengths.FIXED and "block_length" not in merged:
                raise UserError(
                    f"--recipe={self.name} has one block of all tokens: with --length={merged['length']}, "
                    "pass --block_length=N as well"
                )
            merged.setdefault("block_length", merged["gen_length"])
        return merged


_LM_EVAL = "lm_eval (EVAL.md, Table 1)"
_INTERNAL = "internal toolkit (EVAL.md)"


def _likelihood(name: str, task: str, published: str, shots: int, cfg_scale: float = 0.0, samples: int = 128) -> Recipe:
    """Makes a recipe that scores the base model by the likelihood of the answers."""
    source = "lm_eval (EVAL.md, Table 1)"
    return Recipe(
        f"{name}-base", (task,), published, source, num_fewshot=shots, mc_samples=samples, cfg_scale=cfg_scale
    )


def _generation(name: str, task: str, published: str) -> Recipe:
    """Makes a recipe that generates with the base model: one block of 1024 tokens, as many examples as the task has."""
    return Recipe(f"{name}-base", (task,), published, _LM_EVAL, gen_length=1024)


def _instruct(
    name: str, task: str, published: str, length: int, block: int | None = None, *, source: str = _INTERNAL, **settings
) -> Recipe:
    """Makes a recipe that generates with an instruct model, in one block unless `block` is set."""
    settings |= {"gen_length": length, "block_length": block}
    return Recipe(name, (task,), published, source, apply_chat_template=True, **settings)


def _table2(name: str, task: str, published: str, length: int, shots: int | None, **settings) -> Recipe:
    """Makes a recipe for LLaDA-8B-Instruct with pure diffusion, which means a single block."""
    source = "internal toolkit (Table 2, EVAL.md)"
    return _instruct(f"{name}-instruct", task, published, length, source=source, num_fewshot=shots, **settings)


_LATE_END = {"confidence_eos_eot_inf": True}
_NO_END = {"logits_eos_inf": True}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # LLaDA-8B-Base, scored by likelihood. The score without guidance is the one in Table 1 of the paper.
        _likelihood("arc-c", "arc_challenge", "47.9; without guidance 45.9", 0, 0.5),
        _likelihood("hellaswag", "hellaswag", "72.5; without guidance 70.5", 0, 0.5),
        _likelihood("truthfulqa", "truthfulqa_mc2", "46.4; without guidance 46.1", 0, 2.0),
        _likelihood("winogrande", "winogrande", "74.8", 5),
        _likelihood("piqa", "piqa", "74.4; without guidance 73.6", 0, 0.5),
        _likelihood("gpqa", "gpqa_main_n_shot", "26.1; without guidance 25.2", 5, 0.5),
        # One sample is enough, because the answers are single letters.
        _likelihood("mmlu", "mmlu", "65.9", 5, samples=1),
        _likelihood("cmmlu", "cmmlu", "69.9", 5, samples=1),
        _likelihood("ceval", "ceval-valid", "70.5", 5, samples=1),
        # LLaDA-8B-Base, scored by generation. The authors' script sets no number of examples, so they used the number
        # of lm_eval's task. It agrees with Table 1 for BBH (3), MATH (4) and HumanEval (0), but it is 5 for GSM8K and
        # 3 for MBPP, where Table 1 says 4.
        _generation("bbh", "bbh", "49.7"),
        _generation("gsm8k", "gsm8k", "70.3"),
        _generation("math", "minerva_math", "31.4"),
        _generation("humaneval", "humaneval", "35.4"),
        _generation("mbpp", "mbpp", "40.0"),
        # LLaDA-8B-Instruct with pure diffusion, and in blocks where blocks are better. The numbers of examples are
        # those of Table 2, except for MBPP: Table 2 has 4 examples, but lm_eval's task has only 3.
        _table2("mmlu", "mmlu_generative", "65.5; OpenCompass 65.4", 3, 5),
        _table2("mmlu-pro", "mmlu_pro", "37.0; OpenCompass 36.6", 256, 0),
        _table2("arc-c", "arc_challenge_chat", "88.5; OpenCompass 89.2", 512, 0),
        _table2("gsm8k", "gsm8k", "69.4; OpenCompass 68.8", 512, 4, **_LATE_END),
        _table2("math", "minerva_math", "31.9; OpenCompass 29.6", 512, 0, **_LATE_END),
        _table2("gpqa", "gpqa_main_generative_n_shot", "33.3; OpenCompass 32.3", 64, 5, **_LATE_END),
        _table2("humaneval", "humaneval_instruct", "49.4; OpenCompass 47.0", 512, 0, **_NO_END),
        _table2("mbpp", "mbpp_instruct", "41.0; OpenCompass 39.6", 256, None, **_LATE_END),
        # Section 3.2 compares these scores with Table 2 and states no other number of examples.
        _instruct("gsm8k-instruct-block8", "gsm8k", "78.6; OpenCompass 78.9", 256, 8, num_fewshot=4),
        _instruct("math-instruct-block64", "minerva_math", "42.2; OpenCompass 42.7", 512, 64, num_fewshot=0),
        # LLaDA 1.5 (arXiv 2505.19223). The numbers of examples are not confirmed.
        _instruct("gsm8k-1.5", "gsm8k", "83.8; OpenCompass 83.6", 256, 16, **_LATE_END),
        _instruct("math-1.5", "minerva_math", "42.6; OpenCompass 42.3", 1024, 128, **_LATE_END),
        _instruct("gpqa-1.5", "gpqa_main_generative_n_shot", "36.9; OpenCompass 34.8", 256, 16),
        _instruct("humaneval-1.5", "humaneval_instruct", "52.4; OpenCompass 51.2", 512, 32, **_LATE_END),
        _instruct("mbpp-1.5", "mbpp_instruct", "42.8; OpenCompass 42.6", 512, 32, **_LATE_END),
        _instruct("ifeval-1.5", "ifeval", "66.2; OpenCompass 65.2", 256, 16, **_LATE_END),
        # The couplet test (Section 3.3), see `reversal.py`. The first version of the paper had 48.8 and 42.4.
        _instruct("reversal-instruct", "reversal", "51.8 forward, 45.6 in reverse", 28, source="Table 4", **_NO_END),
    )
}


def table() -> str:
    """Returns all recipes as a table for people to read, followed by notes."""
    head = ("recipe", "tasks", "shots", "gen_length", "block_length", "cfg_scale", "mc_samples", "besides", "published")
    rows = [(*head, "by")]
    for r in RECIPES.values():
        besides = ("apply_chat_template", "logits_eos_inf", "confidence_eos_eot_inf")
        rows.append((
            r.name,
            ",".join(r.tasks),
            "task's" if r.num_fewshot is None else str(r.num_fewshot),
            str(r.gen_length or "-"),
            str(r.block_length or r.gen_length or "-"),
            f"{r.cfg_scale:g}",
            str(r.mc_samples or "-"),
            " ".join(name for name in besides if getattr(r, name)) or "-",
            r.published,
            r.source,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_NOTES])


_NOTES = (
    "All recipes generate one token per step. shots is the number of examples in front of each question; task's means",
    "the number that lm_eval's task sets itself.",
    "published is the score in percent of LLaDA-8B-Base (-base), LLaDA-8B-Instruct (-instruct) or LLaDA 1.5 (-1.5).",
    "by is the tool that measured it, and the place that states it (a table of arXiv 2502.09992, or EVAL.md of the",
    "authors' repository).",
    "Not confirmed: whether the tasks of the -instruct and -1.5 recipes ask in the same way as the authors, who did",
    "not use lm_eval for them (the recipes name the most similar task; on MMLU-Pro, GSM8K and HumanEval the authors",
    "got much lower scores from lm_eval for LLaMA3-8B-Instruct); the shots of the -1.5 recipes; whether the shots of",
    "Table 2 also hold for the -block recipes.",
    "Known differences: Table 1 has 4 shots for gsm8k-base and mbpp-base, but the authors' lm_eval command uses the",
    "tasks' own 5 and 3. Table 2 has 4 shots for mbpp-instruct, but lm_eval's task has only 3 examples.",
    'minerva_math needs pip install "lm-eval[math]", and ifeval needs pip install "lm-eval[ifeval]".',
    "humaneval and mbpp run code that the model writes: they need --confirm_run_unsafe_code, and the environment",
    "variable HF_ALLOW_CODE_EVAL=1.",
)
