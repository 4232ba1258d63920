"""Tasks of lm_eval, found and tried before a model is loaded: one clear line for what is wrong with them."""

import contextlib
import difflib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada_jax.config import UserError
from llada_jax.devices import distributed


def load(
    names: Sequence[str], include_path: Sequence[str] = (), num_fewshot: int | None = None, unsafe: bool = False
) -> tuple[Any, list]:
    """lm_eval's TaskManager, and its Tasks and Groups of these names, with their data.

    Args:
      names: of tasks, groups or tags, paths of YAML files, or patterns such as mmlu_*.
      include_path: folders with YAML files of tasks, beside those of lm_eval.
      num_fewshot: examples in front of each question; None = as the task says.
      unsafe: whether tasks may run code that the model has written.

    Raises:
      UserError: no such task, data that is not there, a task that cannot be built or may not be run.
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
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars over one document
                    task.build_all_requests(limit=1)  # its templates, on its first document
        except UserError:
            raise
        except Exception as error:  # a task is a program of its own: whatever it raises is about the task
            raise UserError(f"--tasks={name}: {_reason(error, name)}") from error
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
            raise UserError(f"--include_path={folder} is no folder")
        _check_yaml(Path(folder))
    if include_path:
        # Reading the thousands of tasks of lm_eval takes ten seconds. Groups may be made of them.
        manager = kind(include_path=list(include_path), include_defaults=False)
        if all(name in manager.all_subtasks for name in names):
            return manager
    return kind(include_path=list(include_path) or None)


def _check_yaml(folder: Path) -> None:
    """UserError for a file that is no YAML: lm_eval passes over it without a word."""
    import yaml

    for path in sorted(folder.glob("**/*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not YAML: {error}") from None


def _matching(name: str, manager: Any, include_path: Sequence[str]) -> list[str]:
    if name in manager.all_tasks or Path(name).is_file():
        return [name]
    if found := manager.match_tasks([name]):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; is it {' or '.join(near)}?" if near else ""
    where = f"in {', '.join(include_path)} or lm_eval" if include_path else "in lm_eval (--include_path=DIR adds yours)"
    raise UserError(f"--tasks={name}: there is no such task {where}{hint}")


def _reason(error: Exception, task: str) -> str:
    """Why a task could not be loaded, and what to do about it."""
    text = " ".join(f"{error or type(error).__name__}".split())[:300]
    if isinstance(error, ConnectionError) or any(word in text for word in ("offline", " Hub")):
        return f"its data is not on this machine and cannot be downloaded: {text}"
    if isinstance(error, FileNotFoundError):
        return f"{text} (relative data_files are looked for from {os.getcwd()})"
    if isinstance(error, ImportError) and "lm-eval[" not in text:
        return f'{text}; lm_eval has extras for such tasks: pip install "lm-eval[{task}]", or what is missing'
    return f"{type(error).__name__}: {text}"


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """As lm_eval does it: a task whose own file says 0 keeps that."""
    if num_fewshot and task.get_config("num_fewshot") == 0:
        distributed.log(f"{task.config.task}: its file says num_fewshot: 0, --num_fewshot={num_fewshot} is not used")
    elif num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)


def _check(task: Any, unsafe: bool) -> None:
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False) and not unsafe:
        raise UserError(f"--tasks={name} runs code that the model has written: allow it with --confirm_run_unsafe_code")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks={name} needs images or sound: the model knows only text")
    for metric, aggregation in task.aggregation().items():
        if not callable(aggregation):
            raise UserError(f"--tasks={name}: the metric {metric} has no aggregation of that name")
