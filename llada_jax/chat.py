"""Converse with a model: python -m llada_jax.chat --model=DIR

In a terminal answers are drawn while they appear, and lines are edited by readline; /help lists the commands.
Ctrl-C stops an answer, of which nothing is kept: the message stays, to be answered again (/again), changed (/edit) or
replaced by the next one. Ctrl-C at the prompt clears the line, Ctrl-D leaves.

Without a terminal every line of stdin is one message, or a command. The answers alone go to stdout, all else to
stderr. An answer may have several lines: with --json each is one, {"message": ..., "answer": ...}, for each message,
/again and /edit TEXT; null if it was stopped or is impossible. The exit code is 2 if any line could not be understood
or was not answered; Ctrl-C between two answers ends it, with exit code 130.
"""

import os
import sys

from absl import flags

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.conversation import dialogue
from llada_jax.conversation.conversation import Conversation, Settings
from llada_jax.conversation.session import Chat
from llada_jax.loading import load, trained_length

_DEFAULTS = Settings()
_MODEL = flags.DEFINE_string("model", None, "A training workdir, or a folder with a published model.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the workdir; default: its newest.")
_SYSTEM = flags.DEFINE_string("system", None, "The system message.")
_LOAD = flags.DEFINE_string("load", None, 'A conversation to go on with: {"messages": [...]}, as /save writes it.')
_JSON = flags.DEFINE_boolean("json", False, 'Answers on stdout as lines of {"message": ..., "answer": ...}.')
_STEPS = flags.DEFINE_integer("steps", None, "Reverse steps of an answer; default: one for each token.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", _DEFAULTS.gen_length, "Tokens of the longest answer.")
_BLOCK_LENGTH = flags.DEFINE_integer("block_length", _DEFAULTS.block_length, "Tokens per block, left to right.")
_TEMPERATURE = flags.DEFINE_float("temperature", _DEFAULTS.temperature, "0 = always the most probable token.")
_REMASKING = flags.DEFINE_string("remasking", _DEFAULTS.remasking, "Which predictions stay: low_confidence or random.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", _DEFAULTS.cfg_scale, "Guidance towards the chat; doubles the time.")
_LOGITS_EOS_INF = flags.DEFINE_boolean("logits_eos_inf", False, "Never choose EOS: all of gen_length becomes text.")
_CONFIDENCE_EOS_EOT_INF = flags.DEFINE_boolean(
    "confidence_eos_eot_inf", False, "EOS and end of turn stay only where nothing else can."
)
_SEED = flags.DEFINE_integer("seed", _DEFAULTS.seed, "Of the noise: equal sessions have equal answers.")


def main() -> int:
    """Does what the flags say; all of a user's mistakes that can be seen without the model come first."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            raise UserError(f"{name} is closed: there is no conversation without it")
    settings = Settings(
        steps=_STEPS.value,
        gen_length=_GEN_LENGTH.value,
        block_length=_BLOCK_LENGTH.value,
        temperature=_TEMPERATURE.value,
        remasking=_REMASKING.value,
        cfg_scale=_CFG_SCALE.value,
        logits_eos_inf=_LOGITS_EOS_INF.value,
        confidence_eos_eot_inf=_CONFIDENCE_EOS_EOT_INF.value,
        seed=_SEED.value,
    ).checked()
    path = None if _LOAD.value is None else dialogue.named_file(_LOAD.value)
    record = {"messages": []} if path is None else dialogue.read_record(path)
    if _SYSTEM.value is not None:
        dialogue.check_dialogue([{"role": "system", "content": _SYSTEM.value}])
    if not _MODEL.value:
        raise UserError("--model=DIR is missing: a training workdir, or a folder with a published model")

    model, tokenizer = load(_MODEL.value, step=_STEP.value)
    if tokenizer is None:
        raise UserError(f"{_MODEL.value} has no tokenizer: put its tokenizer.json or tokenizer.model there")
    conversation = Conversation(model, tokenizer, settings, record["messages"])
    if _SYSTEM.value is not None:
        conversation.instruct(_SYSTEM.value)
    try:
        return Chat(conversation, trained_length(_MODEL.value), path, record, _JSON.value).run()
    except BrokenPipeError:
        # Who reads the answers has gone. Python would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return entry_point.FAILURE


if __name__ == "__main__":
    entry_point.run(main)
