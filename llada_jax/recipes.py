"""The published settings of LLaDA for each benchmark, by name: python -m llada_jax.evaluate --recipe=NAME

Sources: arXiv 2502.09992 (Section 3, Appendix B), EVAL.md of the authors' repository, and for LLaDA 1.5 arXiv
2505.19223. The scores are those of the authors' own tools, which differ in prompts and answer extraction from
lm-evaluation-harness: with it their base model was measured too, the instruct models were not.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One benchmark as the authors ran it. None = they do not say, or it does not matter for this kind of task."""

    name: str
    tasks: tuple[str, ...]  # of lm_eval
    published: str  # score in percent, and of what
    num_fewshot: int | None = None  # None = what the task itself says
    apply_chat_template: bool = False
    # Of likelihoods.
    mc_samples: int | None = None
    # Of generation; the steps are as many as the tokens.
    gen_length: int | None = None
    block_length: int | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    # Of both.
    cfg_scale: float = 0.0

    @property
    def steps(self) -> int | None:
        """Reverse steps."""
        return self.gen_length

    def settings(self) -> dict[str, object]:
        """Its settings by the names of the flags of evaluate.py, those that are None left out."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"steps": self.steps}
        return {k: v for k, v in named.items() if k not in ("name", "tasks", "published") and v is not None}


def _likelihood(name: str, task: str, published: str, shots: int, cfg_scale: float = 0.0, samples: int = 128) -> Recipe:
    """The base model, by the likelihood of the answers."""
    return Recipe(f"{name}-base", (task,), published, num_fewshot=shots, mc_samples=samples, cfg_scale=cfg_scale)


def _generation(name: str, task: str, published: str) -> Recipe:
    """The base model, by what it generates: one block of 1024 tokens."""
    return Recipe(f"{name}-base", (task,), published, gen_length=1024, block_length=1024)


def _instruct(name: str, task: str, published: str, length: int, block: int | None = None, **settings) -> Recipe:
    """An instruct model, by what it generates; one block unless told otherwise."""
    settings |= {"gen_length": length, "block_length": block or length}
    return Recipe(name, (task,), published, apply_chat_template=True, **settings)


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
        # LLaDA-8B-Base, generation.
        _generation("bbh", "bbh", "49.7"),
        _generation("gsm8k", "gsm8k", "70.3"),
        _generation("math", "minerva_math", "31.4"),
        _generation("humaneval", "humaneval", "35.4"),
        _generation("mbpp", "mbpp", "40.0"),
        # LLaDA-8B-Instruct: pure diffusion, and in blocks where that is better.
        _instruct("mmlu-instruct", "mmlu_generative", "65.5", 3),
        _instruct("mmlu-pro-instruct", "mmlu_pro", "37.0", 256),
        _instruct("arc-c-instruct", "arc_challenge_chat", "88.5", 512),
        _instruct("gsm8k-instruct", "gsm8k", "69.4", 512, **_LATE_END),
        _instruct("gsm8k-instruct-block8", "gsm8k", "78.6", 256, 8),
        _instruct("math-instruct", "minerva_math", "31.9", 512, **_LATE_END),
        _instruct("math-instruct-block64", "minerva_math", "42.2", 512, 64),
        _instruct("gpqa-instruct", "gpqa_main_generative_n_shot", "33.3", 64, **_LATE_END),
        _instruct("humaneval-instruct", "humaneval_instruct", "49.4", 512, **_NO_END),
        _instruct("mbpp-instruct", "mbpp_instruct", "41.0", 256, **_LATE_END),
        # LLaDA 1.5.
        _instruct("gsm8k-1.5", "gsm8k", "83.8", 256, 16, **_LATE_END),
        _instruct("math-1.5", "minerva_math", "42.6", 1024, 128, **_LATE_END),
        _instruct("gpqa-1.5", "gpqa_main_generative_n_shot", "36.9", 256, 16),
        _instruct("humaneval-1.5", "humaneval_instruct", "52.4", 512, 32, **_LATE_END),
        _instruct("mbpp-1.5", "mbpp_instruct", "42.8", 512, 32, **_LATE_END),
        _instruct("ifeval-1.5", "ifeval", "66.2", 256, 16, **_LATE_END),
        # The couplet test (Section 3.3): reversal.py.
        _instruct("reversal-instruct", "reversal", "about 42 in reverse, nearly its forward score", 28, **_NO_END),
    )
}


def table() -> str:
    """All recipes, for people to read."""
    head = ("recipe", "tasks", "shots", "gen_length", "block_length", "cfg_scale", "mc_samples", "besides", "published")
    rows = [head]
    for r in RECIPES.values():
        besides = ("apply_chat_template", "logits_eos_inf", "confidence_eos_eot_inf")
        rows.append((
            r.name,
            ",".join(r.tasks),
            "unstated" if r.num_fewshot is None else str(r.num_fewshot),
            str(r.gen_length or "-"),
            str(r.block_length or "-"),
            f"{r.cfg_scale:g}",
            str(r.mc_samples or "-"),
            " ".join(name for name in besides if getattr(r, name)) or "-",
            r.published,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = (
        "",
        "steps = gen_length, so one token per step. unstated: the task's own number of examples is used.",
        "published: percent, LLaDA-8B-Base (-base), LLaDA-8B-Instruct (-instruct), LLaDA 1.5 (-1.5), by the authors'",
        "own tools; they did not run lm_eval on the instruct models, the task named here is the nearest.",
    )
    return "\n".join([*lines, *notes])
