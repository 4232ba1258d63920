"""The published settings of LLaDA for each benchmark, by name: python -m llada_jax.evaluate --recipe=NAME

From arXiv 2502.09992 (Sections 3.2 and 3.3, Tables 1, 2 and 4), and from EVAL.md and the scripts of the authors'
repository. They measured the base model with lm-evaluation-harness, so the tasks are the same here. They did not
measure the instruct models with it: their figures come from an internal toolkit, and from OpenCompass, which gave
others, up to 2.4 points away. The tasks named here for those are the nearest of lm_eval's, with prompts and answer
extraction of their own. How far their scores can be compared is not known: an earlier EVAL.md tells that lm_eval gave
LLaMA3-8B-Instruct 11 to 23 points less than the toolkit on MMLU-Pro, GSM8K and HumanEval.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One benchmark as the authors ran it. None = they do not say, or it does not matter for this kind of task."""

    name: str
    tasks: tuple[str, ...]  # of lm_eval
    published: str  # score in percent, and of what
    source: str  # where that stands
    num_fewshot: int | None = None  # None = what the task itself says
    apply_chat_template: bool = False
    # Of likelihoods.
    mc_samples: int | None = None
    # Of generation, one token per step.
    gen_length: int | None = None
    block_length: int | None = None  # None = a single block, as long as gen_length
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    # Of both.
    cfg_scale: float = 0.0

    def settings(self, given: Mapping[str, object] | None = None) -> dict[str, object]:
        """Its settings by the names of the flags of evaluate.py, and in their place what the user has given.

        Steps are not among them: a step per token is what evaluate.py does by itself, for any gen_length.

        Args:
          given: by the same names, what overrides the recipe.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own = {k: v for k, v in own.items() if k not in ("name", "tasks", "published", "source") and v is not None}
        merged = own | dict(given or {})
        if self.block_length is None and self.gen_length is not None:
            merged.setdefault("block_length", merged["gen_length"])
        return merged


_LM_EVAL = "lm_eval (EVAL.md, Table 1)"
_INTERNAL = "internal toolkit (EVAL.md)"


def _likelihood(name: str, task: str, published: str, shots: int, cfg_scale: float = 0.0, samples: int = 128) -> Recipe:
    """The base model, by the likelihood of the answers."""
    source = "lm_eval (EVAL.md, Table 1)"
    return Recipe(
        f"{name}-base", (task,), published, source, num_fewshot=shots, mc_samples=samples, cfg_scale=cfg_scale
    )


def _generation(name: str, task: str, published: str) -> Recipe:
    """The base model, by what it generates: one block of 1024 tokens, as many examples as lm_eval's task has."""
    return Recipe(f"{name}-base", (task,), published, _LM_EVAL, gen_length=1024)


def _instruct(
    name: str, task: str, published: str, length: int, block: int | None = None, *, source: str = _INTERNAL, **settings
) -> Recipe:
    """An instruct model, by what it generates; one block unless told otherwise."""
    settings |= {"gen_length": length, "block_length": block}
    return Recipe(name, (task,), published, source, apply_chat_template=True, **settings)


def _table2(name: str, task: str, published: str, length: int, shots: int | None, **settings) -> Recipe:
    """LLaDA-8B-Instruct by pure diffusion, one block."""
    source = "internal toolkit (Table 2, EVAL.md)"
    return _instruct(f"{name}-instruct", task, published, length, source=source, num_fewshot=shots, **settings)


_LATE_END = {"confidence_eos_eot_inf": True}
_NO_END = {"logits_eos_inf": True}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # LLaDA-8B-Base, likelihood; the score without guidance is the one in the paper's Table 1.
        _likelihood("arc-c", "arc_challenge", "47.9; without guidance 45.9", 0, 0.5),
        _likelihood("hellaswag", "hellaswag", "72.5; without guidance 70.5", 0, 0.5),
        _likelihood("truthfulqa", "truthfulqa_mc2", "46.4; without guidance 46.1", 0, 2.0),
        _likelihood("winogrande", "winogrande", "74.8", 5),
        _likelihood("piqa", "piqa", "74.4; without guidance 73.6", 0, 0.5),
        _likelihood("gpqa", "gpqa_main_n_shot", "26.1; without guidance 25.2", 5, 0.5),
        # One sample: their answers are single letters.
        _likelihood("mmlu", "mmlu", "65.9", 5, samples=1),
        _likelihood("cmmlu", "cmmlu", "69.9", 5, samples=1),
        _likelihood("ceval", "ceval-valid", "70.5", 5, samples=1),
        # LLaDA-8B-Base, generation. Their script gives no number of examples, so lm_eval's own was used: it is that
        # of Table 1 for BBH (3), MATH (4) and HumanEval (0), but 5 for GSM8K and 3 for MBPP, where the table says 4.
        _generation("bbh", "bbh", "49.7"),
        _generation("gsm8k", "gsm8k", "70.3"),
        _generation("math", "minerva_math", "31.4"),
        _generation("humaneval", "humaneval", "35.4"),
        _generation("mbpp", "mbpp", "40.0"),
        # LLaDA-8B-Instruct: pure diffusion, and in blocks where that is better. The examples are those of Table 2,
        # which has 4 for MBPP, too: lm_eval's task knows only 3.
        _table2("mmlu", "mmlu_generative", "65.5; OpenCompass 65.4", 3, 5),
        _table2("mmlu-pro", "mmlu_pro", "37.0; OpenCompass 36.6", 256, 0),
        _table2("arc-c", "arc_challenge_chat", "88.5; OpenCompass 89.2", 512, 0),
        _table2("gsm8k", "gsm8k", "69.4; OpenCompass 68.8", 512, 4, **_LATE_END),
        _table2("math", "minerva_math", "31.9; OpenCompass 29.6", 512, 0, **_LATE_END),
        _table2("gpqa", "gpqa_main_generative_n_shot", "33.3; OpenCompass 32.3", 64, 5, **_LATE_END),
        _table2("humaneval", "humaneval_instruct", "49.4; OpenCompass 47.0", 512, 0, **_NO_END),
        _table2("mbpp", "mbpp_instruct", "41.0; OpenCompass 39.6", 256, None, **_LATE_END),
        # Section 3.2 compares these with Table 2 and names no other number of examples.
        _instruct("gsm8k-instruct-block8", "gsm8k", "78.6; OpenCompass 78.9", 256, 8, num_fewshot=4),
        _instruct("math-instruct-block64", "minerva_math", "42.2; OpenCompass 42.7", 512, 64, num_fewshot=0),
        # LLaDA 1.5 (arXiv 2505.19223). The examples are not confirmed.
        _instruct("gsm8k-1.5", "gsm8k", "83.8; OpenCompass 83.6", 256, 16, **_LATE_END),
        _instruct("math-1.5", "minerva_math", "42.6; OpenCompass 42.3", 1024, 128, **_LATE_END),
        _instruct("gpqa-1.5", "gpqa_main_generative_n_shot", "36.9; OpenCompass 34.8", 256, 16),
        _instruct("humaneval-1.5", "humaneval_instruct", "52.4; OpenCompass 51.2", 512, 32, **_LATE_END),
        _instruct("mbpp-1.5", "mbpp_instruct", "42.8; OpenCompass 42.6", 512, 32, **_LATE_END),
        _instruct("ifeval-1.5", "ifeval", "66.2; OpenCompass 65.2", 256, 16, **_LATE_END),
        # The couplet test (Section 3.3): reversal.py. The first version of the paper had 48.8 and 42.4.
        _instruct("reversal-instruct", "reversal", "51.8 forward, 45.6 in reverse", 28, source="Table 4", **_NO_END),
    )
}


def table() -> str:
    """All recipes, for people to read."""
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
    "One token per step. shots: task's = as many as lm_eval's task has by itself.",
    "published: percent, of LLaDA-8B-Base (-base), LLaDA-8B-Instruct (-instruct), LLaDA 1.5 (-1.5); by: with what, and",
    "where it stands (tables of arXiv 2502.09992, EVAL.md of the authors' repository).",
    "Not confirmed: that the tasks of -instruct and -1.5 ask as the authors did, who did not use lm_eval for them (the",
    "task named is the nearest; on MMLU-Pro, GSM8K and HumanEval lm_eval gave them much less for LLaMA3-8B-Instruct);",
    "the shots of -1.5; that the shots of Table 2 also hold for the -block recipes.",
    "Known to differ: Table 1 has 4 shots for gsm8k-base and mbpp-base, their lm_eval command the task's 5 and 3;",
    "Table 2 has 4 for mbpp-instruct, lm_eval's task has examples for 3.",
    'minerva_math needs pip install "lm-eval[math]", ifeval "lm-eval[ifeval]"; humaneval and mbpp run what the model',
    "writes: --confirm_run_unsafe_code and the environment variable HF_ALLOW_CODE_EVAL=1.",
)
