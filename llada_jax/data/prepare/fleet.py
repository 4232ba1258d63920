"""Prepares text on a fleet of machines, by Apache Beam: the same set, byte for byte, as prepare_text.py writes.

How the bytes come out the same. A document never spans files, so each input file is a unit of work that one worker
reads and tokenises as the local way does, into one file of tokens per split. What a row holds depends on the files
before it only by their number of tokens. So, when all files are tokenised, sums of these numbers say which stretches of
which token files make up each shard, and each shard is a unit of work for one worker.

  1  the filters, if there are any: each file is judged; duplicates are found by grouping the documents by their keys
  2  the launcher reads the input up to the first document that is held out, which settles the bound of the hashes
  3  each input file is tokenised
  4  each shard is packed and written
  5  the launcher writes the manifest

Unfinished work lies in the folder OUTPUT.unfinished, which all workers must see. The same command, started again, goes
on with what is there: a file that is tokenised or a shard that is written is not made again. On local or shared
folders, OUTPUT appears at the end, whole. On object storage, shards are written where they belong, and the
manifest last: a folder without a manifest is no set. Tokens in OUTPUT.unfinished take 6 bytes each (8 for vocabularies
above 65,536).
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax.cli import outputs
from llada_jax.config import UserError
from llada_jax.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Filtered,
    FilteredSource,
    Manifest,
    Source,
    Split,
)
from llada_jax.data.prepare import fleet_work, runners, storage
from llada_jax.data.prepare.filters import Filters
from llada_jax.data.prepare.fleet_work import Job, Settled, Tokenised
from llada_jax.data.prepare.held_out import held_out_below
from llada_jax.data.prepare.judge import EXAMPLES, check_some_left
from llada_jax.data.prepare.left_out import Faults
from llada_jax.data.prepare.output import check_numbers, cores, id_dtype, refuse_existing
from llada_jax.data.prepare.prepare_text import TextSettings, text_manifest
from llada_jax.data.prepare.text import STDLIB, Corpus
from llada_jax.text.agreement import notes_of
from llada_jax.text.tokenizer import Tokenizer, load_tokenizer

_FORMAT = 1  # of the unfinished work


def prepare_on_fleet(
    inputs: Sequence[str],
    output: str,
    *,
    tokenizer: str,
    runner: str = "direct",
    runner_options: str = "",
    **settings: Any,
) -> Manifest:
    """Prepares a set of text as `prepare_text.prepare` does, by Apache Beam.

    Args:
      inputs: As for `prepare`; also files or globs on object storage.
      output: A folder that all workers see, or a URL such as gs://BUCKET/set.
      tokenizer: As for `prepare`. It cannot be trained here.
      runner: A name in `runners.RUNNERS`. "direct" works on this machine.
      runner_options: Beam's own options for the runner, as on a command line. All runners but the direct one are told
        here how many workers they have; the direct one has such options too (--direct_num_workers,
        --direct_running_mode).
      **settings: Fields of `TextSettings`, as for `prepare`.

    Returns:
      The manifest of the set.

    Raises:
      UserError: As `prepare`; if Beam is missing; or if OUTPUT.unfinished is the work of another preparation.
    """
    given = TextSettings(**settings)
    filters = given.filters
    _check(inputs, output, runner)
    runners.pipeline(runner, runner_options)  # so that mistakes in the options are found before any work
    target = None if storage.is_remote(output) else Path(os.path.abspath(output))
    check_numbers(given.sequence_length, given.validation_fraction, given.workers, given.shard_rows)
    place = str(target or output.rstrip("/"))
    corpus = Corpus(inputs, given.text_key, given.on_error)
    loaded, dtype = _tokenizer(tokenizer, given.progress)
    work = f"{place}.unfinished"
    job = Job(
        work,
        f"{work}/set" if target else place,
        given.sequence_length,
        dtype,
        loaded.eos_id,
        given.rows(dtype),
        given.text_key,
        given.on_error,
        filters.checked(),
        identity="",
    )
    files = [(source, str(file), *storage.stamp(file)) for source, file in corpus.files]
    evaluation = filters.described([], {}).decontaminate
    # Not on_error: after a bad document, on_error="skip" may go on with the files that are done.
    fixed = job._replace(on_error="")
    identity = repr((_FORMAT, tuple(inputs), files, loaded.sha256, given.validation_fraction, fixed, evaluation))
    own = runner == "direct" and "direct_running_mode" not in runner_options  # one process of Beam, with our workers
    workers = given.workers or cores() if own else 1
    job = job._replace(identity=hashlib.sha256(identity.encode()).hexdigest(), workers=workers)
    with outputs.write_errors(output), _ownership(job, place):
        _save_tokenizer(loaded, f"{work}/{TOKENIZER_FOLDER}")
        job = _with_evaluation_files(job)
        storage.save(f"{work}/inputs", (tuple(inputs), corpus.files))
        run = partial(_run, job, runner, runner_options, given.progress)
        settled = _judge(run, job, len(files)) if filters.active else []
        check_some_left(_added(corpus, settled))
        below = held_out_below(_texts(job, len(files)), given.validation_fraction, corpus.inputs)
        tokenised = run("tokens", len(files), partial(fleet_work.tokenise, job, below))
        plans = fleet_work.plan_shards(job, tokenised)
        storage.save(f"{work}/plans", plans)
        shards = [shard for _, shard in run("shards", len(plans), partial(fleet_work.write_shard, job))]
        manifest = text_manifest(
            loaded,
            sequence_length=given.sequence_length,
            validation_fraction=given.validation_fraction,
            validation_below=below,
            train=_split(0, tokenised, plans, shards),
            validation=_split(1, tokenised, plans, shards),
            sources=_sources(corpus, tokenised),
            left_out=_faults(job, tokenised).checked(sum(each.good for each in tokenised), "documents"),
            filtered=_filtered(filters, corpus, settled, tokenised) if filters.active else None,
        )
        _publish(job, loaded, target, manifest)
    return manifest


def _check(inputs: Sequence[str], output: str, runner: str) -> None:
    """Raises UserError if this runner cannot prepare these inputs into this output."""
    if runner not in runners.RUNNERS:
        raise UserError(f"runner={runner}: choose one of {', '.join(runners.RUNNERS)}")
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise UserError("runner needs the package apache-beam: pip install 'llada_jax[beam]'") from error
    if not output:
        raise UserError("output is missing: name the folder to write")
    if runner != "direct" and STDLIB in inputs:
        raise UserError(f"input {STDLIB} means the files of this machine: use runner=direct, or name files")
    if runner == "dataflow" and not all(map(storage.is_remote, (*inputs, output))):
        raise UserError("runner=dataflow: its workers see no folder of this machine; give input and output on gs://")
    if not storage.is_remote(output):
        refuse_existing(Path(os.path.abspath(output)))
    else:
        there = output.rstrip("/")
        if storage.exists(f"{there}/{MANIFEST_FILE}"):
            raise UserError(f"output {output} is already a prepared set: remove it or name another folder")
        if storage.find(f"{there}/*") and not storage.exists(f"{there}.unfinished/plan"):
            raise UserError(f"output {output} exists and is not an empty folder: name another folder")


def _tokenizer(path: str, progress: bool) -> tuple[Tokenizer, str]:
    loaded = load_tokenizer(path)
    for line in notes_of(loaded, path) if progress else ():
        print(line, file=sys.stderr)
    return loaded, id_dtype(loaded)


def _save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Writes the files of a tokenizer, on object storage, too."""
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save(local)
        storage.copy_folder(local, folder)


def _with_evaluation_files(job: Job) -> Job:
    """Copies the files of evaluation sets to where all workers see them."""
    copies = []
    for number, file in enumerate(job.filters.decontaminate):
        copies.append(f"{job.work}/evaluation/{number}-{os.path.basename(file)}")
        with storage.whole(copies[-1]) as copy:
            copy.write(Path(file).read_bytes())
    return job._replace(filters=job.filters._replace(decontaminate=tuple(copies)))


@contextlib.contextmanager
def _ownership(job: Job, place: str) -> Iterator[None]:
    """Makes the folder for unfinished work, or takes over one that the same command has left.

    Raises:
      UserError: If it belongs to another preparation, or if another process of this machine works on it.
    """
    if not storage.is_remote(job.work):
        os.makedirs(job.work, exist_ok=True)
    plan = f"{job.work}/plan"
    if (identity := storage.load(plan)) not in (None, job.identity):
        raise UserError(
            f"{job.work} is the unfinished work of a preparation with other inputs or settings: finish that one with "
            f"its own command, or remove the folder"
        )
    if storage.is_remote(job.work):
        storage.save(plan, job.identity)
        yield
        return
    with open(f"{job.work}/{outputs.LOCK_FILE}", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output {place}: another process is preparing it") from None
        except OSError:
            pass  # a file system without locks
        if identity is None:
            storage.save(plan, job.identity)
        yield


def _run(
    job: Job, runner: str, runner_options: str, progress: bool, kind: str, count: int, work: Callable
) -> list[Any]:
    """Runs a function for the numbers from 0 to `count` - 1 on the fleet.

    Returns:
      The results, sorted.

    Raises:
      UserError: If a unit of work says that the preparation must fail: what the first of them says. Also if a worker
        could not read or write a file.
    """
    import apache_beam as beam

    path = f"{job.work}/{kind}.done"
    pipeline = runners.pipeline(runner, runner_options)
    if progress:
        print(f"{kind}: {count:,} units of work on {runner}", file=sys.stderr, flush=True)
    numbers = pipeline | beam.Create(range(count)) | beam.Reshuffle()
    results = numbers | f"make {kind}" >> beam.Map(work) if kind != "verdicts" else work(numbers)
    _ = results | beam.combiners.ToList() | beam.Map(partial(_save_list, path))
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:
        kept = f"{job.work} keeps what is finished: the same command goes on with it"
        if isinstance(error, OSError) or runner != "direct":  # a fleet's error is text, and its traceback not ours
            what = "a worker" if runner == "direct" else runner
            raise UserError(f"{what} failed: {_shortened(str(error))}; {kept}") from error
        error.add_note(kept)
        raise
    finally:
        fleet_work.close()
    found = sorted(storage.load(path), key=lambda result: result[0])
    if len(found) != count:
        raise RuntimeError(f"{runner} has returned {len(found)} results of {count} for {kind}")
    for each in found:
        if error := getattr(each, "error", ""):
            raise UserError(error)
    return found


def _shortened(text: str) -> str:
    """Returns a text as one line, of a long one the beginning and the end: a traceback's last line says what failed."""
    line = " ".join(text.split())
    return line if len(line) <= 1000 else f"{line[:200]} ... {line[-800:]}"


def _save_list(path: str, results: list[Any]) -> None:
    storage.save(path, results)


def _judge(run: Callable, job: Job, count: int) -> list[Settled]:
    """Runs the filters over all files."""
    import apache_beam as beam

    def work(numbers: Any) -> Any:
        return (
            numbers
            | "judge" >> beam.FlatMap(partial(fleet_work.judge_file, job))
            | "by key" >> beam.GroupByKey()
            | "repeated" >> beam.FlatMap(fleet_work.repeated)
            | "by file" >> beam.GroupByKey()
            | "settle" >> beam.Map(partial(fleet_work.settle, job))
        )

    done = storage.load(f"{job.work}/verdicts.done")
    if done and not any(each.error for each in done):
        return sorted(done, key=lambda each: each.index)
    return run("verdicts", count, work)


def _texts(job: Job, count: int) -> Iterator[str]:
    """Yields the pieces that say something and that are kept, and then checks that not too many documents are bad."""
    faults, good, items = Faults(job.on_error), 0, 0
    for index in range(count):
        corpus = job.corpus(index)
        yield from (piece.text for piece in corpus if not piece.blank and not piece.removed)
        faults.merge(corpus.faults.found, items)
        good, items = good + corpus.good, items + corpus.items
    faults.checked(good, "documents")


def _faults(job: Job, tokenised: Sequence[Tokenised]) -> Faults:
    """Returns the bad documents of all files."""
    faults, items = Faults(job.on_error), 0
    for each in tokenised:
        faults.merge(each.faults, items)
        items += each.items
    return faults


def _split(
    split: int, tokenised: Sequence[Tokenised], plans: Sequence[fleet_work.ShardPlan], shards: Sequence[Any]
) -> Split:
    tokens, size, documents = (sum(each.splits[split][i] for each in tokenised) for i in range(3))
    own = tuple(shard for plan, shard in zip(plans, shards, strict=True) if plan.split == split)
    return Split(sum(shard.rows for shard in own), tokens, size, documents, own)


def _sources(corpus: Corpus, tokenised: Sequence[Tokenised]) -> tuple[Source, ...]:
    totals = np.sum([each.counts for each in tokenised], axis=0, dtype=np.int64)
    return tuple(Source(name, corpus.file_count(i), *map(int, totals[i])) for i, name in enumerate(corpus.inputs))


def _filtered(filters: Filters, corpus: Corpus, settled: Sequence[Settled], tokenised: Sequence[Tokenised]) -> Filtered:
    examples: dict[str, tuple[str, ...]] = {}
    for each in tokenised:
        for reason, found in each.examples.items():
            examples[reason] = (*examples.get(reason, ()), *found)[:EXAMPLES]
    return filters.described(_added(corpus, settled), dict(sorted(examples.items())))


def _added(corpus: Corpus, settled: Sequence[Settled]) -> list[FilteredSource]:
    """Returns what the filters left out of each input, over all its files."""
    result = []
    for source, name in enumerate(corpus.inputs):
        parts = [each.sources[source] for each in settled]
        removed = sum((Counter(part.removed) for part in parts), Counter())
        result.append(
            FilteredSource(
                name, sum(part.documents for part in parts), dict(removed), sum(part.lines for part in parts)
            )
        )
    return result


def _publish(job: Job, tokenizer: Tokenizer, target: Path | None, manifest: Manifest) -> None:
    """Makes the set appear: by a rename, or on object storage by its manifest. Removes the unfinished work."""
    _save_tokenizer(tokenizer, f"{job.output}/{TOKENIZER_FOLDER}")
    with storage.whole(f"{job.output}/{MANIFEST_FILE}") as file:
        file.write(manifest.to_json().encode())
    if target is None:
        storage.remove(job.work)
        return
    for folder, _, _ in os.walk(job.output):
        outputs.sync(folder)
    try:
        outputs.publish(Path(job.output), target)
    except UserError:
        refuse_existing(target)
        raise
    storage.remove(job.work)
