"""Seeds known faults into a copy of the source tree, one at a time, and checks that the tests catch each of them.

    python tests/faults.py                        all faults
    python tests/faults.py mask-as-an-answer      only some of them
    python tests/faults.py --list                 what there is, without running anything
    python tests/faults.py --check                only whether all faults still apply and all their tests exist
    python tests/faults.py --jobs=2 --markdown    two faults at a time, and at the end a table in Markdown

The faults are in `tests/seeded`. Each one names the tests that should catch it. First all these tests must pass on the
unchanged copy (--no-baseline skips that). Then each fault is applied to the copy, its tests run there in a process of
their own, and the file is restored. pytest does not collect this script.

Exit code: 0 if the tests catch all faults; 1 if a fault is not caught, does not apply any more or names a test that
does not exist, or if a test fails without any fault; 2 if the command line is wrong. A fault whose tests are all
skipped on this machine cannot be tried here and is only reported.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from seeded import FAULTS
from seeded.fault import Fault

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("llada_jax", "configs", "launch", "tests", "benchmarks", "pyproject.toml", "setup.cfg", "README.md")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run of pytest said."""

    code: int | None  # pytest's exit code; None if the run took too long
    failed: list[str]  # node ids of the tests that failed
    passed: int  # number of tests that passed
    seconds: float
    output: str


class Copy:
    """A copy of the source tree in a temporary folder, in which one fault at a time is applied and restored."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                folder.mkdir(exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        self._environment = dict(os.environ, PYTHONPATH=str(folder))

    def imported(self) -> Path:
        """Returns the file that `import llada_jax` finds in the processes of this copy."""
        return Path(
            subprocess.run(
                [sys.executable, "-c", "import llada_jax; print(llada_jax.__file__)"],
                env=self._environment, cwd=self.folder.parent, capture_output=True, text=True, check=True,
            ).stdout.strip()
        )  # fmt: skip

    @contextlib.contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """Applies a fault while the context is active."""
        path = self.folder / fault.file
        original = path.read_text(encoding="utf-8")
        _write(path, original.replace(fault.old, fault.new))
        try:
            yield
        finally:
            _write(path, original)

    def pytest(self, node_ids: Sequence[str], seconds: float) -> Outcome:
        """Runs tests of the copy, for at most this many seconds."""
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-m", "not plans"]  # slow tests catch faults too
        started = time.monotonic()
        process = subprocess.Popen(
            [*command, f"--basetemp={self.folder}.tmp", *node_ids],
            env=self._environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # so that processes started by the tests can be killed with it
        )  # fmt: skip
        try:
            output, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            output, code = "", None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        failed = [
            line.split(" ", 1)[1].split(" - ")[0]
            for line in output.splitlines()
            if re.match("(FAILED|ERROR) tests/", line)
        ]
        passed = int(found[1]) if (found := re.search(r"(\d+) passed", output)) else 0
        return Outcome(code, failed, passed, time.monotonic() - started, output)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Python takes a compiled file for valid if only the size and the second of the last change are those of the source.
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)


def problems(fault: Fault) -> list[str]:
    """Returns why a fault no longer applies to the source tree, or why its tests cannot be run; [] if all is well."""
    path, found = ROOT / fault.file, []
    count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
    if count != 1:
        found.append(f"its text must occur once in {fault.file}, but occurs {count} times: the fault no longer applies")
    elif path.suffix == ".py":
        try:
            compile(path.read_text(encoding="utf-8").replace(fault.old, fault.new), fault.file, "exec")
        except SyntaxError as error:
            found.append(f"{fault.file} is no longer Python with the fault in it: {error}")
    for node_id in fault.node_ids:
        file, _, rest = node_id.partition("::")
        function = rest.partition("[")[0]
        if not (ROOT / file).is_file() or f"\ndef {function}(" not in (ROOT / file).read_text(encoding="utf-8"):
            found.append(f"there is no test {node_id}")
    return found


@dataclasses.dataclass(frozen=True)
class Result:
    """Whether the tests caught a fault."""

    fault: Fault
    outcome: Outcome

    @property
    def caught(self) -> bool:
        return self.outcome.code == 1 and bool(self.outcome.failed)

    @property
    def untried(self) -> bool:
        """Whether all tests of the fault were skipped."""
        return self.outcome.code == 0 and not self.outcome.passed

    @property
    def verdict(self) -> str:
        if self.caught:
            return "caught by " + ", ".join(self.outcome.failed)
        if self.untried:
            return "not tried: all its tests are skipped on this machine"
        if self.outcome.code is None:
            return "NOT CAUGHT: its tests take too long"
        if self.outcome.code:
            return f"NOT CAUGHT: its tests do not run\n{self.outcome.output}"
        return "NOT CAUGHT"


def short(failed: Sequence[str]) -> list[str]:
    """Returns the tests without their parameters and without the folder tests/, each with its number of cases."""
    counts = Counter(node_id.partition("[")[0].removeprefix("tests/") for node_id in failed)
    return [name if count == 1 else f"{name} ({count} cases)" for name, count in counts.items()]


def table(results: Sequence[Result], markdown: bool) -> str:
    """Returns one line for each fault, in Markdown with what it would do to a user."""
    if not markdown:
        width = max(len(result.fault.name) for result in results)
        word = {True: "caught", False: "NOT CAUGHT"}
        return "\n".join(
            f"{r.fault.name:{width}}  {r.outcome.seconds:5.0f} s  "
            + ("not tried" if r.untried else " ".join([word[r.caught], *short(r.outcome.failed)]))
            for r in results
        )
    lines = ["| Wing | Fault | What it would do | Caught by | Seconds |", "|---|---|---|---|---:|"]
    for r in results:
        tests = ", ".join(f"`{name}`" for name in short(r.outcome.failed))
        caught = tests if r.caught else "not tried here" if r.untried else "**not caught**"
        lines.append(f"| {r.fault.wing} | {r.fault.name} | {r.fault.harm} | {caught} | {r.outcome.seconds:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to seed; none means all")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    parser.add_argument("--check", action="store_true", help="check that all faults apply and all tests exist, and end")
    parser.add_argument("--jobs", type=int, default=1, help="number of faults that are tried at the same time")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that the tests of one fault may take")
    parser.add_argument("--markdown", action="store_true", help="print the table at the end in Markdown")
    options = parser.parse_args(argv)
    named = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in options.names if name not in named]:
        parser.error(f"there is no fault {unknown[0]}: --list shows all faults")
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs}: it must be at least 1")
    faults = [named[name] for name in options.names] or list(FAULTS)
    if options.list:
        for fault in faults:
            print(f"{fault.name} ({fault.file}): {fault.harm}")
        return 0
    assert len(named) == len(FAULTS), "two faults have the same name"
    wrong = [f"{fault.name}: {problem}" for fault in faults for problem in problems(fault)]
    if wrong:
        print("\n".join(wrong))
        return 1
    # The folder is resolved, because tests compare paths and the folder for temporary files may be a link.
    with tempfile.TemporaryDirectory(prefix="llada_jax_faults_") as folder:
        return run(faults, options, Path(folder).resolve())


def run(faults: Sequence[Fault], options: argparse.Namespace, folder: Path) -> int:
    """Tries faults in copies of the source tree below a folder, prints what was found, and returns the exit code."""
    copies: queue.Queue[Copy] = queue.Queue()
    for number in range(min(options.jobs, len(faults))):
        copies.put(copy := Copy(folder / str(number)))
        print(f"the tests import {(imported := copy.imported())}", flush=True)
        if imported != copy.folder / "llada_jax" / "__init__.py":
            print(f"they must import {copy.folder}: nothing was tried")
            return 1
    if options.check or not options.no_baseline:
        node_ids = sorted({node_id for fault in faults for node_id in fault.node_ids})
        copy = copies.get()
        what = ["--collect-only"] if options.check else []
        outcome = copy.pytest([*what, *node_ids], options.timeout * len(faults))
        copies.put(copy)
        if outcome.code != 0:
            print(f"{outcome.output}\nwithout any fault, the tests do not pass: nothing was tried")
            return 1
    if options.check:
        print(f"all {len(faults)} faults apply, and all their tests exist")
        return 0
    if not options.no_baseline:
        print(f"{outcome.passed} tests pass without any fault, {outcome.seconds:.0f} s", flush=True)

    def seed(fault: Fault) -> Result:
        copy = copies.get()
        try:
            with copy.with_fault(fault):
                result = Result(fault, copy.pytest(fault.node_ids, options.timeout))
        finally:
            copies.put(copy)
        print(f"{fault.name}: {result.verdict}, {result.outcome.seconds:.0f} s", flush=True)
        return result

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as executor:
        results = list(executor.map(seed, faults))
    print("\n" + table(results, options.markdown))
    missed = sum(not (result.caught or result.untried) for result in results)
    untried = sum(result.untried for result in results)
    print(
        f"\n{len(results) - missed - untried} of {len(results)} faults are caught"
        + (f", {untried} cannot be tried on this machine" if untried else "")
    )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
