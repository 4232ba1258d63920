"""Evaluates a model: python -m llada_jax.evaluate --model=DIR --tasks=arc_easy,gsm8k --output=FILE

The tasks are those of lm-evaluation-harness.

    --recipe=gsm8k-instruct    the published settings of a benchmark, which other flags override
    --list                     lists the recipes
    --include_path=DIR         a folder with task files of your own (YAML), which may use local data
    --results_cache=PATH       keeps the results of requests: the same command continues an interrupted evaluation
    --tasks=reversal --data=FILE.json    the couplet test of the paper

The results go to the file, a table of them to stdout, and everything else to stderr. On several hosts, start the same
command on each of them.
"""

from absl import flags

from llada_jax.cli import entry_point, model_flags, paths, process_flags, sampler_flags, streams
from llada_jax.config import DistributedConfig, UserError
from llada_jax.evaluation import recipes
from llada_jax.sampling import lengths

for _module in (model_flags, sampler_flags, process_flags):
    flags.adopt_module_key_flags(_module)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "float32 or bfloat16. Default: float32 on a CPU and bfloat16 on accelerators."
)
_TASKS = flags.DEFINE_list("tasks", [], "Tasks, groups or tags of lm_eval, patterns, YAML files, or reversal.")
_INCLUDE_PATH = paths.define_multi("include_path", [], "A folder with YAML files of tasks. May be repeated.")
_OUTPUT = paths.define("output", None, "The JSON file for the results. An existing file is replaced.")
_RECIPE = flags.DEFINE_string("recipe", None, "Published settings by name (--list), which other flags override.")
_LIST = flags.DEFINE_boolean("list", False, "List the recipes and end.")
_SETTINGS = (
    flags.DEFINE_integer("num_fewshot", None, "Examples in front of each question. Default: the task's own number."),
    flags.DEFINE_boolean("apply_chat_template", None, "Ask through the chat template, as instruct models need it."),
    flags.DEFINE_integer("mc_samples", None, "Monte Carlo samples of each likelihood. Default: 128."),
)
_REST = (
    paths.define("data", None, 'The couplets for --tasks=reversal: a JSON list of {"first", "second"}.'),
    flags.DEFINE_float("limit", None, "Number of documents per task, or their share if below 1. For trials."),
    flags.DEFINE_boolean("confirm_run_unsafe_code", False, "Allow tasks that run code which the model has written."),
    flags.DEFINE_integer("max_length", None, "Tokens of prompt and answer together. Default: as in training."),
    flags.DEFINE_integer("batch_size", None, "Prompts that are generated at once. Default: 8 per batch shard."),
    paths.define("results_cache", None, "The beginning of the paths of files that keep results."),
    flags.DEFINE_boolean("log_samples", False, "Also write every request, its answer and its scores."),
    flags.DEFINE_integer("fsdp", 1, "Devices that share the parameters. Rows are spread over all other devices too."),
    flags.DEFINE_integer("tensor", 1, "Devices that share each matrix product."),
)


def main() -> int:
    """Evaluates as the flags say and returns the exit code."""
    if _LIST.value:
        streams.require_stdout("start the program with stdout open")
        print(recipes.table())
        return entry_point.FINISHED
    model = model_flags.model()
    if not _OUTPUT.value:
        raise UserError("--output=FILE is missing: name the file for the results")
    settings = lengths.automatic(sampler_flags.given(), None) | {
        flag.name: flag.value for flag in _SETTINGS if flag.value is not None
    }
    tasks = tuple(map(paths.expanded, _TASKS.value))  # a task may be the path of a YAML file
    if _RECIPE.value is not None:
        if _RECIPE.value not in recipes.RECIPES:
            raise UserError(f"--recipe={_RECIPE.value}: there is no recipe of this name; --list shows all recipes")
        recipe = recipes.RECIPES[_RECIPE.value]
        tasks = tasks or recipe.tasks
        settings = recipe.settings(settings)

    with entry_point.importing():
        from llada_jax.devices import distributed
        from llada_jax.evaluation import run

    job = run.Evaluation(
        model,
        tasks,
        _OUTPUT.value,
        recipe=_RECIPE.value,
        step=model_flags.STEP.value,
        dtype=_DTYPE.value,
        weights=model_flags.WEIGHTS.value,
        include_path=tuple(_INCLUDE_PATH.value),
        **settings,
        **{flag.name: flag.value for flag in _REST},
    )
    return distributed.run(lambda: run.run(job), DistributedConfig(), *process_flags.given())


if __name__ == "__main__":
    entry_point.run(main)
