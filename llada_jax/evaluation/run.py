"""Runs an evaluation from its tasks to its file of results. This is what `evaluate.py` starts.

Everything that a user can get wrong is checked before the model is loaded: the tasks are looked up, their data is
loaded, and their first requests are built. In a run of several processes all processes do the same work, but only the
first one writes results and shows progress.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llada_jax import __version__, loading
from llada_jax.cli import paths
from llada_jax.cli.outputs import check_file, write_text
from llada_jax.config import MeshConfig, NonFinite, UserError
from llada_jax.devices import distributed, mesh
from llada_jax.evaluation import pairs, reversal, tasks
from llada_jax.evaluation.results import as_json, digest, identify, table, versions
from llada_jax.formats import workdir
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.settings import CACHES, check_settings, resolve
from llada_jax.sampling.text_completion import Options
from llada_jax.storage import objects
from llada_jax.text.tokenizer import Tokenizer

REVERSAL = "reversal"
BOOTSTRAPS = 1000  # resamples for standard errors that have no formula; enough for two digits


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Says what to evaluate, how, and where to write the results.

    None leaves a choice to the task, the model or `harness.LLaDA`.
    """

    model: str
    tasks: tuple[str, ...]
    output: str
    recipe: str | None = None
    step: int | None = None
    dtype: str | None = None
    weights: str | None = None
    include_path: tuple[str, ...] = ()
    data: str | None = None  # file of couplets for the task "reversal"
    num_fewshot: int | None = None
    limit: float | None = None  # number of documents per task, or their share if below 1
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    mc_samples: int = 128
    cfg_scale: float = 0.0
    steps: int | None = None
    gen_length: int | None = None
    length: str = "fixed"
    block_length: int | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    remasking: str = "low_confidence"
    commit: str = "schedule"
    commit_bound: float | None = None
    cache: str = "none"
    cache_refresh: int = 0
    suffix_window: int = 0
    revoke: str = "none"
    revoke_bound: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    max_length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    results_cache: str | None = None
    log_samples: bool = False
    fsdp: int = 1
    tensor: int = 1

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the figures depend on, besides model and tasks, as arguments of `harness.LLaDA`."""
        names = ("mc_samples", "cfg_scale", "gen_length", "steps", "block_length", "temperature", "top_k", "top_p")
        names += ("length", "remasking", "commit", "commit_bound", "logits_eos_inf", "confidence_eos_eot_inf")
        names += ("cache", "cache_refresh", "suffix_window", "revoke", "revoke_bound", "max_length", "seed")
        return {name: getattr(self, name) for name in names}

    def options(self) -> Options:
        """Returns the settings of generation for evaluations that do not use lm_eval."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Options)}
        return Options(**{name: value for name, value in given.items() if value is not None})


def run(job: Evaluation) -> int:
    """Evaluates the model, writes the results to a file and prints their table to stdout.

    Returns:
      The exit code 0.

    Raises:
      UserError: If `check` finds a mistake, or if a task, the couplets or the model cannot be loaded or do not go
        together. All this is found before anything is computed.
      NonFinite: If the output of the model, or a perplexity, is not finite.
    """
    started, date = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    distributed.check_same(
        "evaluation",
        dataclasses.asdict(job),
        lambda _: "its flags differ from those of process 0; start all processes with the same flags",
    )
    check(job)
    names = [name for name in job.tasks if name != REVERSAL]
    couplets = reversal.read_couplets(job.data) if REVERSAL in job.tasks else []
    couplets = couplets[: _count(job.limit, len(couplets))]
    found, unused = None, {}
    if names:
        _prepare_lm_eval()
        check_generation = functools.partial(_check_generation, job, unused)
        found = tasks.load(names, job.include_path, job.num_fewshot, job.confirm_run_unsafe_code, check_generation)

    devices = mesh.make_mesh(MeshConfig(data=-1, fsdp=job.fsdp, tensor=job.tensor))
    # Process 0 chooses the checkpoint for all, because a running training may save a newer one at any time.
    identity = distributed.first_decides("model", lambda: identify(job.model, job.step))
    step = job.step if identity["step"] is None else identity["step"]
    model, tokenizer = loading.load_with_tokenizer(job.model, devices, job.dtype, step, job.weights)
    # The ends are in files of the folder that neither hash covers, and they decide what is generated.
    ends = sorted({i for i in (model.config.eos_id, model.config.eot_id, *model.config.end_ids) if i is not None})
    identity |= {"dtype": model.compute.dtype, "tokenizer": tokenizer.sha256, "ends": ends}
    if job.weights:
        identity["weights"] = job.weights
    _check_model(job, model, tokenizer)
    results: dict[str, Any] = {"results": {}, "n-shot": {}}
    batch_size = job.batch_size or 8 * devices.shape["data"] * devices.shape["fsdp"]
    if found:
        results = _harness(job, identity, model, tokenizer, batch_size, unused, *found)
    if couplets:
        samples: dict[str, list] = {}
        figures = reversal.evaluate(
            model,
            tokenizer,
            couplets,
            job.options(),
            jax.random.key(job.seed),
            chat=job.apply_chat_template,
            batch_size=batch_size,
            report=lambda task, done: samples.update({task: done}),
        )
        results["results"] |= figures
        results["n-shot"] |= dict.fromkeys(figures, 0)
        if job.log_samples:
            results.setdefault("samples", {}).update(samples)
    results |= {
        "evaluation": dataclasses.asdict(job),
        "model": identity | {"mesh": dict(devices.shape)},
        "software": versions(),
        "date": date,
        "seconds": round(time.monotonic() - started, 1),
    }
    if distributed.index() == 0:
        text, broken = as_json(results)
        write_text(Path(paths.expanded(job.output)), text)
        print(table(results))
        if broken:
            some = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
            distributed.log(f"{job.output}: numbers that are not finite are written as null ({len(broken)}): {some}")
    return 0


def check(job: Evaluation) -> None:
    """Raises UserError for mistakes in the settings that can be found without loading tasks or the model."""
    if not job.tasks:
        raise UserError("nothing to evaluate: pass --tasks=NAME,... or --recipe=NAME (--list shows the recipes)")
    if distributed.index() == 0:
        _check_places(job)
    if objects.is_bucket(job.model):
        workdir.is_workdir(objects.place(job.model), "--model=")
    elif not Path(job.model).is_dir():
        raise UserError(f"--model={job.model} is not a folder; pass a training workdir or a published model's folder")
    if REVERSAL in job.tasks and not job.data:
        raise UserError("--tasks=reversal needs --data=FILE.json, a file with the couplets")
    for name, least in (("mc_samples", 1), ("max_length", 1), ("batch_size", 1), ("num_fewshot", 0)):
        if (value := getattr(job, name)) is not None and value < least:
            raise UserError(f"--{name}={value}: it must be at least {least}")
    if job.limit is not None and (not 0 < job.limit < math.inf or (job.limit >= 1 and job.limit != int(job.limit))):
        raise UserError(f"--limit={job.limit}: pass a whole number of documents, or a share of them between 0 and 1")
    if job.cache not in CACHES:
        raise UserError(f"--cache={job.cache}: choose one of {', '.join(CACHES)}; --results_cache=PATH keeps results")
    options = job.options()
    check_settings(options.sampler(0, 1 if options.gen_length is None else options.gen_length))
    if any(name != REVERSAL for name in job.tasks) and importlib.util.find_spec("lm_eval") is None:
        raise UserError('lm_eval is not installed: pip install "llada_jax[eval]"')


def _check_places(job: Evaluation) -> None:
    """Raises UserError unless --output and --results_cache can be written. Creates the folder of the latter."""
    check_file(job.output)
    if job.results_cache is not None:
        if objects.is_bucket(job.results_cache):
            raise UserError(
                f"--results_cache={job.results_cache}: name a file on this machine or on a mounted file system"
            )
        path = Path(paths.expanded(job.results_cache)).absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
                pass
        except OSError as error:
            raise UserError(f"--results_cache={job.results_cache} cannot be written: {error.strerror}") from None


def _check_generation(job: Evaluation, unused: dict[str, Any], gen_kwargs: dict[str, Any]) -> None:
    """Raises UserError if generation_kwargs are impossible. Tells, and puts into `unused`, what of them is not used."""
    from llada_jax.evaluation import generation

    longest = workdir.trained_length(job.model) if job.max_length is None else job.max_length
    found = generation.interpret(gen_kwargs, job.options(), job.gen_length, job.temperature, longest)
    for name in found.unused.keys() - unused.keys():
        distributed.log(generation.about_unused(name, found.unused[name]))
    unused.update(found.unused)


def _check_model(job: Evaluation, model: Transformer, tokenizer: Tokenizer) -> None:
    """Raises UserError if the model cannot be evaluated with these settings."""
    options = job.options()
    length = 1 if options.gen_length is None else options.gen_length
    resolve(options.sampler(0, length, model.config.causal), model)
    if job.apply_chat_template:
        highest = max(tokenizer.encode_chat([{"role": "user", "content": "?"}]))
        if highest >= model.config.vocab_size:
            raise UserError(
                f"--apply_chat_template: the chat template needs token {highest}, but the model's vocabulary is "
                f"{model.config.vocab_size}: this model cannot converse"
            )


def _count(limit: float | None, total: int) -> int:
    """Returns how many of `total` documents the flag --limit selects."""
    return total if limit is None else math.ceil(limit * total) if limit < 1 else int(limit)


def _prepare_lm_eval() -> None:
    """Sets what must be set before lm_eval is imported (`harness.py` sets the rest)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library in ("lm_eval", "huggingface_hub"):  # tasks.py reports the problems of a task, once
        logging.getLogger(library).setLevel(logging.ERROR)
    if distributed.index():
        os.environ["TQDM_DISABLE"] = "1"


def _harness(
    job: Evaluation,
    identity: dict[str, Any],
    model: Transformer,
    tokenizer: Tokenizer,
    batch_size: int,
    unused: dict[str, Any],
    manager: Any,
    loaded: list,
) -> dict[str, Any]:
    """Runs lm_eval and returns the parts of its results that are kept."""
    import lm_eval

    from llada_jax.evaluation import harness

    settings = job.settings()
    if settings["max_length"] is None:
        settings["max_length"] = workdir.trained_length(job.model)
    lm = harness.LLaDA(model, tokenizer, batch_size=batch_size, **settings)
    lm.ignored |= unused.keys()
    if distributed.index() == 0:
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as elsewhere:
        cache = None
        if job.results_cache is not None:
            # lm_eval identifies a result only by its request, so each model and set of settings needs its own file.
            cache = f"{paths.expanded(job.results_cache)}-{_fingerprint(job, identity)}"
            cache = cache if distributed.index() == 0 else f"{elsewhere}/cache"
        with contextlib.redirect_stdout(sys.stderr), _errors_of_tasks(job, lm):  # stdout is reserved for the table
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=loaded,
                task_manager=manager,
                use_cache=cache,
                limit=job.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=job.log_samples,
                apply_chat_template=job.apply_chat_template,
                confirm_run_unsafe_code=job.confirm_run_unsafe_code,
            )
    results = results or {"results": {}, "n-shot": {}}  # lm_eval returns None if LOCAL_RANK is not 0
    names = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    return {name: results[name] for name in (*names, "samples") if name in results}


@contextlib.contextmanager
def _errors_of_tasks(job: Evaluation, lm: Any) -> Iterator[None]:
    """Names the reason in one line if a task fails before it has asked the model, or if a perplexity is too large."""
    try:
        yield
    except (UserError, NonFinite):
        raise
    except OverflowError as error:
        raise NonFinite(
            f"--tasks={','.join(job.tasks)}: a metric, most likely a perplexity, is too large: {error}"
        ) from error
    except Exception as error:
        if lm.asked:
            raise
        names = ",".join(job.tasks)
        raise UserError(f"--tasks={names}: {tasks.reason(error, names)}") from error


def _fingerprint(job: Evaluation, identity: dict[str, Any]) -> str:
    content = json.dumps([identity, job.settings(), __version__, pairs.RULE], sort_keys=True)
    return digest(content.encode())[:12]
