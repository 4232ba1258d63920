"""The conversation as a user has it, in a terminal or a pipe: lines in, answers out."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llada_jax.cli import entry_point
from llada_jax.config import UserError
from llada_jax.conversation.conversation import Conversation, Frame
from llada_jax.conversation.dialogue import named_file, read_record, shortened, write_record
from llada_jax.sampling import terminal

HELP = """\
/again              answer my last message again (with a temperature: otherwise)
/edit [TEXT]        change my last message: to TEXT, or in the line editor
/undo               take back my last message and its answer
/new                forget the conversation; system message and settings stay
/system [TEXT]      set the system message; alone: have none
/set [NAME VALUE]   change a setting (VALUE: or default); alone: show them
/show               show the conversation
/save [FILE]        write it as JSON; alone: where it was last saved or loaded
/save! FILE         the same in the place of another conversation
/load FILE          go on with another conversation
/help, /quit        this; leave (or Ctrl-D)

// at the beginning of a message stands for /. In a terminal a line that ends
with \\ goes on in the next. Ctrl-C stops an answer: nothing of it is kept, your
message stays for /again and /edit, or the next one takes its place."""


def line_editor() -> ModuleType | None:
    """The module that edits what `input` reads and recalls earlier lines; None if the system has none."""
    # Not with the others: it writes to some terminals when it is imported, and a pipe must stay clean.
    try:
        import readline
    except ImportError:
        return None
    return readline


@contextlib.contextmanager
def noted_signals(*numbers: int) -> Iterator[list[int]]:
    """Within it these signals are only noted, in the list: no step, and nothing that is drawn, is torn apart.

    A second one does what it would do without: Ctrl-C is a KeyboardInterrupt. Any other signal than Ctrl-C ends the
    program where the block ends, with exit code 128 + its number. What is ignored (nohup, in the background) stays so.
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, _) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    # None: of a handler that is not Python's, which could not be put back.
    mine = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]
    for number in mine:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in mine:
            signal.signal(number, before[number])
        # Instead of any other exception, too: a terminal that has gone makes some of its own.
        for number in noted:
            if number != signal.SIGINT:
                raise SystemExit(128 + number)


class Chat:
    """The conversation in a terminal or a pipe.

    Args:
      conversation: to go on with.
      longest: tokens that the model was trained with; None = unknown.
      path: the file that it comes from, if it does.
      record: what was in that file; what it has beside messages is saved again.
      as_json: answers as JSON, one line for each message.
    """

    def __init__(
        self,
        conversation: Conversation,
        longest: int | None = None,
        path: Path | None = None,
        record: dict[str, Any] | None = None,
        as_json: bool = False,
    ) -> None:
        self._conversation = conversation
        self._longest = longest
        self._path = path
        self._record = record or {}
        self._as_json = as_json
        self._warned = self._failed = False  # of the length; in any line
        self._own = set() if path is None else {os.path.realpath(path)}  # files loaded or saved: they may be replaced
        self._in_terminal = sys.stdin.isatty()
        self._editor = line_editor() if self._in_terminal and sys.stdout.isatty() else None
        self._draws = self._in_terminal and terminal.can_draw(sys.stderr)
        self._commands: dict[str, Callable[[str], None]] = {
            "/again": self._again,
            "/edit": self._edit,
            "/undo": self._undo,
            "/new": self._new,
            "/system": self._system,
            "/set": self._set,
            "/show": self._show,
            "/save": self._save,
            "/save!": self._replace,
            "/load": self._load,
            "/help": self._help,
        }
        # What is not text in the encoding of the system is replaced, in and out: it is no reason to end.
        sys.stdin.reconfigure(errors="replace", newline=None)  # None: lines may end as on other systems
        sys.stdout.reconfigure(errors="replace")

    def run(self) -> int:
        """Takes messages and commands until /quit or the end of stdin.

        Returns the exit code: in a pipe that of a user's mistake if a line could not be understood or was not answered.
        """
        if self._in_terminal:
            if self._path is not None:
                self._note(f"{len(self._conversation.messages)} messages from {self._path}: /show shows them")
            self._note("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if line.split()[:1] == ["/quit"]:
                    break
                if line.strip():
                    self._take(line)
            except EOFError:
                if self._in_terminal:
                    self._note("")
                break
            except UserError as error:
                self._failed = True
                entry_point.print_error(str(error))
            except KeyboardInterrupt:
                if not self._in_terminal:
                    raise
                self._note("")
        return entry_point.USER_ERROR if self._failed and not self._in_terminal else entry_point.FINISHED

    def _take(self, line: str) -> None:
        """Does what one line says."""
        words = line.strip()
        if words.startswith("/") and not words.startswith("//"):
            name, *rest = words.split(maxsplit=1)
            if name not in self._commands:
                raise UserError(
                    f"there is no command {shortened(name)}: /help lists them; write // for a message that begins so"
                )
            self._commands[name](*rest or [""])
        else:
            self._ask(line.removeprefix("/"), self._conversation.say)

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

    def _ask(self, message: str | None, change: Callable[[str], None] | None) -> None:
        """Has `change` make this the user's last message, and answers it; None, None = the one that is there."""
        try:
            if change is not None:
                change(message)
            message = self._conversation.last_message()
            self._answer(message)
        except UserError:
            self._put(message, None)
            raise

    def _answer(self, message: str) -> None:
        """Answers the user's last message, where it is seen, until it is done or stopped."""
        self._warn_of_length()
        frame, started = None, time.monotonic()
        with contextlib.ExitStack() as stack:
            screen = None
            # A terminal that is drawn to must be left as it was; in a pipe a program may end at once.
            others = (signal.SIGTERM, signal.SIGHUP) if self._draws else ()
            noted = stack.enter_context(noted_signals(signal.SIGINT, *others))
            if self._draws:
                stack.enter_context(terminal.unechoed(sys.stderr))
                screen = stack.enter_context(terminal.Screen(sys.stderr))
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
                self._put(message, None)
                return
            text = self._conversation.text(frame)
            status = f"{len(frame.tokens_T)} tokens, {time.monotonic() - started:.1f} s, {frame.step} steps"
            if not frame.ended:
                status += "; cut off by gen_length"
            if screen is not None:
                screen.finish([(text + "\n", "text"), (status, "status")])
        self._put(message, text)
        if screen is None and self._in_terminal:
            self._note(status)

    def _put(self, message: str | None, answer: str | None) -> None:
        """Writes the answer to a message, None = it has none, to stdout."""
        self._failed |= answer is None
        if self._as_json:
            # In ASCII: whatever the encoding, and whatever counts as the end of a line elsewhere, it is one line.
            print(json.dumps({"message": message, "answer": answer}), flush=True)
        elif answer is not None and not (self._draws and sys.stdout.isatty()):  # there it stands already
            print(terminal.harmless(answer) if sys.stdout.isatty() else answer, flush=True)

    def _spans(self, frame: Frame, screen: terminal.Screen) -> terminal.Spans:
        model, tokenizer = self._conversation.model, self._conversation.tokenizer
        given_T = np.zeros(len(frame.tokens_T), bool)
        return terminal.spans(
            frame.tokens_T, given_T, frame.new_T, model.config.mask_id, tokenizer, screen.mask, continuation=True
        )

    def _warn_of_length(self) -> None:
        """Says that the model was not trained for as many tokens; once, until there is another reason for it."""
        if self._longest is None or self._warned or (length := self._conversation.length()) <= self._longest:
            return
        self._warned = True
        self._note(
            f"the chat and gen_length are {length} tokens, the model was trained with {self._longest}: "
            "answers may get worse"
        )

    def _note(self, text: str) -> None:
        print(terminal.harmless(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def _again(self, _: str) -> None:
        self._ask(None, None)

    def _edit(self, text: str) -> None:
        if not text:
            before = self._conversation.last_message()
            if self._editor is None:
                raise UserError("/edit: write the new message after it")
            text = self._read(before)
        if text.strip():
            self._ask(text, self._conversation.edit)

    def _undo(self, _: str) -> None:
        self._conversation.undo()
        self._note(f"{len(self._conversation.messages)} messages are left")

    def _new(self, _: str) -> None:
        self._conversation.restart()
        # Of another conversation: its file is not to be replaced, nor what was said of it to be repeated.
        self._path, self._record, self._warned = None, {}, False
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
        self._warned &= name != "gen_length"
        self._note(f"{name} = {self._conversation.settings.described()[name]}")

    def _show(self, _: str) -> None:
        for message in self._conversation.messages:
            self._note(f"{message['role']}: {message['content']}")

    def _save(self, name: str, replace: bool = False) -> None:
        path = named_file(name) if name else self._path
        if path is None:
            raise UserError("/save: name a file")
        if os.path.lexists(path) and not replace and os.path.realpath(path) not in self._own:
            raise UserError(f"{shortened(path)} is there already: name another file, or replace it with /save! FILE")
        write_record(path, self._record | {"messages": self._conversation.messages})
        self._remember(path)
        self._note(f"{len(self._conversation.messages)} messages are in {path}")

    def _replace(self, name: str) -> None:
        self._save(name, replace=True)

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load: name a file")
        path = named_file(name)
        record = read_record(path)
        self._conversation.replace(record["messages"])
        self._record, self._warned = record, False
        self._remember(path)
        self._note(f"{len(self._conversation.messages)} messages from {path}: /show shows them")

    def _remember(self, path: Path) -> None:
        self._path = path
        self._own.add(os.path.realpath(path))

    def _help(self, _: str) -> None:
        self._note(HELP)
