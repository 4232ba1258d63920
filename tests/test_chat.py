"""The program as a person and as a shell script use it: in a pseudo-terminal and in pipes."""

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
import time
from pathlib import Path

import pytest

import llada_jax
from llada_jax import completion, terminal
from llada_jax.conversation import Conversation, Settings
from llada_jax.tokenizer import train_tokenizer

PARITY = Path(__file__).parent / "parity"
FLAGS = ["--gen_length=12", "--block_length=4", "--temperature=0.9", "--seed=5"]
SETTINGS = Settings(gen_length=12, block_length=4, temperature=0.9, seed=5)
STOPPED = "stopped: /again"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights, trained, it says, with 80 tokens, and a tokenizer of 400."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    shutil.copytree(PARITY / "gqa", folder)
    train_tokenizer([Path(completion.__file__).read_text()], 400, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_sequence_length": 80}))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return llada_jax.load(folder)


def start(*arguments, **options):
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "llada_jax.chat", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **options)


def piped(*arguments):
    return start(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answered(talk):
    *_, last = talk.answer()
    return talk.text(last) + "\n"


def test_in_a_pipe_every_line_is_a_message_or_a_command(folder, loaded, tmp_path):
    path, old = tmp_path / "chat.json", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path.write_text(json.dumps({"messages": old}, indent=2))
    lines = ["def main", "", "/set steps many", "/set temperature=0.5", "/again", "//x \\", "/what", "/edit"]
    lines += ["/load no", "/set steps 7", "/edit y", "/system Be brief.", "/again", "/save", "/undo", "/show"]
    lines += ["/new", "last \ufffd", "/quit", "more"]
    with piped(f"--model={folder}", *FLAGS, "--system=Hello", f"--load={path}") as child:
        stdout, stderr = child.communicate("\r\n".join(lines).encode().replace("\ufffd".encode(), b"\xff"))
    assert child.returncode == 0, stderr.decode()
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
    words = ["steps=many", "no command /what", "write the new message after it", "no cannot be read"]
    assert [word in error for word, error in zip(words, errors, strict=True)] == [True] * 4, errors
    assert "temperature = 0.5\n" in notes and f"7 messages are in {path}\n" in notes and "user: def main\n" in notes
    assert notes.count("the model was trained with 80") == 1


class Terminal:
    """The program in a terminal of its own."""

    def __init__(self, *arguments):
        self.end, inside = pty.openpty()
        # Ctrl-C is for the program in the foreground: it needs a session whose terminal this is.
        program = "import os, sys, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        program += "os.execv(sys.executable, [sys.executable, '-m', 'llada_jax.chat', *sys.argv[1:]])"
        environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=inside, stdout=inside, stderr=inside, env=environment,
        )  # fmt: skip
        os.close(inside)
        self.written = b""

    def until(self, text: str, seconds: float = 60.0) -> str:
        """What is written up to and with this text; what comes after it is left for the next."""
        end = time.monotonic() + seconds
        while text.encode() not in self.written:
            assert time.monotonic() < end, f"waited in vain for {text!r} after {self.written.decode(errors='replace')}"
            if select.select([self.end], [], [], 0.5)[0]:
                self.written += os.read(self.end, 65536)
        seen, found, self.written = self.written.partition(text.encode())
        return (seen + found).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())


def plain(text):
    """Without codes and line ends of the terminal."""
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


def test_a_talk_in_a_terminal(folder, loaded, open_terminal, tmp_path):
    path = tmp_path / "chat.json"
    screen = open_terminal(f"--model={folder}", *FLAGS)
    screen.until("> ")
    screen.type("def \\\rmain\r")  # goes on in a second line
    seen = screen.until(" s, 12 steps")
    talk = Conversation(*loaded, SETTINGS)
    talk.say("def \nmain")
    answer = answered(talk)
    assert "░" * 12 in seen and "step 1, " in seen and "\x1b[2F" in seen
    assert terminal.harmless(answer) in plain(seen) and "12 tokens, " in seen

    screen.until("> ")
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
    screen.type("y\r")  # after what stands there
    seen = screen.until("12 steps")
    talk.say("xy")
    assert terminal.harmless(answered(talk)) in plain(seen)
    screen.type(f"/save {path}\r")
    screen.until("4 messages are in")
    assert json.loads(path.read_text()) == {"messages": talk.messages}
    screen.type("\x04")
    assert screen.child.wait(30) == 0


def test_ctrl_c_in_a_pipe_stops_the_answer_then_the_program(folder, loaded):
    # So long an answer that it is not done before the signal.
    with piped(f"--model={folder}", "--gen_length=3000", "--block_length=3000") as child:
        child.stdin.write(b"x\n/set gen_length 12\n/set block_length 4\ny\n")
        child.stdin.flush()
        child.stderr.readline()  # that this is long: from there on the answer is on its way
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        notes = [child.stderr.readline().decode() for _ in range(3)]
        assert STOPPED in notes[0] and notes[1:] == ["gen_length = 12\n", "block_length = 4\n"]
        talk = Conversation(*loaded, dataclasses.replace(SETTINGS, temperature=0.0, seed=0))
        talk.say("y")
        expected = answered(talk).encode()
        assert child.stdout.read(len(expected)) == expected
        time.sleep(0.5)  # now it waits for a line
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130 and child.stderr.read() == b"interrupted\n"


def test_nobody_reads_the_answers(folder):
    with piped(f"--model={folder}", *FLAGS) as child:
        child.stdout.close()
        child.stdin.write(b"x\ny\n")
        child.stdin.close()
        notes = child.stderr.read().decode()
        assert child.wait(60) == 1 and notes == ""


def test_lines_broken_anew_by_a_narrower_terminal_are_erased_too(monkeypatch):
    class Stream(io.StringIO):
        def fileno(self):
            return 2

    monkeypatch.setattr(os, "get_terminal_size", lambda _: size)
    size = 20, 10
    with terminal.Screen(stream := Stream()) as screen:
        screen.draw([("漢" * 9 + "\n\n" + "x" * 30, "text")], "status")
        size = 9, 10
        stream.seek(0), stream.truncate()
        screen.draw([("x", "text")], "status")
        # 18, 0, 19, 11 and 6 cells in lines of 9.
        assert stream.getvalue().startswith(f"\x1b[{2 + 1 + 3 + 2 + 1}F\x1b[J")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=nowhere", "--load=nothing.json"], "nothing.json cannot be read"),  # before the model is looked for
        ([f"--model={PARITY / 'mha'}"], "has no tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words):
    with piped(*arguments) as child:
        stdout, stderr = child.communicate(b"x\n")
    assert child.returncode == 2 and stdout == b""
    assert words in stderr.decode() and stderr.count(b"\n") == 1
