"""The workdir of a run, wherever it lies: a folder, or a folder of a bucket with a working copy on this machine.

A bucket has no append and no rename. The checkpoints and the frozen weights are written into it directly (by Orbax).
Everything else that a run writes stays small, so it is written into files on this machine, as for any other workdir,
and the files that have changed are uploaded whole:

  before a checkpoint is saved    so that the metrics in the bucket always reach as far as the checkpoint does
  every UPLOAD_SECONDS            so that others can watch the run
  when the run ends

At the start, the working copy is made anew from the bucket, and the records beyond the step where the run resumes are
removed from it. The bucket gets the shortened file at the next upload, so no step ever appears in it twice.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from llada_jax.data.sets import SET
from llada_jax.devices import distributed
from llada_jax.formats import published
from llada_jax.formats.workdir import PUBLISHED_FILES, TOKENIZER
from llada_jax.storage import copies, objects
from llada_jax.storage.lease import Lease
from llada_jax.storage.objects import Place

UPLOAD_SECONDS = 60.0
# What a start needs of what earlier starts have written. The data set is used where it lies.
_CONTINUED = (published.CONFIG, "metrics.jsonl", "samples.txt", "starts.jsonl", "wandb_id")
_CONTINUED_FOLDERS = (f"{TOKENIZER}/", f"{PUBLISHED_FILES}/")


class Home:
    """The workdir of a run. This class is for a local or mounted folder, where there is nothing to upload."""

    def __init__(self, path: Place, folder: Path):
        """Names the two places.

        Args:
          path: Where the workdir lies; Orbax writes there.
          folder: The folder on this machine that process 0 writes all other files into. Outside a bucket it is `path`.
        """
        self.path, self.folder = path, folder

    def check(self) -> None:
        """Raises LeaseLost if another process has taken the workdir over."""

    def upload(self) -> None:
        """Brings all files that have changed into the bucket. Raises LeaseLost as `check`, or StorageFailed."""

    def close(self) -> None:
        """Ends what runs in the background, and gives the workdir back."""


class BucketHome(Home):
    """The workdir of a run in a bucket, in process 0, which owns it."""

    def __init__(self, path: Place, used: str, report: Callable[[str], None]):
        """Takes the lease of the workdir and makes the working copy.

        Args:
          path: The address of the workdir.
          used: What error messages call the workdir.
          report: A function that is called with one line of text about the lease, or about an upload that failed.

        Raises:
          UserError: If another process owns the workdir, or if the bucket cannot be used.
          StorageFailed: If the bucket does not answer.
        """
        super().__init__(path, working_copy(path))
        self._report = report
        self.lease = Lease(path / "lock", used, report, alone=distributed.count() == 1)
        try:
            self._stamps: dict[str, tuple[int, int]] = {}  # what the bucket holds: modification time and size
            self._fetch()
        except BaseException:
            self.lease.release()
            raise
        self._uploading, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="upload", daemon=True)
        self._thread.start()

    def _fetch(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)  # a child of a killed run may still write a file
        there = [name for prefix in _CONTINUED_FOLDERS for name in self._names(prefix)]
        for name in (*_CONTINUED, *there):
            with contextlib.suppress(FileNotFoundError):
                content = objects.read(self.path / name)
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(content)
                self._stamps[name] = _stamp(self.folder / name)

    def _names(self, prefix: str) -> list[str]:
        return [prefix + name for name in objects.names(self.path / prefix)]

    def check(self) -> None:
        self.lease.check()

    def upload(self) -> None:
        with self._uploading:
            self.lease.confirm()
            found = self._files()
            changed = {name for name, stamp in found.items() if self._stamps.get(name) != stamp}
            written = objects.write_all(self.path, {name: self.folder / name for name in changed})
            for name in changed - written:  # removed since, by another program that writes here, such as wandb's own
                del found[name]
            self._stamps |= {name: found[name] for name in written}
            for name in self._stamps.keys() - found.keys():
                objects.delete(self.path / name)
                del self._stamps[name]

    def _files(self) -> dict[str, tuple[int, int]]:
        """Returns the stamps of the files that belong into the bucket."""
        found = {}
        for folder, _, names in os.walk(self.folder):  # which passes over folders that are removed meanwhile
            for path in (Path(folder) / name for name in names if not name.endswith(".tmp")):
                name = path.relative_to(self.folder).as_posix()
                if name.split("/")[0] != SET and path.is_file() and not path.is_symlink():
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = _stamp(path)
        return found

    def _keep(self) -> None:
        while not self._end.wait(UPLOAD_SECONDS):
            try:
                self.upload()
            except Exception as error:  # the upload before the next checkpoint stops the run if it fails, too
                self._report(f"{self.path} is not up to date: {' '.join(str(error).split())[:300]}")

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self.lease.release()


def working_copy(path: Place) -> Path:
    """Returns the folder on this machine for the files of a workdir in a bucket."""
    return copies.cache("runs") / hashlib.sha256(str(path).encode()).hexdigest()[:24]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
