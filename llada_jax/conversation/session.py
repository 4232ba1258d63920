"""Runs a conversation with a user in a terminal or a pipe: reads lines and writes answers."""

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
from llada_jax.config import NonFinite, UserError
from llada_jax.conversation.conversation import Conversation, Frame
from llada_jax.conversation.dialogue import named_file, read_record, shortened, write_record
from llada_jax.sampling import terminal
from llada_jax.sampling.watching import open_id

HELP = """\
/again              answer my last message again (differently if temperature > 0)
/edit [TEXT]        change my last message to TEXT; without TEXT, edit it
/undo               remove my last message and its answer
/new                forget the conversation; keep the system message and settings
/system [TEXT]      set the system message; without TEXT, remove it
/set [NAME VALUE]   change a setting (VALUE may be default); alone, show all
/show               show the conversation
/save [FILE]        save the conversation as JSON; without FILE, to its last file
/save! FILE         the same, even if FILE holds another conversation
/load FILE          continue the conversation in FILE
/help, /quit        show this help; leave (Ctrl-D leaves too)

To begin a message with /, write //. In a terminal, a line that ends with \\
continues on the next line. Ctrl-C stops an answer, and nothing of it is kept.
Your message stays: use /again or /edit, or replace it with your next message."""


def line_editor() -> ModuleType | None:
    """Returns the module by which `input` edits lines and recalls earlier ones, or None if the system has none."""
    # It is not imported with the others, because its import writes to some terminals, and a pipe must stay clean.
    try:
        import readline
    except ImportError:
        return None
    return readline


@contextlib.contextmanager
def noted_signals(*numbers: int) -> Iterator[list[int]]:
    """Records these signals in a list while the block runs, so that none interrupts a reverse step or a drawing.

    A second signal of the same number acts as it would without this function: Ctrl-C raises KeyboardInterrupt. A
    recorded signal other than Ctrl-C ends the program at the end of the block, with exit code 128 + its number. A
    signal that is ignored (under nohup or in the background) stays ignored.

    Args:
      *numbers: The numbers of the signals.

    Yields:
      The list of the signals received so far.
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, _) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    # getsignal returns None for a handler that was not installed by Python, which could not be restored.
    mine = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]
    for number in mine:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in mine:
            signal.signal(number, before[number])
        # This replaces any other exception too, because a terminal that was closed causes exceptions of its own.
        for number in noted:
            if number != signal.SIGINT:
                raise SystemExit(128 + number)


class Chat:
    """A session with a user in a terminal or a pipe.

    Args:
      conversation: The conversation to continue.
      longest: The number of tokens that the model was trained with. None means that it is unknown.
      path: The file that the conversation comes from, or None.
      record: The content of that file. Its keys other than "messages" are saved again with the conversation.
      as_json: Whether to write answers as JSON, one line for each message.
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
        self._warned = self._failed = False  # whether the user was warned of the length; whether any line failed
        self._own = set() if path is None else {os.path.realpath(path)}  # files loaded or saved, which may be replaced
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
        # Neither input that is not text nor output that the encoding of stdout lacks may end the program: the former is
        # replaced, the latter is written as escapes.
        sys.stdin.reconfigure(errors="replace", newline=None)  # None accepts the line ends of any system
        sys.stdout.reconfigure(errors="backslashreplace")

    def run(self) -> int:
        """Handles messages and commands until /quit or the end of stdin.

        Returns:
          The exit code. In a pipe it is `entry_point.USER_ERROR` if any line was not understood or not answered.
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
        """Handles one line, which is a command or a message."""
        words = line.strip()
        if words.startswith("/") and not words.startswith("//"):
            name, *rest = words.split(maxsplit=1)
            if name not in self._commands:
                raise UserError(
                    f"there is no command {shortened(name)}: /help lists them; to begin a message with /, write //"
                )
            self._commands[name](*rest or [""])
        else:
            self._ask(line.removeprefix("/"), self._conversation.say)

    def _read(self, text: str = "") -> str:
        """Returns the next line, in a terminal together with the lines that continue it.

        Args:
          text: The text that the line editor starts with.

        Raises:
          EOFError: At the end of the input.
        """
        lines = [self._read_line("> ", text)]
        # Only an odd number of backslashes continues a line: an even number may be part of the text, as in LaTeX.
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
        """Sets the user's last message and answers it.

        Args:
          message: The text of the message. None answers the last message as it is.
          change: The method of the conversation that sets the message, or None if `message` is None.
        """
        try:
            if change is not None:
                change(message)
            message = self._conversation.last_message()
            self._answer(message)
        except (UserError, NonFinite):
            self._put(message, None)
            raise

    def _answer(self, message: str) -> None:
        """Answers the user's last message and shows the answer until it is complete or stopped."""
        self._warn_of_length()
        frame, started = None, time.monotonic()
        with contextlib.ExitStack() as stack:
            screen = None
            # While drawing, these signals must wait until the terminal is restored. Without drawing, they act at once.
            others = (signal.SIGTERM, signal.SIGHUP) if self._draws else ()
            noted = stack.enter_context(noted_signals(signal.SIGINT, *others))
            if self._draws:
                stack.enter_context(terminal.unechoed(sys.stderr))
                screen = stack.enter_context(terminal.Screen(sys.stderr))
            with contextlib.suppress(KeyboardInterrupt) if self._in_terminal else contextlib.nullcontext():
                for frame in self._conversation.answer():
                    if screen is not None:
                        masked = int(np.sum(frame.tokens_T == open_id(self._conversation.model.config.mask_id)))
                        count = len(frame.tokens_T)
                        screen.draw(
                            self._spans(frame, screen), f"step {frame.step}, {count - masked} of {count} tokens"
                        )
                    if noted:
                        break
            if frame is None or not frame.done:
                status = "stopped: /again answers again, /edit changes your message, your next message replaces it"
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
        """Writes the answer to a message to stdout. None means that the message has no answer."""
        self._failed |= answer is None
        if self._as_json:
            # JSON in ASCII is one line in every encoding, whatever else other programs treat as the end of a line.
            print(json.dumps({"message": message, "answer": answer}), flush=True)
        elif answer is not None and not (self._draws and sys.stdout.isatty()):  # else the terminal shows it already
            print(terminal.harmless(answer) if sys.stdout.isatty() else answer, flush=True)

    def _spans(self, frame: Frame, screen: terminal.Screen) -> terminal.Spans:
        model, tokenizer = self._conversation.model, self._conversation.tokenizer
        given_T = np.zeros(len(frame.tokens_T), bool)
        return terminal.spans(
            frame.tokens_T,
            given_T,
            frame.new_T,
            open_id(model.config.mask_id),
            tokenizer,
            screen.mask,
            continuation=True,
        )

    def _warn_of_length(self) -> None:
        """Warns that the chat is longer than what the model was trained with, unless the user was already warned.

        The warning can appear again after /new, /load and a change of gen_length.
        """
        if self._longest is None or self._warned or (length := self._conversation.length()) <= self._longest:
            return
        self._warned = True
        self._note(
            f"the chat and gen_length take {length} tokens, but the model was trained with {self._longest}: "
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
                raise UserError("/edit: write the new message after the command")
            text = self._read(before)
        if text.strip():
            self._ask(text, self._conversation.edit)

    def _undo(self, _: str) -> None:
        self._conversation.undo()
        self._note(f"{len(self._conversation.messages)} messages are left")

    def _new(self, _: str) -> None:
        self._conversation.restart()
        # The new conversation must neither replace the old one's file nor be saved with the other keys of that file.
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
            raise UserError("/save: name a file, as in /save FILE")
        if os.path.lexists(path) and not replace and os.path.realpath(path) not in self._own:
            raise UserError(f"{shortened(path)} exists already: name another file, or replace it with /save! FILE")
        write_record(path, self._record | {"messages": self._conversation.messages})
        self._remember(path)
        self._note(f"{len(self._conversation.messages)} messages are in {path}")

    def _replace(self, name: str) -> None:
        self._save(name, replace=True)

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load: name a file, as in /load FILE")
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
