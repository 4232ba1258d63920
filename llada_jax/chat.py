"""Converse with a model: python -m llada_jax.chat --model=DIR

In a terminal answers are drawn while they appear, and lines are edited by readline; /help lists the commands.
Ctrl-C stops an answer, of which nothing is kept: the message stays, to be answered again (/again), changed (/edit) or
replaced by the next one. Ctrl-C at the prompt clears the line, Ctrl-D leaves.

Without a terminal every line of stdin is one message, or a command. The answers alone go to stdout, all else to
stderr; Ctrl-C between two answers ends it, with exit code 130.
"""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from absl import flags

from llada_jax import command_line, terminal
from llada_jax.config import UserError
from llada_jax.conversation import Conversation, Frame, Settings, check_dialogue, read_messages, write_messages
from llada_jax.loading import load, trained_length

_DEFAULTS = Settings()
_MODEL = flags.DEFINE_string("model", None, "A training workdir, or a folder with a published model.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of the workdir; default: its newest.")
_SYSTEM = flags.DEFINE_string("system", None, "The system message.")
_LOAD = flags.DEFINE_string("load", None, 'A conversation to go on with: {"messages": [...]}, as /save writes it.')
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
_SEED = flags.DEFINE_integer("seed", _DEFAULTS.seed, "Of the noise: equal conversations have equal answers.")

HELP = """\
/again              answer my last message again (with a temperature: otherwise)
/edit [TEXT]        change my last message: to TEXT, or in the line editor
/undo               take back my last message and its answer
/new                forget the conversation; system message and settings stay
/system [TEXT]      set the system message; alone: have none
/set [NAME VALUE]   change a setting (VALUE: or default); alone: show them
/show               show the conversation
/save [FILE]        write it as JSON; alone: where it was last saved or loaded
/load FILE          go on with another conversation
/help, /quit        this; leave (or Ctrl-D)

// at the beginning of a message stands for /. In a terminal a line that ends
with \\ goes on in the next. Ctrl-C stops an answer: nothing of it is kept, your
message stays for /again and /edit, or the next one takes its place."""


def main() -> int | None:
    """Does what the flags say; all of a user's mistakes that can be seen without the model come first."""
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
    path = None if _LOAD.value is None else Path(_LOAD.value)
    messages = [] if path is None else read_messages(path)
    if _SYSTEM.value is not None:
        check_dialogue([{"role": "system", "content": _SYSTEM.value}])
    if not _MODEL.value:
        raise UserError("--model=DIR is missing: a training workdir, or a folder with a published model")

    model, tokenizer = load(_MODEL.value, step=_STEP.value)
    if tokenizer is None:
        raise UserError(f"{_MODEL.value} has no tokenizer: put its tokenizer.json or tokenizer.model there")
    conversation = Conversation(model, tokenizer, settings, messages)
    if _SYSTEM.value is not None:
        conversation.instruct(_SYSTEM.value)
    try:
        Chat(conversation, trained_length(_MODEL.value), path).run()
    except BrokenPipeError:
        # Who reads the answers has gone. Python would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return command_line.FAILURE


def line_editor() -> ModuleType | None:
    """The module that edits what `input` reads and recalls earlier lines; None if the system has none."""
    # Not with the others: it writes to some terminals when it is imported, and a pipe must stay clean.
    try:
        import readline
    except ImportError:
        return None
    return readline


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Within it a Ctrl-C is only noted, in the list: no step is torn apart. A second one is a KeyboardInterrupt."""
    noted: list[int] = []

    def note(number: int, _) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """The conversation in a terminal or a pipe.

    Args:
      conversation: to go on with.
      longest: tokens that the model was trained with; None = unknown.
      path: the file of the conversation, if it has one.
    """

    def __init__(self, conversation: Conversation, longest: int | None, path: Path | None) -> None:
        self._conversation = conversation
        self._longest = longest
        self._path = path
        self._in_terminal = sys.stdin.isatty()
        self._editor = line_editor() if self._in_terminal and sys.stdout.isatty() else None
        self._draws = self._in_terminal and terminal.can_draw(sys.stderr)
        self._commands = {
            "/again": self._again,
            "/edit": self._edit,
            "/undo": self._undo,
            "/new": self._new,
            "/system": self._system,
            "/set": self._set,
            "/show": self._show,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
        }
        # What is not text in the encoding of the system is replaced, in and out: it is no reason to end.
        sys.stdin.reconfigure(errors="replace", newline=None)  # None: lines may end as on other systems
        sys.stdout.reconfigure(errors="replace")

    def run(self) -> None:
        """Takes messages and commands until /quit or the end of stdin."""
        if self._in_terminal:
            if self._path is not None:
                self._note(f"{len(self._conversation.messages)} messages from {self._path}: /show shows them")
            self._note("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if line == "/quit":
                    return
                if line.strip():
                    self._take(line)
            except EOFError:
                if self._in_terminal:
                    self._note("")
                return
            except UserError as error:
                command_line.print_error(str(error))
            except KeyboardInterrupt:
                if not self._in_terminal:
                    raise
                self._note("")

    def _take(self, line: str) -> None:
        """Does what one line says."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                raise UserError(f"there is no command {name}: /help lists them; write // for a message that begins so")
            self._commands[name](rest.strip())
        else:
            self._conversation.say(line.removeprefix("/"))
            self._answer()

    def _read(self, text: str = "") -> str:
        """The next line, in a terminal with those it goes on in; `text` is there to be edited. EOFError at the end."""
        lines = [self._read_line("> ", text)]
        # An even number of backslashes is what some write at the end of a line, as in LaTeX.
        while self._in_terminal and (len(lines[-1]) - len(lines[-1].rstrip("\\"))) % 2:
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line("  ", ""))
        return "\n".join(lines)

    def _read_line(self, prompt: str, text: str) -> str:
        if self._editor is not None:
            self._editor.set_startup_hook(lambda: self._editor.insert_text(text))
            try:
                return input(prompt)
            finally:
                self._editor.set_startup_hook(None)
        if self._in_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _answer(self) -> None:
        """Answers the user's last message, where it is seen, until it is done or stopped."""
        self._warn_of_length()
        frame, started = None, time.monotonic()
        with contextlib.ExitStack() as stack:
            screen = None
            if self._draws:
                stack.enter_context(terminal.unechoed(sys.stderr))
                screen = stack.enter_context(terminal.Screen(sys.stderr))
            noted = stack.enter_context(noted_interrupts())
            with contextlib.suppress(KeyboardInterrupt) if self._in_terminal else contextlib.nullcontext():
                for frame in self._conversation.answer():
                    if screen is not None:
                        masked = int(np.sum(frame.tokens_T == self._conversation.model.config.mask_id))
                        count = len(frame.tokens_T)
                        screen.draw(
                            self._spans(frame, screen), f"step {frame.step}, {count - masked} of {count} tokens"
                        )
                    if noted:
                        break
            if frame is None or not frame.done:
                status = "stopped: /again answers again, /edit changes your message, the next one takes its place"
                if screen is not None and frame is not None:
                    screen.finish([*self._spans(frame, screen), ("\n" + status, "status")])
                else:
                    self._note(status)
                return
            text = self._conversation.text(frame)
            status = f"{len(frame.tokens_T)} tokens, {time.monotonic() - started:.1f} s, {frame.step} steps"
            if not frame.ended:
                status += "; cut off by gen_length"
            if screen is not None:
                screen.finish([(text + "\n", "text"), (status, "status")])
        if screen is None or not sys.stdout.isatty():  # else it stands there already
            print(terminal.harmless(text) if sys.stdout.isatty() else text, flush=True)
        if screen is None and self._in_terminal:
            self._note(status)

    def _spans(self, frame: Frame, screen: terminal.Screen) -> terminal.Spans:
        model, tokenizer = self._conversation.model, self._conversation.tokenizer
        given_T = np.zeros(len(frame.tokens_T), bool)
        return terminal.spans(
            frame.tokens_T, given_T, frame.new_T, model.config.mask_id, tokenizer, screen.mask, continuation=True
        )

    def _warn_of_length(self) -> None:
        """Says once that the model was not trained for as many tokens."""
        if self._longest is not None and (length := self._conversation.length()) > self._longest:
            self._note(
                f"the chat and gen_length are {length} tokens, the model was trained with {self._longest}: "
                "answers may get worse"
            )
            self._longest = None

    def _note(self, text: str) -> None:
        print(terminal.harmless(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def _again(self, _: str) -> None:
        self._answer()

    def _edit(self, text: str) -> None:
        before = self._conversation.last_message()
        if not text:
            if self._editor is None:
                raise UserError("/edit: write the new message after it")
            text = self._read(before)
        if text.strip():
            self._conversation.edit(text)
            self._answer()

    def _undo(self, _: str) -> None:
        self._conversation.undo()
        self._note(f"{len(self._conversation.messages)} messages are left")

    def _new(self, _: str) -> None:
        self._conversation.restart()
        self._note("a new conversation")

    def _system(self, text: str) -> None:
        self._conversation.instruct(text)
        self._note("the system message is set" if text else "no system message")

    def _set(self, text: str) -> None:
        name, *value = re.split(r"[\s=]+", text, maxsplit=1)
        if not name:
            self._note(
                "\n".join(f"{name} = {value}" for name, value in self._conversation.settings.described().items())
            )
            return
        self._conversation.set(name, *value or [""])
        self._note(f"{name} = {self._conversation.settings.described()[name]}")

    def _show(self, _: str) -> None:
        for message in self._conversation.messages:
            self._note(f"{message['role']}: {message['content']}")

    def _save(self, name: str) -> None:
        path = self._path if not name else Path(name).expanduser()
        if path is None:
            raise UserError("/save: name a file")
        write_messages(path, self._conversation.messages)
        self._path = path
        self._note(f"{len(self._conversation.messages)} messages are in {path}")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load: name a file")
        path = Path(name).expanduser()
        self._conversation.replace(read_messages(path))
        self._path = path
        self._note(f"{len(self._conversation.messages)} messages from {path}: /show shows them")

    def _help(self, _: str) -> None:
        self._note(HELP)


if __name__ == "__main__":
    command_line.run(main)
