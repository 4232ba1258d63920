r"""Starts several processes of one run on this machine, as if each process were on its own host.

Two processes with four simulated CPU devices each:

    python launch/local.py --processes=2 --devices=4 -- \
        python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/two

One process per GPU on a machine with eight GPUs. If a process dies, the run is started again, up to three times:

    python launch/local.py --processes=8 --gpus_per_process=1 --retries=3 -- \
        python -m llada_jax.train --config=configs/1b.py --workdir=runs/1b --config.data.path=sets/text

(A single process that uses all GPUs needs no launcher.) The launcher appends --coordinator_address, --num_processes and
--process_id to the command. It prints each line of process 1 as "[1] ...", and likewise for the other processes. It
forwards SIGTERM and Ctrl-C to all processes, which then save a checkpoint together.

Exit code: 0 if all processes finished; 2 if any process reported a mistake of the user; 143 if the processes were told
to stop and saved; otherwise the exit code of the first process that failed. With --retries, the run is started again if
a process exited with 143, or with 134 (JAX aborts this way when another process has died), or was killed by a signal.
It is not started again if the launcher itself was told to stop, or a process exited with 1 or 2.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

FAILED, USER_ERROR, ABORTED, PREEMPTED = 1, 2, 134, 143
DEVICE_COUNT = "--xla_force_host_platform_device_count"


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the launcher's own arguments and the command after `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="number of processes to start")
    parser.add_argument("--devices", type=int, help="simulated CPU devices per process (sets JAX_PLATFORMS=cpu)")
    parser.add_argument("--gpus_per_process", type=int, help="GPUs per process (sets CUDA_VISIBLE_DEVICES)")
    parser.add_argument("--retries", type=int, default=0, help="how often a run that died is started again at most")
    parser.add_argument(
        "--patience",
        type=float,
        default=90,
        help="seconds after the end of the first process, or after a signal, until the remaining processes are killed",
    )
    parser.add_argument("command", nargs="+", help="the command of each process, after --")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"--processes={options.processes}: at least one process is needed")
    if options.devices and options.gpus_per_process:
        parser.error("pass either --devices (simulated devices on the CPU) or --gpus_per_process, not both")
    return options


def environment(options: argparse.Namespace, index: int) -> dict[str, str]:
    """Returns the environment variables of process `index`, which decide the devices that it sees."""
    result = dict(os.environ, PYTHONUNBUFFERED="1")
    if options.devices:
        kept = re.sub(rf"{DEVICE_COUNT}=\S+", "", result.get("XLA_FLAGS", ""))
        result |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{kept} {DEVICE_COUNT}={options.devices}".strip()}
    if options.gpus_per_process:
        first, last = index * options.gpus_per_process, (index + 1) * options.gpus_per_process
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(i) for i in range(last)]
        if last > len(gpus):
            sys.exit(
                f"error: CUDA_VISIBLE_DEVICES={given} has too few GPUs for --processes={options.processes} with "
                f"--gpus_per_process={options.gpus_per_process}"
            )
        result["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:last])
    return result


def free_port() -> int:
    """Returns a free TCP port of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Job:
    """All processes of one start of the run."""

    def __init__(self, options: argparse.Namespace):
        self._seen: set[str] = set()
        self._patience = options.patience
        meeting = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={options.processes}"]
        self.processes, self._readers = [], []
        for index in range(options.processes):
            process = subprocess.Popen(
                [*options.command, *meeting, f"--process_id={index}"], env=environment(options, index),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                start_new_session=True,  # Ctrl-C then reaches only the launcher, which forwards it.
            )  # fmt: skip
            self.processes.append(process)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=self._pass_on, args=(index, source, sink), daemon=True)
                reader.start()
                self._readers.append(reader)

    def _pass_on(self, index: int, source, sink) -> None:
        for line in source:
            if line.startswith("[Gloo]"):  # Gloo prints a line for every connection between simulated devices.
                continue
            if line.startswith("error: "):  # Every process reports a mistake in the command line. Print it only once.
                if line in self._seen:
                    continue
                self._seen.add(line)
            print(f"[{index}] {line}", end="", file=sink, flush=True)

    def send(self, number: int) -> None:
        """Sends a signal to all processes that are still running."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, told: threading.Event) -> list[int]:
        """Waits until all processes have ended.

        Processes that still run `patience` seconds after the first process ended, or after the launcher was told to
        stop, are killed.

        Args:
          told: The event that is set when the launcher is told to stop.

        Returns:
          The return codes of the processes, in the order in which they ended.
        """
        ended, deadline = [], None
        while len(ended) < len(self.processes):
            ended += [p for p in self.processes if p.poll() is not None and p not in ended]
            if deadline is None and (ended or told.is_set()):
                deadline = time.monotonic() + self._patience
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.1)
        for reader in self._readers:
            reader.join(timeout=5)  # Child processes of a process may keep its pipe open.
        return [process.returncode for process in ended]


def verdict(codes: list[int]) -> int:
    """Returns the exit code of the run.

    Args:
      codes: The return codes of the processes in the order in which they ended. A negative code is the number of the
        signal that killed the process.
    """
    codes = [code if code >= 0 else 128 - code for code in codes]
    if USER_ERROR in codes:
        return USER_ERROR
    return next((code for code in codes if code != 0), 0)


def starts_again(codes: list[int]) -> bool:
    """Returns whether the run should start again: a process was stopped or died, and none failed or found a mistake."""
    return not {FAILED, USER_ERROR} & set(codes) and any(code < 0 or code in (ABORTED, PREEMPTED) for code in codes)


def main(argv: list[str]) -> int:
    """Runs the command, starts it again if needed, and returns the exit code."""
    options = parse(argv)
    told = threading.Event()
    job: Job | None = None

    def forward(number: int, _: object) -> None:
        told.set()
        if job:
            job.send(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    for retries_left in range(options.retries, -1, -1):
        job = Job(options)
        codes = job.wait(told)
        if told.is_set() or not retries_left or not starts_again(codes):
            break
        print(
            f"the processes exited with {codes}: starting again, {retries_left - 1} retries left",
            file=sys.stderr,
            flush=True,
        )
    return verdict(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
