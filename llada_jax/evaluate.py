"""Benchmarks by lm-evaluation-harness: python -m llada_jax.evaluate --model=DIR --tasks=arc_easy,gsm8k --output=FILE

    --recipe=gsm8k-instruct    the published settings of a benchmark; other flags override them
    --list                     shows the recipes
    --include_path=DIR         task files of your own (YAML), with local data
    --cache=PATH               keep results of requests there: the same command continues an interrupted evaluation
    --tasks=reversal --data=FILE.json    the couplet test of the paper

The results go to the file, their table to stdout, all else to stderr. On several hosts start the same command on each.
"""

from absl import flags

from llada_jax.cli import compilation_cache, entry_point
from llada_jax.config import DistributedConfig, UserError
from llada_jax.evaluation import recipes

_MODEL = flags.DEFINE_string("model", None, "A training workdir, or a folder with a published model.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the workdir; default: its newest.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: float32 on CPU, bfloat16 on accelerators.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks, groups or tags of lm_eval, patterns, YAML files, or reversal.")
_INCLUDE_PATH = flags.DEFINE_multi_string("include_path", [], "Folder with YAML files of tasks; may be repeated.")
_DATA = flags.DEFINE_string("data", None, 'Couplets for --tasks=reversal: a JSON list of {"first", "second"}.')
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results; replaced if it is there.")
_RECIPE = flags.DEFINE_string("recipe", None, "Published settings by name, see --list; other flags override them.")
_LIST = flags.DEFINE_boolean("list", False, "Show the recipes and end.")
_LOG_SAMPLES = flags.DEFINE_boolean("log_samples", False, "Also write every request, its answer and its scores.")
_CACHE = flags.DEFINE_string("cache", None, "Path in front of files that keep results, one per model and settings.")
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in front of the question; default: the task's own.")
_LIMIT = flags.DEFINE_float("limit", None, "Documents of each task; below 1: share of them. For trying out.")
_CHAT = flags.DEFINE_boolean("apply_chat_template", False, "Ask through the chat template, as for instruct models.")
_UNSAFE = flags.DEFINE_boolean("confirm_run_unsafe_code", False, "Allow tasks that run code written by the model.")
_MC_SAMPLES = flags.DEFINE_integer("mc_samples", 128, "Monte Carlo samples of each likelihood.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 0.0, "Guidance (Eq. 16): w; 0 = none.")
_STEPS = flags.DEFINE_integer("steps", None, "Reverse steps; default: one for each token.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", None, "Tokens to generate; default: what the task says, else 256.")
_BLOCK_LENGTH = flags.DEFINE_integer("block_length", None, "Tokens per block, left to right; default: 32.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 = always the most probable token; default: the task's own.")
_REMASKING = flags.DEFINE_string("remasking", "low_confidence", "Which predictions stay: low_confidence or random.")
_LOGITS_EOS_INF = flags.DEFINE_boolean("logits_eos_inf", False, "Never generate EOS.")
_CONFIDENCE_EOS_EOT_INF = flags.DEFINE_boolean("confidence_eos_eot_inf", False, "Reveal EOS and end of turn last.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens of prompt and answer; default: as trained.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Prompts generated at once; default: 8 per batch shard.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**32 - 1)
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share the parameters; rows are spread over the rest, too.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share each matrix product.")
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several processes meet and no cluster announces them."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many they are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

_SETTINGS = (
    _NUM_FEWSHOT, _CHAT, _MC_SAMPLES, _CFG_SCALE, _STEPS, _GEN_LENGTH, _BLOCK_LENGTH, _TEMPERATURE, _REMASKING,
    _LOGITS_EOS_INF, _CONFIDENCE_EOS_EOT_INF,
)  # fmt: skip
_REST = (
    _RECIPE, _STEP, _DTYPE, _DATA, _LIMIT, _UNSAFE, _MAX_LENGTH, _BATCH_SIZE, _SEED, _CACHE, _LOG_SAMPLES, _FSDP,
    _TENSOR,
)  # fmt: skip


def main() -> int:
    """Evaluates as the flags say; returns the exit code."""
    if _LIST.value:
        print(recipes.table())
        return entry_point.FINISHED
    if not _MODEL.value:
        raise UserError("--model=DIR is missing: a training workdir, or a folder with a published model")
    if not _OUTPUT.value:
        raise UserError("--output=FILE is missing: the results are written there")
    settings = {flag.name: flag.value for flag in _SETTINGS}
    tasks = tuple(_TASKS.value)
    if _RECIPE.value is not None:
        if _RECIPE.value not in recipes.RECIPES:
            raise UserError(f"--recipe={_RECIPE.value}: there is none of that name, --list shows all")
        recipe = recipes.RECIPES[_RECIPE.value]
        tasks = tasks or recipe.tasks
        settings |= recipe.settings({k: v for k, v in settings.items() if flags.FLAGS[k].present})

    # Not before: --list needs neither.
    from llada_jax.devices import distributed
    from llada_jax.evaluation import run

    compilation_cache.enable()
    job = run.Evaluation(
        _MODEL.value,
        tasks,
        _OUTPUT.value,
        include_path=tuple(_INCLUDE_PATH.value),
        **settings,
        **{flag.name: flag.value for flag in _REST},
    )
    others = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    return distributed.run(lambda: run.run(job), DistributedConfig(), *others)


if __name__ == "__main__":
    entry_point.run(main)
