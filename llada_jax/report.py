"""Reports on a training run: python -m llada_jax.report --workdir=runs/150m --output=report.html

Reads starts.jsonl, metrics.jsonl and samples.txt of a workdir, and says where the time of the run went, what every
start did, and which settings changed. With --output it also writes a page with the curves of the run and its samples,
which refers to no other file. The run may still be going on.
"""

import json
import sys

from absl import flags

from llada_jax.cli import entry_point, outputs, paths
from llada_jax.config import UserError
from llada_jax.reporting import gather, show
from llada_jax.storage import objects

_WORKDIR = paths.define("workdir", None, "The workdir of the run.")
_OUTPUT = paths.define("output", None, "File to write a page (HTML) to.")
_JSON = flags.DEFINE_boolean("json", False, "Print the report as one line of JSON instead of text.")


def main() -> None:
    """Prints the report."""
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: name the workdir of a training run")
    objects.check(_WORKDIR.value, "--workdir=")
    folder = objects.place(_WORKDIR.value)
    output = outputs.check_file(_OUTPUT.value) if _OUTPUT.value else None
    found = gather.gather(folder)
    if not found["starts"]:
        if objects.is_bucket(folder):
            objects.require_bucket(folder)
        raise UserError(f"--workdir={folder} is not the workdir of a run: it has no starts.jsonl")
    if output:
        outputs.write_text(output, show.page(found))
        print(f"{output} is written", file=sys.stderr)
    print(json.dumps(found, allow_nan=False) if _JSON.value else show.text(found))


if __name__ == "__main__":
    entry_point.run(main)
