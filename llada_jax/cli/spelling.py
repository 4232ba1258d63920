"""Finds the settings that a user probably meant by a name that no setting has."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Container, Iterable, Iterator

from llada_jax.cli.config_help import sections
from llada_jax.config import Config, leaves

_ENOUGH = 0.6  # the lowest score of a name that is worth showing
_EQUAL = 0.05  # names whose scores differ by less than this are shown together
_MOST = 3  # the largest number of names that are shown

# What users of other trainers call a setting, where the words of the names have nothing in common.
_OTHER_NAMES = {
    "steps": "max_steps train_iters max_iters iters iterations epochs num_epochs num_train_epochs",
    "batch_size": "bs global_batch_size train_batch_size per_device_train_batch_size micro_batch_size mbs",
    "sequence_length": "seq_len seqlen max_len max_length max_seq_len block_size context context_length"
    " max_position_embeddings",
    "accumulation": "grad_accum grad_accum_steps gradient_accumulation_steps accumulate_grad_batches micro_batches",
    "init_from": "resume resume_from resume_from_checkpoint load_from pretrained model_name_or_path finetune_from",
    "seed": "rng random_state",
    "model.layers": "depth n_layer num_layers num_hidden_layers",
    "model.width": "hidden hidden_size hidden_dim d_model dim embed_dim n_embd emb_dim",
    "model.heads": "n_head num_heads num_attention_heads",
    "model.kv_heads": "num_key_value_heads num_query_groups",
    "model.feed_forward": "intermediate_size ffn ffn_dim ffn_hidden_size mlp mlp_dim d_ff ff_dim",
    "model.norm_eps": "rms_norm_eps layer_norm_eps",
    "model.tied_embeddings": "tie_word_embeddings tie_embeddings weight_tying",
    "model.lora.rank": "r lora_r",
    "model.lora.targets": "target_modules",
    "compute.dtype": "precision mixed_precision bf16 fp16 torch_dtype param_dtype",
    "compute.remat": "gradient_checkpointing activation_checkpointing recompute",
    "compute.attention": "attn attn_implementation flash_attn flash_attention",
    "data.path": "dataset dataset_name train_data train_file data_dir",
    "data.workers": "num_workers dataloader_num_workers",
    "mesh.data": "dp dp_size data_parallel ddp",
    "mesh.tensor": "tp tp_size tensor_parallel tensor_model_parallel_size",
    "optimizer.name": "optim optimizer_type",
    "optimizer.peak_learning_rate": "lr max_lr peak_lr",
    "optimizer.schedule": "warmup warmup_steps warmup_ratio num_warmup_steps lr_scheduler lr_scheduler_type lr_schedule"
    " scheduler decay_steps lr_decay min_lr",
    "optimizer.weight_decay": "wd l2",
    "optimizer.adam_eps": "epsilon adam_epsilon",
    "optimizer.clip_norm": "grad_clip gradient_clip_val max_grad_norm gradient_clipping clip_grad",
    "checkpoint.every": "save_every save_steps save_interval save_freq steps interval frequency",
    "checkpoint.keep": "save_total_limit max_to_keep keep_last",
    "validation.every": "eval_every eval_steps eval_interval eval_freq steps interval frequency",
    "validation.rows": "eval_iters eval_batches max_eval_samples",
    "logging.every": "log_every log_steps log_interval log_freq logging_steps steps interval frequency",
    "logging.wandb_project": "wandb report_to use_wandb",
    "sampling.every": "sample_every sample_interval interval frequency",
}


# What users of other trainers call the flag --workdir.
_WORKDIR_NAMES = {"output_dir", "out_dir", "save_dir", "log_dir", "logdir", "checkpoint_dir", "ckpt_dir", "run_dir"}


def misspelt(arguments: Iterable[str], plain_flags: Container[str] = ()) -> str | None:
    """Returns a message about the first argument --config.NAME whose NAME is no setting, or None if there is none.

    Args:
      arguments: The command line.
      plain_flags: The names of the other flags of the command.
    """
    known = {name for name, _ in leaves(Config())} | set(sections())
    for name in _named(arguments):
        if name not in known:
            flag = "workdir" if name.rpartition(".")[2] in _WORKDIR_NAMES else name
            meant = f"did you mean --{flag}?" if flag in plain_flags else suggestion(name, "--config.")
            return f"--config.{name}: there is no such setting; {meant}"
    return None


def section_with_a_value(arguments: Iterable[str]) -> str | None:
    """Returns a message about the first argument --config.NAME whose NAME is a section, or None."""
    for name in _named(arguments):
        if name and name in sections():
            return f"--config.{name} is a section and has no value of its own; {_contents(name)}"
    return None


def _named(arguments: Iterable[str]) -> Iterator[str]:
    """Yields the NAME of each argument --config.NAME or --noconfig.NAME in front of "--"."""
    for argument in arguments:
        if argument == "--":
            return
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            yield match[1]


def mistaken_attribute(message: str) -> str | None:
    """Returns the words that tell which setting may be meant by a name that a dataclass of `config.py` does not have.

    Args:
      message: The message of an exception. The result is None if it is about something else.
    """
    match = re.match(r"'(\w+)' object has no attribute '(\w+)'", message)
    match = match or re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    for section, kind in sections().items() if match else ():
        if kind.__name__ == match[1]:
            return suggestion(f"{section}.{match[2]}".lstrip("."), "config.")
    return None


def unknown_flag(name: str, plain_flags: Container[str] = ()) -> str | None:
    """Returns the words that tell which setting or flag may be meant by a flag that does not exist, or None.

    Args:
      name: The name of the flag, for example "steps" or "confg.steps".
      plain_flags: The names of the flags that the command has.
    """
    if name in _WORKDIR_NAMES and "workdir" in plain_flags:
        return "did you mean --workdir?"
    first, _, rest = name.partition(".")
    found = nearest(rest if rest and _ratio(first, "config") >= 0.7 else name)
    return _did_you_mean(found, "--config.") if found and found[0] not in sections() else None


def suggestion(name: str, prefix: str) -> str:
    """Returns the words that tell which settings may be meant by a name, or which settings there are.

    Args:
      name: The dotted name that no setting has, without "config.".
      prefix: What stands in front of the names in the message: "--config.", or "config." in a config file.
    """
    found, section = nearest(name), name.rpartition(".")[0]
    if prefix.startswith("--"):  # a flag cannot set a whole section
        section = next((each for each in found if each in sections()), section)
        found = [each for each in found if each not in sections()]
    if found:
        return _did_you_mean(found, prefix)
    while section not in sections():
        section = section.rpartition(".")[0]
    return _contents(section)


def _contents(section: str) -> str:
    """Returns the words that tell which settings and sections a section has."""
    hints = typing.get_type_hints(sections()[section])
    text = f"{f'config.{section}'.rstrip('.')} has the settings "
    text += ", ".join(field for field, hint in hints.items() if not dataclasses.is_dataclass(hint))
    inner = [field for field, hint in hints.items() if dataclasses.is_dataclass(hint)]
    return text + (f" and the sections {', '.join(inner)}" if inner else "") + "; --help describes all settings"


def _did_you_mean(names: list[str], prefix: str) -> str:
    *some, last = (prefix + name for name in names)
    return f"did you mean {', '.join(some)} or {last}?" if some else f"did you mean {last}?"


def nearest(name: str) -> list[str]:
    """Returns the dotted names of the settings, or of the section, that resemble `name`, the most similar ones first.

    Args:
      name: A dotted name without "config.", which may lack the section or have a wrong one.
    """
    candidates = [each for each, _ in leaves(Config())]
    longer = [each for each in candidates if name.startswith(f"{each}.")]
    if longer:  # the name goes on behind a setting
        return longer
    if "." not in name:
        candidates += filter(None, sections())
    scores = {each: _score(name, each) for each in candidates}
    best = max(scores.values())
    good = [each for each in candidates if scores[each] >= max(_ENOUGH, best - _EQUAL)]
    return sorted(good, key=lambda each: -scores[each])[:_MOST]


def _score(name: str, candidate: str) -> float:
    """Returns how much a name that a user has typed resembles the name of a setting; 1 is an equal last part."""
    section, _, last = name.rpartition(".")
    its_section, _, its_last = candidate.rpartition(".")
    words, its_words = _words(last), _words(its_last)
    scores = [0.95 * _ratio("".join(words), "".join(its_words))]
    if words == its_words:
        scores.append(1.0)
    if words in map(_words, _OTHER_NAMES.get(candidate, "").split()):
        scores.append(0.97)
    # A part of the name: learning_rate for peak_learning_rate, or num_train_steps for steps.
    length, its_length = len("".join(words)), len("".join(its_words))
    if set(words) <= set(its_words) | set(_words(its_section)) and set(words) & set(its_words):
        scores.append(0.6 + 0.35 * min(1.0, length / its_length))
    if set(its_words) <= set(words):
        scores.append(0.6 + 0.35 * its_length / length)
    score = max(scores)
    if score < _ENOUGH:
        return score
    if section and section == its_section:
        return score + 0.3
    return score + 0.1 * (section == its_section or _ratio(section, its_section) >= 0.7)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _words(name: str) -> list[str]:
    """Splits a name into words in lower case, without the s of a plural."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    found = re.findall(r"[a-z]+|\d+", name.lower())
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found]
