"""Stand-ins for what the pages of the documentation presuppose: small data and models, buckets, programs of clusters.

A stand-in for a program checks what it is given as far as that is possible without a cluster: that files exist and are
well-formed, that extras and settings exist. It prints what the next command needs, if any.
"""

import configparser
import contextlib
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "gs://BUCKET"  # what the pages call the user's bucket
PROGRAMS = [
    "pip", "pytest", "sbatch", "scontrol", "scancel", "squeue", "srun", "kubectl", "gcloud", "docker", "xpk",
    "ssh-add", "sky", "tail", "tensorboard", "mkdocs", "wandb", "nvidia-smi",
]  # fmt: skip
WORDS = "the a small quiet green tired fox engine child river walked sang ate and but never always home".split()


def environment(scratch: Path, script: Path) -> dict[str, str]:
    """Writes the programs that stand first in PATH, and returns the environment variables of the commands."""
    programs = scratch / "programs"
    programs.mkdir()
    for name in ["python", *PROGRAMS]:
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {script} --as {name} "$@"\n')
        path.chmod(0o755)
    result = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LLADA_"))}
    return result | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        # Compiled programs are kept from one call of the script to the next.
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/llada_jax/docs")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(scratch / "huggingface"),
        "LLADA_EVAL_DATA": str(scratch / "base/data/eval"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "TERM": "dumb",
        "POLL_SECONDS": "0",  # for launch/tpu_pod.sh
    }


@contextlib.contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """Yields the variables that lead commands to an emulated bucket. There is none if no emulator is installed."""
    sys.path.append(str(ROOT / "tests" / "support"))
    import bucket as emulated

    if not emulated.emulator() or not importlib.util.find_spec("gcsfs"):
        yield {}
        return
    with emulated.serve() as server:
        yield server.environment | {"DOCS_BUCKET": server.new_bucket().name}


def in_bucket(arguments: list[str]) -> list[str]:
    """Returns arguments in which the emulated bucket stands for that of the pages. Ends if they need one in vain."""
    if not any(BUCKET in argument for argument in arguments):
        return arguments
    if name := os.environ.get("DOCS_BUCKET"):
        return [argument.replace(BUCKET, f"gs://{name}") for argument in arguments]
    note("stand-in")
    sys.exit(0)


def write_inputs(folder: Path, root: Path) -> None:
    """Writes what the pages presuppose into a folder: text, chats, published models, benchmark data, couplets."""
    for name in ("configs", "launch", "benchmarks", "tests", "setup.cfg", "pyproject.toml"):
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(root / name)
    pick = random.Random(0)

    def sentence() -> str:
        return " ".join(pick.choices(WORDS, k=10)).capitalize() + "."

    for name in ("text/tales.jsonl.gz", "text/letters.jsonl.gz"):
        _write_lines(folder / name, [{"text": " ".join(sentence() for _ in range(9))} for _ in range(250)])
    told = [{"instruction": f"What does fox {i} do?", "output": sentence(), "document": i % 9} for i in range(200)]
    _write_lines(folder / "chats/chats.jsonl.gz", told)
    numbers = [{"question": f"What is {i} + {i}?", "answer": f"It is easy.\n#### {2 * i}"} for i in range(9)]
    _write_lines(folder / "data/eval/gsm8k_test.jsonl", numbers)
    _write_lines(folder / "data/eval/lambada_test.jsonl", [{"text": sentence()[:-1]} for _ in range(9)])
    choices = "Answer1: a fox Answer2: a river Answer3: a child Answer4: an engine"
    asked = f"Choose. question: Who sang?\n\n{choices}\n\nAnswer format: answer1/answer2/answer3/answer4"
    (folder / "data/eval/arc_easy_test.json").write_text(json.dumps([{"instruction": asked, "answer": "answer1"}] * 9))
    couplets = [{"first": "窈窕淑女", "second": "君子好逑"}, {"first": "如切如磋", "second": "如琢如磨"}]
    (folder / "couplets.json").write_text(json.dumps(couplets))
    for name in ("LLaDA-8B-Base", "LLaDA-8B-Instruct"):
        _write_published(folder / name)


def _write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def _write_published(folder: Path) -> None:
    """Writes a folder in the published format: three layers of random weights, and a tokenizer with LLaDA's tokens."""
    sys.path.append(str(ROOT / "tests" / "support"))
    import chat_folders  # here, because each call of a stand-in imports this module
    import tokenizers

    shutil.copytree(ROOT / "tests/parity/gqa", folder, ignore=shutil.ignore_patterns("*.npz"))
    chat_folders.make_folder(folder, chat_folders.PUBLISHED)
    id_of = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": id_of("<|endoftext|>"), "pad_token_id": id_of("<|endoftext|>")}
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": id_of("<|mdm_mask|>")}))


def note(what: str) -> None:
    """Tells docs/run_commands.py what was called."""
    with open(os.environ["NOTES"], "a") as file:
        file.write(what + "\n")


def plan(arguments: list[str]) -> None:
    """If the compiler for the hardware is not installed, runs the plan as far as it goes without, and ends."""
    topology = next((a.partition("=")[2] for a in arguments if a.startswith("--topology=")), "")
    packages = ("libtpu",) if ":" in topology and "v" in topology else ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if any(importlib.util.find_spec(name) for name in packages):
        return
    note("stand-in")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    missing = re.search(r"--topology=\S+ needs the \w+ compiler", done.stderr)
    sys.stderr.write(done.stderr)
    sys.exit(0 if missing else done.returncode)


def called(name: str, arguments: list[str]) -> int:
    """Does what the stand-in for a program does, and returns its exit code."""
    note("stand-in")
    try:
        known = {"pip": _pip, "sbatch": _sbatch, "kubectl": _kubectl, "gcloud": _gcloud, "docker": _docker, "sky": _sky}
        known.get(name, _nothing)(arguments)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def _nothing(arguments: list[str]) -> None:
    pass


def _pip(arguments: list[str]) -> None:
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
        _extras(extras)


def _extras(text: str) -> None:
    known = configparser.ConfigParser()
    known.read(ROOT / "setup.cfg")
    for extra in text.split(","):
        if extra not in known["options.extras_require"]:
            raise ValueError(f"setup.cfg has no extra {extra!r}")


def _settings(arguments: list[str]) -> None:
    """Checks that the settings of a training that a cluster would start exist."""
    from llada_jax.config import Config, leaves

    names = {name for name, _ in leaves(Config())}
    for argument in arguments:
        if (found := re.match(r"--config\.([\w.]+)=", argument)) and found[1] not in names:
            raise ValueError(f"there is no setting config.{found[1]}")
        if (found := re.match(r"--config=([^:]+)", argument)) and not Path(found[1]).is_file():
            raise ValueError(f"there is no file {found[1]}")


def _sbatch(arguments: list[str]) -> None:
    script = next((argument for argument in arguments if not argument.startswith("-")), None)
    if script is None:
        raise ValueError("no script was given")
    subprocess.run(["bash", "-n", script], check=True)
    if not os.environ.get("WORKDIR") and "WORKDIR" in Path(script).read_text():
        raise ValueError("WORKDIR is not set")
    _settings(arguments)
    print("Submitted batch job 42")


def _kubectl(arguments: list[str]) -> None:
    import yaml

    for option, file in zip(arguments, arguments[1:], strict=False):
        if option in ("-f", "--filename") and arguments[0] in ("apply", "create", "delete") and "://" not in file:
            for document in yaml.safe_load_all(Path(file).read_text()):
                for field in ("apiVersion", "kind", "metadata"):
                    if field not in document:
                        raise ValueError(f"{file}: {field} is missing")


def _gcloud(arguments: list[str]) -> None:
    """Answers as if the machines of a queued resource were there, and as if their training had finished.

    `gcloud storage cp -r FOLDER gs://BUCKET/TARGET/` copies into the emulated bucket, if there is one.
    """
    if arguments[:2] == ["storage", "cp"]:
        source, target = in_bucket(arguments[-2:])
        _, _, prefix = target.removeprefix("gs://").partition("/")
        sys.path.append(str(ROOT / "tests" / "support"))
        import bucket as emulated

        port = int(os.environ["STORAGE_EMULATOR_HOST"].rpartition(":")[2])
        server = emulated.Server(port, 0, port, "")
        emulated.Bucket(server, os.environ["DOCS_BUCKET"]).upload(source, f"{prefix}{Path(source).name}")
    if "describe" in arguments:
        print("ACTIVE")
    for argument in arguments:
        if argument.startswith("--command="):
            command = argument.removeprefix("--command=")
            subprocess.run(["bash", "-n", "-c", command], check=True)
            if "training: running" in command:
                print("training: 0")


def _sky(arguments: list[str]) -> None:
    import yaml

    if arguments[:2] == ["jobs", "launch"]:
        task = yaml.safe_load(Path(arguments[2]).read_text())
        for name, value in (pair.split("=") for pair in arguments[4::2]):
            if name not in task["envs"]:
                raise ValueError(f"{arguments[2]} has no variable {name}={value}")


def _docker(arguments: list[str]) -> None:
    if arguments[:1] == ["build"]:
        file = arguments[arguments.index("--file") + 1]
        if "FROM " not in Path(file).read_text():
            raise ValueError(f"{file} has no FROM")
        if not Path(arguments[-1]).is_dir():
            raise ValueError(f"the context {arguments[-1]} is not a folder")
        for argument in arguments:
            if argument.startswith("EXTRAS="):
                _extras(argument.removeprefix("EXTRAS="))
    if arguments[:1] == ["run"]:
        _settings([argument for argument in arguments if not argument.startswith("--config=/")])
