"""Makes pipelines for the runners of Apache Beam, and checks the options that a user gives for them."""

import contextlib
import io
import shlex
from typing import Any

from llada_jax.config import UserError

RUNNERS = ("direct", "dataflow", "flink", "spark")


def pipeline(runner: str, runner_options: str) -> Any:
    """Returns an empty pipeline for a runner, with its options as on a command line.

    Raises:
      UserError: If Beam does not take the options, or if the part of Beam for this runner is not installed.
    """
    import apache_beam as beam

    chosen = options(runner, runner_options)
    if runner == "direct":
        # By its name, the direct runner would first look for a server program that Beam downloads.
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

        return beam.Pipeline(runner=FnApiRunner(), options=chosen)
    try:
        if runner == "dataflow":
            from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401
        return beam.Pipeline(options=chosen)
    except ImportError as error:
        raise UserError(f"runner={runner} needs more of Beam: pip install 'apache-beam[gcp]' ({error})") from error
    except ValueError as error:
        raise UserError(f"runner_options: {' '.join(str(error).split())}") from error


def options(runner: str, runner_options: str) -> Any:
    """Returns Beam's options for a runner, given as on a command line.

    Raises:
      UserError: If an option has an impossible value, or if Beam does not know it. Of Flink and Spark, only their job
        server may know an option; Beam warns of those that it does not know either.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    name = [] if runner == "direct" else [f"--runner={runner.title()}Runner"]
    said = io.StringIO()
    try:
        given = shlex.split(runner_options)
        if any(each.split("=")[0] == "--runner" for each in given):
            raise UserError("runner_options: the runner is chosen by the flag --runner alone")
        found = PipelineOptions([*name, *given])
        with contextlib.redirect_stderr(said):  # argparse writes to it, and exits
            known = found.get_all_options()
            unknown = found.get_all_options(retain_unknown_options=True).keys() - known.keys()
    except (SystemExit, ValueError) as error:
        reason = said.getvalue().rpartition("error: ")[2].strip() or error
        raise UserError(f"runner_options: {reason}") from error
    if unknown and runner in ("direct", "dataflow"):
        raise UserError(f"runner_options: Beam has no option --{min(unknown)}")
    return found
