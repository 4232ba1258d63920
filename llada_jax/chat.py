"""Converses with a model: python -m llada_jax.chat --model=DIR

In a terminal, answers are drawn while they appear, and readline edits the lines; /help lists the commands. Ctrl-C
stops an answer and discards it. Your message stays: /again answers it again, /edit changes it, and the next message
replaces it. Ctrl-C at the prompt clears the line, and Ctrl-D leaves.

Without a terminal, every line of stdin is one message or one command. Only the answers go to stdout, everything else
goes to stderr. An answer may have several lines; --json prints one line {"message": ..., "answer": ...} instead for
each message, /again and /edit TEXT, with null if the answer was stopped or is impossible. The exit code is 2 if a line
could not be understood or was not answered. Ctrl-C between two answers ends the program with exit code 130.
"""

import sys

from absl import flags

from llada_jax.cli import entry_point, model_flags, sampler_flags, streams
from llada_jax.config import UserError

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(sampler_flags)
_SYSTEM = flags.DEFINE_string("system", None, "The system message.")
_LOAD = flags.DEFINE_string(
    "load", None, 'A file with a conversation to continue: {"messages": [...]}, as /save writes it.'
)
_JSON = flags.DEFINE_boolean("json", False, 'Print answers to stdout as lines {"message": ..., "answer": ...}.')


def main() -> int:
    """Converses as the flags say. Mistakes that can be found without the model are reported before it is loaded."""
    for name in ("stdin", "stdout"):
        if getattr(sys, name) is None:
            raise UserError(f"{name} is closed: a conversation needs it, so start the program with {name} open")
    with entry_point.importing():
        from llada_jax.conversation import dialogue
        from llada_jax.conversation.conversation import Conversation, Settings
        from llada_jax.conversation.session import Chat
        from llada_jax.formats.workdir import trained_length
        from llada_jax.loading import load_with_tokenizer
        from llada_jax.sampling import lengths

    given = sampler_flags.given()
    if given.get("gen_length") == lengths.AUTO:
        given = lengths.automatic(given, lengths.automatic_limit(trained_length(model_flags.model())))
    settings = Settings(**given).checked()
    path = None if _LOAD.value is None else dialogue.named_file(_LOAD.value)
    record = {"messages": []} if path is None else dialogue.read_record(path)
    if _SYSTEM.value is not None:
        dialogue.check_dialogue([{"role": "system", "content": _SYSTEM.value}])
    folder = model_flags.model()

    model, tokenizer = load_with_tokenizer(folder, step=model_flags.STEP.value, weights=model_flags.WEIGHTS.value)
    conversation = Conversation(model, tokenizer, settings, record["messages"])
    if _SYSTEM.value is not None:
        conversation.instruct(_SYSTEM.value)
    try:
        return Chat(conversation, trained_length(folder), path, record, _JSON.value).run()
    except BrokenPipeError:  # the reader of the answers, or of the notes on stderr, has gone
        streams.drop(sys.stdout)
        streams.drop(sys.stderr)
        return entry_point.FAILURE


if __name__ == "__main__":
    entry_point.run(main)
