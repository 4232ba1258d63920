"""Finds tasks of lm_eval and tries them before a model is loaded, with a one-line message for any mistake in them."""

import contextlib
import copy
import difflib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llada_jax.config import UserError
from llada_jax.devices import distributed

# What stands in for the result of a request when the metrics of a task are tried, by the kind of the request.
_STAND_INS = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}


def load(
    names: Sequence[str],
    include_path: Sequence[str] = (),
    num_fewshot: int | None = None,
    unsafe: bool = False,
    check_generation: Callable[[dict[str, Any]], None] = lambda gen_kwargs: None,
) -> tuple[Any, list]:
    """Loads tasks and their data.

    Args:
      names: Names of tasks, groups or tags, paths of YAML files, or patterns such as mmlu_*.
      include_path: Folders with YAML files of tasks, in addition to the tasks of lm_eval.
      num_fewshot: The number of examples in front of each question. None means the number that the task sets.
      unsafe: Whether tasks may run code that the model has written.
      check_generation: A function that raises UserError if it is called with generation_kwargs that are impossible.

    Returns:
      lm_eval's TaskManager, and a list with lm_eval's Task and Group objects for these names.

    Raises:
      UserError: If a task does not exist, its data is missing, it cannot be built, its metrics cannot be computed, its
        generation_kwargs are impossible, or it is not allowed to run.
    """
    from lm_eval.tasks import TaskManager

    manager = _manager(TaskManager, names, include_path)
    loaded = []
    matching = [match for name in names for match in _matching(name, manager, include_path)]
    for name in dict.fromkeys(matching):
        try:
            found = manager.load([name])
            for task in found["tasks"].values():
                _check(task, unsafe)
                _set_examples(task, num_fewshot)
                with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars over a single document
                    task.build_all_requests(limit=1)  # tries the task's templates on its first document
                _try_requests(task, check_generation)
        except UserError:
            raise
        except Exception as error:  # a task can run any code, so any exception points to a mistake in the task
            raise UserError(f"--tasks={name}: {reason(error, name)}") from error
        children = {child for group in found["groups"].values() for child in group.child_names}
        roots = [group for group in found["groups"].values() if group.name not in children]
        loaded += roots or found["tasks"].values()
    try:
        manager.load(loaded)
    except ValueError as error:
        raise UserError(f"--tasks={','.join(names)}: {error}") from None
    return manager, loaded


def _manager(kind: type, names: Sequence[str], include_path: Sequence[str]) -> Any:
    for folder in include_path:
        if not Path(folder).is_dir():
            raise UserError(f"--include_path={folder} is not a folder; pass a folder with YAML files of tasks")
        _check_yaml(Path(folder))
    if include_path:
        # Reading the thousands of tasks of lm_eval takes ten seconds. It is not needed if all names are single tasks in
        # these folders. Groups need it, because they may contain tasks of lm_eval.
        manager = kind(include_path=list(include_path), include_defaults=False)
        if all(name in manager.all_subtasks for name in names):
            return manager
    return kind(include_path=list(include_path) or None)


def _check_yaml(folder: Path) -> None:
    """Raises UserError if a file is not valid YAML, because lm_eval ignores such a file silently."""
    import yaml

    for path in sorted(folder.glob("**/*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not YAML: {error}") from None


def _matching(name: str, manager: Any, include_path: Sequence[str]) -> list[str]:
    if name in manager.all_tasks or Path(name).is_file():
        return [name]
    if found := manager.match_tasks([name]):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    where = f"in {', '.join(include_path)} or lm_eval" if include_path else "in lm_eval (--include_path=DIR adds yours)"
    raise UserError(f"--tasks={name}: there is no such task {where}{hint}")


def reason(error: Exception, task: str) -> str:
    """Returns the reason why a task could not be loaded, and what to do about it."""
    text = " ".join(f"{error or type(error).__name__}".split())[:300]
    if isinstance(error, ConnectionError) or any(word in text for word in ("offline", " Hub")):
        return f"its data is not on this machine and cannot be downloaded: {text}"
    if isinstance(error, FileNotFoundError):
        return f"{text} (relative paths in data_files are resolved against {os.getcwd()})"
    if isinstance(error, ImportError) and "lm-eval[" not in text:
        return f'{text}; install the missing package, or try the extra for this task: pip install "lm-eval[{task}]"'
    return f"{type(error).__name__}: {text}"


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """Sets the number of examples as lm_eval does: a task whose own file sets 0 keeps 0."""
    if num_fewshot and task.get_config("num_fewshot") == 0:
        distributed.log(f"{task.config.task}: its file sets num_fewshot: 0, so --num_fewshot={num_fewshot} is not used")
    elif num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)


def _check(task: Any, unsafe: bool) -> None:
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False) and not unsafe:
        raise UserError(f"--tasks={name} runs code that the model has written; allow it with --confirm_run_unsafe_code")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks={name} needs images or sound, but the model handles only text")
    for metric, aggregation in task.aggregation().items():
        if not callable(aggregation):
            raise UserError(f"--tasks={name}: the metric {metric} names an aggregation that lm_eval does not have")
    own = callable(task.get_config("process_results"))
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and not own:
            raise UserError(f"--tasks={name}: there is no metric {metric} in lm_eval, nor in the library evaluate here")


def _try_requests(task: Any, check_generation: Callable[[dict[str, Any]], None]) -> None:
    """Tries what comes after the model has answered, with the requests of the task's first document.

    Raises:
      UserError: If the generation_kwargs are impossible, if a metric needs a package or a file that is not here, or if
        a metric is one that lm_eval does not compute for this kind of task.
    """
    name, requests = task.config.task, list(task.instances or ())
    if not requests or any(request.request_type not in _STAND_INS for request in requests):
        return
    for request in requests:
        if request.request_type == "generate_until":
            try:
                check_generation(request.args[1])
            except UserError as error:
                raise UserError(f"--tasks={name}: {error}") from None
    results = [_STAND_INS[request.request_type] for request in requests]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            figures = task.process_results(copy.deepcopy(requests[0].doc), results)
            for metric, value in figures.items():
                if aggregation := task.aggregation().get(metric):
                    aggregation([value])
    except Exception as error:
        # Any other exception may only mean that the stand-in is no possible result, or that one result is too few.
        if isinstance(error, ImportError | OSError) or type(error) is LookupError:  # LookupError: data of nltk
            raise UserError(f"--tasks={name}: its metrics cannot be computed: {reason(error, name)}") from error
        return
    if not callable(task.get_config("process_results")) and task.OUTPUT_TYPE != "generate_until":
        for metric in task.aggregation():
            if metric not in figures:
                raise UserError(f"--tasks={name}: lm_eval does not compute {metric} for output_type {task.OUTPUT_TYPE}")
