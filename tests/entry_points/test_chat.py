"""Runs the chat program as a person uses it, in a pseudo-terminal, and as a shell script does, in pipes."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from paths import PARITY
from platforms import ON_CPU

from llada_jax.conversation.conversation import Conversation, Settings
from llada_jax.conversation.session import Chat, noted_signals
from llada_jax.sampling import terminal

FLAGS = ["--gen_length=12", "--block_length=4", "--temperature=0.9", "--seed=5"]
SETTINGS = Settings(gen_length=12, block_length=4, temperature=0.9, seed=5)
STOPPED = "stopped: /again"


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """Returns a copy of the tests' model whose config.json says that it was trained with 80 tokens."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_sequence_length": 80}))
    return folder


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """Resets these signals: a background process that runs the tests may ignore them, and its children would too."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*arguments, **options):
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "llada_jax.chat", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **options)


def piped(*arguments):
    return start(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answered(talk):
    *_, last = talk.answer()
    return talk.text(last) + "\n"


@ON_CPU
def test_in_a_pipe_every_line_is_a_message_or_a_command(folder, loaded, tmp_path):
    path, old = tmp_path / "chat.json", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path.write_text(json.dumps({"messages": old}, indent=2))
    lines = ["def main", "", "/set steps many", "/set\ttemperature=0.5", " /again ", "//x \\", "/what", "/edit"]
    lines += ["/load no", "/set steps 7", "/edit\ty", "/system Be brief.", "/again", "/save", "/undo", "/show"]
    lines += ["/new", "last \ufffd", "/quit ", "more"]
    with piped(f"--model={folder}", *FLAGS, "--system=Hello", f"--load={path}") as child:
        stdout, stderr = child.communicate("\r\n".join(lines).encode().replace("\ufffd".encode(), b"\xff"))
    assert child.returncode == 2, stderr.decode()
    talk = Conversation(*loaded, SETTINGS, old)
    talk.instruct("Hello")
    talk.say("def main")
    expected = answered(talk)
    talk.set("temperature", "0.5")
    expected += answered(talk)
    talk.say("/x \\")
    expected += answered(talk)
    talk.set("steps", "7")
    talk.edit("y")
    expected += answered(talk)
    talk.instruct("Be brief.")
    expected += answered(talk)
    saved = json.loads(path.read_text())
    assert saved == {"messages": talk.messages} and len(talk.messages) == 7
    talk.restart()
    talk.say("last \ufffd")
    expected += answered(talk)
    assert stdout.decode() == expected
    notes = stderr.decode()
    assert "\x1b" not in notes and STOPPED not in notes
    errors = [line for line in notes.splitlines() if line.startswith("error: ")]
    words = ["steps=many", "no command /what", "write the new message after the command", "no cannot be read"]
    assert [word in error for word, error in zip(words, errors, strict=True)] == [True] * 4, errors
    assert "temperature = 0.5\n" in notes and f"7 messages are in {path}\n" in notes and "user: def main\n" in notes
    assert notes.count("the model was trained with 80") == 1


class Lines:
    """Runs `Chat` in this process, without flags, on lines of a stdin that is not a terminal."""

    def __init__(self, monkeypatch, capsys, loaded, settings=SETTINGS):
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.talk = Conversation(*loaded, settings)

    def __call__(self, *lines, **options):
        """Returns the exit code, stdout and the lines of stderr."""
        text = "".join(line + "\n" for line in lines).encode()
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        self.monkeypatch.setattr(sys, "stdout", stdout := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        code = Chat(self.talk, **options).run()
        return code, stdout.buffer.getvalue().decode(), self.capsys.readouterr().err.splitlines()


@pytest.fixture
def take(monkeypatch, capsys, loaded):
    return Lines(monkeypatch, capsys, loaded)


def test_as_json_every_message_is_one_line(take, loaded):
    lines = ["/again", "/edit x", "é", "/again", "/set temperature 0", "/edit x y", "/show", "/edit", "/undo", "/what"]
    code, stdout, _ = take(*lines, as_json=True)
    talk, answers = Conversation(*loaded, SETTINGS), []
    talk.say("é")
    answers += [answered(talk)[:-1], answered(talk)[:-1]]
    talk.set("temperature", "0")
    talk.edit("x y")
    answers.append(answered(talk)[:-1])
    messages = [None, "x", "é", "é", "x y"]
    assert stdout.isascii() and [json.loads(line) for line in stdout.splitlines()] == [
        {"message": message, "answer": answer} for message, answer in zip(messages, [None, None, *answers], strict=True)
    ]
    assert code == 2
    assert take("x", "/again", "/quit", "/what", as_json=True)[0] == 0


def test_an_answer_that_is_stopped_counts_as_none(take, monkeypatch):
    def stopped(talk):
        for frame in answer(talk):
            if talk.last_message() == "x" and frame.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield frame

    answer = Conversation.answer
    monkeypatch.setattr(Conversation, "answer", stopped)
    code, stdout, notes = take("x", "y", as_json=True)
    first, second = map(json.loads, stdout.splitlines())
    assert code == 2 and first == {"message": "x", "answer": None} and second["message"] == "y" and second["answer"]
    assert len(notes) == 1 and STOPPED in notes[0]
    monkeypatch.undo()


def test_only_files_of_this_conversation_are_replaced(take, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for name in "abc":
        Path(name).write_text(json.dumps({"id": name, "messages": old, "tags": [1]}))
    code, _, notes = take("/load a", "/undo", "/save", "/save ./a", "/save b", "/save d", "/save d", "/load a", "/new")
    assert code == 2 and notes[4] == "error: b exists already: name another file, or replace it with /save! FILE"
    assert not [note for note in notes if note.startswith("error")][1:]
    assert json.loads(Path("a").read_text()) == {"id": "a", "messages": [], "tags": [1]}
    assert Path("d").read_text() == Path("a").read_text() and json.loads(Path("b").read_text())["messages"] == old
    # After /new the conversation belongs to no file.
    code, _, notes = take(
        "/load a", "/new", "/save", "/save! b", "/save! nothing/x", f"/save! {'x' * 300}", "/save ~no/"
    )
    errors = ["name a file", "cannot be written: No such file or directory", "File name too long", "~no/ cannot be"]
    found = [note for note in notes if note.startswith("error")]
    assert [word in error for word, error in zip(errors, found, strict=True)] == [True] * 4, found
    assert code == 2 and json.loads(Path("b").read_text()) == {"messages": []}
    # The file of --load may be replaced from the start.
    assert take("/save", "/save c", path=Path("c"), record={"id": "c"})[0] == 0
    assert json.loads(Path("c").read_text()) == {"id": "c", "messages": []}
    assert sorted(os.listdir()) == ["a", "b", "c", "d"]


def test_what_is_too_long_for_the_model_is_said_again_of_another_conversation(take, tmp_path):
    lines = ["x", "y", "/again", "/new", "x", "/set steps 3", "/again", "/set gen_length 11", "/again"]
    lines += [f"/save {tmp_path / 'a'}", f"/load {tmp_path / 'a'}", "/again"]
    code, _, notes = take(*lines, longest=1)
    warned = ["trained with 1:" in note for note in notes]
    after = [notes[at - 1] if at else "" for at, found in enumerate(warned) if found]
    assert code == 0 and after[:3] == ["", "a new conversation", "gen_length = 11"] and "messages from" in after[3]
    assert len(after) == 4


def test_long_words_are_not_repeated(take):
    _, _, notes = take("/" + "x" * 500, "/load " + "y" * 500, "/set steps " + "9" * 500)
    assert len(notes) == 3 and max(map(len, notes)) < 220


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_ended_while_drawing_leaves_the_terminal_first(number):
    left, second = [], []
    before = signal.signal(number, lambda number, _: second.append(number))
    try:
        with pytest.raises(SystemExit) as raised, noted_signals(signal.SIGINT, number) as noted:
            with contextlib.ExitStack() as stack:
                stack.callback(left.append, "left")
                os.kill(os.getpid(), number)
                assert noted == [number] and not left and not second
                os.kill(os.getpid(), number)  # a second signal acts at once, for a sender who cannot wait
                assert noted == second == [number] and not left
                raise OSError("the terminal has gone")
        assert raised.value.code == 128 + number and left
    finally:
        signal.signal(number, before)


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted_signals(signal.SIGINT) as noted:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
        assert not noted and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt), noted_signals(signal.SIGINT) as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


class Terminal:
    """The chat program in a pseudo-terminal of its own."""

    def __init__(self, *arguments):
        self.end, inside = pty.openpty()
        # Ctrl-C goes to the foreground program, so the program needs a session with this terminal as its terminal.
        program = "import os, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        program += "os.execv(sys.executable, [sys.executable, '-m', 'llada_jax.chat', *sys.argv[1:]])"
        environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=inside, stdout=inside, stderr=inside, env=environment,
        )  # fmt: skip
        os.close(inside)
        self.written = b""

    def until(self, text: str, seconds: float = 120.0) -> str:
        """Returns the output up to and including this text, and leaves the output after it for the next call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.written:
            assert time.monotonic() < end, f"waited in vain for {text!r} after {self.written.decode(errors='replace')}"
            if select.select([self.end], [], [], 0.5)[0]:
                self.written += os.read(self.end, 65536)
        seen, found, self.written = self.written.partition(text.encode())
        return (seen + found).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def wait_for_the_editor(self) -> None:
        """Waits until the program sleeps, and so waits for keys.

        Python's line editor misses a signal that comes after it has printed its prompt and before it waits for keys.
        """
        stat, end = Path(f"/proc/{self.child.pid}/stat"), time.monotonic() + 120
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "the program does not wait for keys"
            time.sleep(0.01)


def plain(text):
    """Returns the text without terminal codes and with plain line ends."""
    return re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


@pytest.fixture
def open_terminal():
    opened = []

    def make(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield make
    for each in opened:
        each.child.kill()
        each.child.wait()
        os.close(each.end)


def test_a_terminal_is_left_as_it_was_by_sigterm(folder, open_terminal):
    screen = open_terminal(f"--model={folder}", "--gen_length=3000", "--block_length=3000")
    screen.until("> ")
    screen.type("x\r")
    screen.until("step 1, ")
    assert not termios.tcgetattr(screen.end)[3] & termios.ECHO
    screen.child.send_signal(signal.SIGTERM)
    screen.until("\x1b[?25h")  # the cursor is visible again
    assert screen.child.wait(120) == 143
    assert termios.tcgetattr(screen.end)[3] & termios.ECHO


@ON_CPU
def test_a_talk_in_a_terminal(folder, loaded, open_terminal, tmp_path):
    path = tmp_path / "chat.json"
    screen = open_terminal(f"--model={folder}", *FLAGS)
    screen.until("> ")
    screen.type("def \\\rmain\r")  # the backslash continues the message on a second line
    seen = screen.until(" s, 12 steps")
    talk = Conversation(*loaded, SETTINGS)
    talk.say("def \nmain")
    answer = answered(talk)
    assert "░" * 12 in seen and "step 1, " in seen and "\x1b[2F" in seen
    assert terminal.harmless(answer) in plain(seen) and "12 tokens, " in seen

    screen.until("> ")
    screen.wait_for_the_editor()
    screen.type("not sent\x03")
    screen.until("> ")
    screen.type("/set gen_length 2000\r/set block_length 2000\rx\r")
    screen.until("step 2, ")
    screen.type("early")
    drawn = screen.until("step 4, ")
    screen.type("\x03")
    drawn += screen.until(STOPPED)
    assert "early" not in drawn and "░" in drawn[drawn.rindex("step ") :]
    screen.type("/set gen_length 12\r/set block_length 4\r/edit\r")
    screen.until("> x")
    screen.type("y\r")  # is appended to the text in the line editor
    seen = screen.until("12 steps")
    talk.say("xy")
    assert terminal.harmless(answered(talk)) in plain(seen)
    screen.type(f"/save {path}\r")
    screen.until("4 messages are in")
    assert json.loads(path.read_text()) == {"messages": talk.messages}
    screen.until("> ")  # earlier, the terminal itself would take Ctrl-D as the end of a line, and it would be lost
    screen.type("\x04")
    assert screen.child.wait(120) == 0


def test_ctrl_c_in_a_pipe_stops_the_answer_then_the_program(folder, loaded):
    # The answer is so long that it is not complete before the signal arrives.
    with piped(f"--model={folder}", "--gen_length=3000", "--block_length=3000") as child:
        child.stdin.write(b"x\n/set gen_length 12\n/set block_length 4\ny\n")
        child.stdin.flush()
        # The folder's files name different ids for EOS. After that line comes the warning about the length, and after
        # it the answer begins.
        assert b"EOS is 500 in the model's config.json, but 2 " in child.stderr.readline()
        child.stderr.readline()
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        notes = [child.stderr.readline().decode() for _ in range(3)]
        assert STOPPED in notes[0] and notes[1:] == ["gen_length = 12\n", "block_length = 4\n"]
        talk = Conversation(*loaded, dataclasses.replace(SETTINGS, temperature=0.0, seed=0))
        talk.say("y")
        expected = answered(talk).encode()
        assert child.stdout.read(len(expected)) == expected
        time.sleep(0.5)  # now the program waits for a line
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130 and child.stderr.read() == b"interrupted\n"


def test_nobody_reads_the_answers(folder):
    with piped(f"--model={folder}", *FLAGS) as child:
        child.stdout.close()
        child.stdin.write(b"x\ny\n")
        child.stdin.close()
        notes = child.stderr.read().decode()
        assert child.wait(120) == 1 and "EOS is 500 in" in notes and notes.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "closed", "words"),
    [
        # This mistake is found before the model is loaded.
        (["--model=nowhere", "--load=~/nothing.json"], "", "home/nothing.json cannot be read"),
        (["--model=nowhere"], "<&-", "stdin is closed"),
        (["--model=nowhere"], ">&-", "stdout is closed"),
        ([f"--model={PARITY / 'mha'}"], "", "has no tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, closed, words):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "llada_jax.chat", *arguments]
    done = subprocess.run(command, env=os.environ | {"HOME": "/no/home"}, input=b"x\n", capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert words in done.stderr.decode() and done.stderr.count(b"\n") == 1
