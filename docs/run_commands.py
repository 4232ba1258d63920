"""Runs the commands on the pages of the documentation: python docs/run_commands.py [PAGE...] [--keep]

Without a PAGE, it reads README.md and docs/*.md. It runs the `bash` and `python` blocks of each page in order, in one
scratch folder per page, and two pages at a time. Programs named `python`, `pip`, `sbatch` and so on, which stand first
in PATH, receive these commands: `python` makes them small by the rules in RULES and runs them; those of clusters are
stand-ins (docs/stand_ins.py), which only check what they are given. For gs://BUCKET stands an emulator, if installed.

In the pages:
    # exit code 2                      a comment in or directly above a command: the exit code that it must have
    <!-- not run: REASON -->           directly before a block: the block is not run, but listed with its reason
    <!-- run first: own_data.md -->    on a page: it begins with the files that the other page left
    <!-- the commands in this table are run -->    before a table: so are `python ...` in its cells, but for those that
                                       another page has word for word, which are run there

The exit code is 1 if a command has not ended as it should, and otherwise 0. --keep keeps the scratch folder.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import stand_ins

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOT_PAGES = {"results.md", "settings.md"}  # results.md reports commands that take hours; settings.md is generated
SECONDS = 300  # the longest time that a command may take

# What a `python` command is changed to: (a pattern that the command must match, {flag: the value that replaces its
# value}, flags that are inserted right after the name of the program or, for training, after --config). An inserted
# flag applies only where the page does not set it. Every rule that matches is applied.
SMALL_MODEL = [
    f"--config.model.{name}" for name in ("layers=1", "width=64", "heads=4", "kv_heads=4", "feed_forward=64")
]
RULES: list[tuple[str, dict[str, str], list[str]]] = [
    (
        r"-m llada_jax\.prepare",
        {"--sequence_length": "128", "--train_tokenizer": "400"},
        ["--sequence_length=128", "--workers=1"],
    ),
    (r"-m llada_jax\.prepare .*--input=stdlib", {"--input": "text/letters.jsonl.gz"}, []),
    (
        r"-m llada_jax\.train",
        {
            "--config.steps": "2",
            "--config.batch_size": "8",
            "--config.sequence_length": "128",
            "--config.optimizer.schedule": "((0, 0.0), (1.0, 1.0))",
            "--config.data.train_tokenizer": "400",
            "--config.init_step": "2",
            "--config.validation.rows": "8",
            "--config.model.width": "64",
            "--config.model.heads": "4",
            "--config.model.kv_heads": "4",
            "--config.model.feed_forward": "64",
        },
        [
            "--config.steps=2", "--config.batch_size=8", "--config.sequence_length=128", "--config.accumulation=1",
            "--config.optimizer.schedule=((0, 0.0), (1.0, 1.0))", "--config.compute.loss_chunk=128",
            "--config.compute.unroll=1", "--config.validation.rows=8", "--config.validation.samples=1",
            "--config.logging.every=1", "--config.data.workers=1", "--config.sampling.gen_length=8",
            "--config.sampling.prompts=('The fox',)",
        ],
    ),
    # Autoregressive models have no such settings.
    (
        r"-m llada_jax\.train (?!.*configs/arm)",
        {},
        ["--config.sampling.steps=2", "--config.sampling.block_length=8"],
    ),
    # Models that are tuned, or start from a published one, take the architecture of that model.
    (r"-m llada_jax\.train (?!.*(configs/8b.*init_from|configs/\w*sft))", {}, SMALL_MODEL),
    # configs/8b.py names the ids of LLaDA's vocabulary, which the small published folder does not have.
    (
        r"-m llada_jax\.train .*configs/8b\.py.*init_from",
        {"--config": "configs/small_sft.py"},
        ["--config.diffusion.objective=pretrain"],
    ),
    # A run that continues another run needs more steps than that run had.
    (r"-m llada_jax\.train .*init_from", {"--config.steps": "4"}, ["--config.steps=4"]),
    (
        r"-m llada_jax\.train .*configs/quickstart",
        {},
        ["--config.data.input=text/*.jsonl.gz", "--config.data.train_tokenizer=400"],
    ),
    (
        r"-m llada_jax\.(sample|chat|evaluate)",
        {"--steps": "4", "--gen_length": "8", "--block_length": "8", "--step": "2", "--mc_samples": "2"},
        ["--gen_length=8", "--block_length=8"],
    ),
    # The rules of --commit but the schedule need no number of steps, and refuse it.
    (r"-m llada_jax\.(sample|chat|evaluate)(?!.*--commit=)", {}, ["--steps=4"]),
    (r"-m llada_jax\.convert", {"--step": "2"}, []),
    (r"-m llada_jax\.evaluate(?!.*--list)", {"--limit": "2", "--max_length": "192"}, ["--limit=2", "--mc_samples=2"]),
    # The tasks of lm_eval would be downloaded; the same tasks on local files are not.
    (
        r"-m llada_jax\.evaluate .*(--recipe=|--tasks=(?!reversal|\w*_local|text_local))",
        {"--tasks": "gsm8k_local", "--num_fewshot": "1"},
        ["--tasks=gsm8k_local", "--include_path=benchmarks/eval", "--num_fewshot=1"],
    ),
    # Splash needs heads of 128; a plan for the topology on the page itself would take minutes.
    (
        r"-m llada_jax\.plan",
        {"--topology": "v5p:2x2x1"},
        [
            "--config.mesh.fsdp=4", "--config.batch_size=8", "--config.accumulation=1", "--config.sequence_length=128",
            "--config.compute.loss_chunk=128", "--config.model.layers=1", "--config.model.width=128",
            "--config.model.heads=1", "--config.model.kv_heads=1", "--config.model.feed_forward=128",
        ],
    ),
    # More devices than cores wait for each other in every collective.
    (r"launch/local\.py", {"--devices": "1"}, []),
    (r"benchmarks/tuning\.py", {"--rows": "4", "--samples": "1", "--answers": "1"}, []),
]  # fmt: skip


@dataclasses.dataclass
class Block:
    """A block of commands on a page."""

    line: int  # the number of its first line of text
    language: str
    text: str
    reason: str | None  # why it is not run; None = it is run
    in_table: bool = False  # whether it is a cell of a table


@dataclasses.dataclass
class Page:
    """A page and its blocks."""

    path: Path
    first: str | None  # the page whose files this page begins with
    blocks: list[Block]

    @property
    def name(self) -> str:
        return self.path.name


@dataclasses.dataclass
class Result:
    """How one command ended."""

    place: str
    command: str
    kind: str  # run, stand-in, not run, or failed
    seconds: float = 0.0
    told: str = ""


def read_page(path: Path) -> Page:
    """Reads a page. Raises ValueError if a block has no language, because then nobody knows whether it is run."""
    lines = path.read_text(encoding="utf-8").split("\n")
    first = re.search(r"^<!-- run first: (\S+) -->", "\n".join(lines), re.M)
    blocks, reason, table, at = [], None, False, 0
    while at < len(lines):
        if lines[at].startswith("|") and table:
            blocks += [
                Block(at + 1, "bash", command, None, in_table=True)
                for command in re.findall(r"`(python [^`]+)`", lines[at])
            ]
        elif lines[at].strip():
            table = "<!-- the commands in this table are run -->" in lines[at]
        if found := re.match(r"(\s*)(`{3,})\s*(\w*)", lines[at]):
            fence, language = found[2], found[3]
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence)
            if not language:
                raise ValueError(f"{path.name}:{at + 1}: the block has no language: write bash, python or text")
            if language in ("bash", "python"):
                text = textwrap.dedent("\n".join(lines[at + 1 : end]))
                blocks.append(Block(at + 2, language, text, reason))
            at, reason = end + 1, None
            continue
        if found := re.match(r"\s*<!-- not run: (.+) -->", lines[at]):
            reason = found[1]
        elif lines[at].strip():
            reason = None
        at += 1
    return Page(path, first[1] if first else None, blocks)


def commands(block: Block) -> list[tuple[int, str, int]]:
    """Splits a bash block into its commands: (number of the line, command, the exit code that it must have)."""
    result, held, code, begun = [], "", 0, block.line
    for number, line in enumerate(block.text.split("\n"), block.line):
        if found := re.search(r"#.*\bexit code (\d+)", line):
            code = int(found[1])
        if not held and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begun = begun if held else number
        held += line + "\n"
        if not line.endswith("\\") and _is_whole(held):
            result.append((begun, held.strip(), code))
            held, code = "", 0
    if held:
        raise ValueError(f"line {begun}: the command does not end: {held.strip()}")
    return result


def _is_whole(command: str) -> bool:
    """Returns whether a command has the ends of all its quotes and here-documents."""
    if found := re.search(r"<<-?\s*['\"]?(\w+)", command):
        return f"\n{found[1]}\n" in command
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def _plain(command: str) -> str:
    return " ".join(command.replace("\\\n", " ").split())


def leave_to_others(pages: list[Page]) -> None:
    """Gives each command in a table that stands on another page too, word for word, the reason that it is run there."""
    places = {}
    for page in pages:
        for block in page.blocks:
            if block.language == "bash" and not block.in_table and block.reason is None:
                for line, command, _ in commands(block):
                    places[_plain(command)] = f"{page.name}:{line}"
    for page in pages:
        for block in page.blocks:
            if block.in_table and (place := places.get(_plain(block.text))):
                block.reason = f"it is run for {place}"


def small(arguments: list[str]) -> list[str]:
    """Returns the arguments of a `python` command, made small by RULES."""
    for pattern, replaced, inserted in RULES:
        if not re.search(pattern, " ".join(arguments)):
            continue
        arguments = [
            f"{name}={replaced[name]}" if (name := argument.split("=")[0]) in replaced else argument
            for argument in arguments
        ]
        at = next((i for i, argument in enumerate(arguments) if argument.startswith("--config=")), None)
        at = next((i for i, a in enumerate(arguments) if a.startswith("llada_jax.")), 0) if at is None else at
        given = {argument.split("=")[0] for argument in arguments}
        new = [flag for flag in inserted if flag.split("=")[0] not in given]  # a tuple given twice would be joined
        arguments = [*arguments[: at + 1], *new, *arguments[at + 1 :]]
    return arguments


def run_python(arguments: list[str]) -> None:
    """Replaces this process by `python` with the small form of the arguments."""
    arguments = small(stand_ins.in_bucket(arguments))
    if "llada_jax.plan" in arguments:
        stand_ins.plan(arguments)
    stand_ins.note("python")
    # The folder of this script must not be where Python looks for modules.
    os.execv(sys.executable, [sys.executable, *arguments])


class Runner:
    """Runs the commands of one page in a scratch folder."""

    def __init__(self, page: Page, folder: Path, environment: dict[str, str]):
        self.page, self.folder = page, folder
        self._environment = environment | {"NOTES": str(folder / ".notes")}

    def run(self) -> list[Result]:
        """Runs all blocks of the page, also after a failure."""
        results = []
        for block in self.page.blocks:
            place = f"{self.page.name}:{block.line}"
            if block.reason is not None:
                results.append(Result(place, block.text.strip().split("\n")[0], "not run", told=block.reason))
                print(f"{place}: not run: {block.reason}", flush=True)
            elif block.language == "python":
                script = self.folder / f"block_{block.line}.py"
                script.write_text(block.text, encoding="utf-8")
                results.append(self._one(place, f"python {script.name}", 0))
            else:
                for line, command, code in commands(block):
                    results.append(self._one(f"{self.page.name}:{line}", command, code))
        return results

    def _one(self, place: str, command: str, code: int) -> Result:
        notes, state, cwd = (self.folder / name for name in (".notes", ".environment", ".cwd"))
        notes.write_text("")
        # Exported variables and the current folder last from one command of a page to the next.
        script = (
            f"[ ! -f {state} ] || source {state}; [ ! -f {cwd} ] || cd -- \"$(cat {cwd})\"; set -o pipefail\n"
            f"{command}\n"
            f"code=$?; export -p >{state}; pwd >{cwd}; exit $code"
        )  # fmt: skip
        started = time.monotonic()
        try:
            done = subprocess.run(
                ["bash", "-c", script], cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
            )  # fmt: skip
            returned, output = done.returncode, done.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as error:
            returned, output = None, (error.stdout or b"").decode(errors="replace")
        called = notes.read_text().split()
        kind = "stand-in" if called and "python" not in called else "run"
        result = Result(place, command, kind if returned == code else "failed", time.monotonic() - started)
        if returned != code:
            ended = f"it did not end within {SECONDS} s" if returned is None else f"exit code {returned}, not {code}"
            result.told = f"{ended}\n{textwrap.indent(output[-3000:].strip(), '    ')}"
        print(f"{place}: {result.kind}, {result.seconds:.1f} s: {_plain(command)[:110]}", flush=True)
        return result


def run_pages(pages: list[Page], scratch: Path) -> list[Result]:
    """Runs the pages, two at a time, each after the page that it names."""
    with stand_ins.bucket() as variables:
        return _run_pages(pages, scratch, stand_ins.environment(scratch, Path(__file__).resolve()) | variables)


def _run_pages(pages: list[Page], scratch: Path, environment: dict[str, str]) -> list[Result]:
    base = scratch / "base"
    stand_ins.write_inputs(base, ROOT)
    done: dict[str, concurrent.futures.Future] = {}

    def run(page: Page) -> list[Result]:
        if page.first:
            done[page.first].result()
        folder = scratch / page.path.stem
        shutil.copytree(scratch / Path(page.first).stem if page.first else base, folder, symlinks=True)
        for name in (".environment", ".cwd"):
            (folder / name).unlink(missing_ok=True)
        return Runner(page, folder, environment).run()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        # Pages that others wait for come first; so a page never waits for one that has not been handed out.
        awaited = {page.first for page in pages}
        for page in sorted(pages, key=lambda page: (_depth(page, pages), page.name not in awaited)):
            done[page.name] = pool.submit(run, page)
        return [result for page in pages for result in done[page.name].result()]


def _depth(page: Page, pages: list[Page]) -> int:
    return 1 + _depth(next(p for p in pages if p.name == page.first), pages) if page.first else 0


def choose(names: list[str]) -> list[Page]:
    """Returns the pages with these names (all if there are none), and the pages that they begin with."""
    paths = {path.name: path for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
    pages = {name: read_page(path) for name, path in paths.items() if name not in NOT_PAGES}
    wanted = [Path(name).name for name in names] or list(pages)
    for name in wanted:
        if name not in pages:
            raise ValueError(f"there is no page {name}; the pages are {', '.join(pages)}")
        if pages[name].first and pages[name].first not in wanted:
            wanted.append(pages[name].first)
    chosen = [pages[name] for name in wanted if pages[name].blocks]
    leave_to_others(chosen)
    return chosen


def main() -> int:
    """Runs the pages that are named on the command line, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="names of pages; none = all")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        pages = choose(options.pages)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scratch = Path(tempfile.mkdtemp(prefix="llada_jax_docs_"))
    try:
        results = run_pages(pages, scratch)
    finally:
        if options.keep:
            print(f"the files are in {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    kinds = [result.kind for result in results]
    for result in results:
        if result.kind == "failed":
            print(f"\n{result.place}: {result.command}\n    {result.told}")
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("run", "stand-in", "not run", "failed"))
    print(f"\n{len(pages)} pages, {len(results)} commands: {counts}; {time.monotonic() - started:.0f} s")
    return int("failed" in kinds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        name, *rest = sys.argv[2:]
        if name == "python":
            run_python(rest)
        sys.exit(stand_ins.called(name, rest))
    sys.exit(main())
