"""Several processes of one run on this machine, as several hosts would run it.

Two processes of four simulated CPU devices each:

    python launch/local.py --processes=2 --devices=4 -- \
        python -m llada_jax.train --config=configs/quickstart.py --workdir=runs/two

One process per GPU on a machine of eight, started again up to three times when a process dies:

    python launch/local.py --processes=8 --gpus_per_process=1 --retries=3 -- \
        python -m llada_jax.train --config=configs/1b.py --workdir=runs/1b --config.data.path=sets/text

(One process with all GPUs needs no launcher.) The command gets --coordinator_address, --num_processes and
--process_id appended; lines of process 1 come out as "[1] ...". SIGTERM and Ctrl-C reach all processes, which
save together.

Exit code: 0 if all finished; 2 if any found a mistake of the user's; 143 if they were told to stop and saved; otherwise
that of the first that failed. A run whose processes left with 143 or 134 (what JAX does when another process died) or
died of a signal is started again, unless the launcher itself was told to stop or one left with 1 or 2.
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
    """The launcher's own arguments, and the command after `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices", type=int, help="simulated CPU devices per process (sets JAX_PLATFORMS=cpu)")
    parser.add_argument("--gpus_per_process", type=int, help="sets CUDA_VISIBLE_DEVICES")
    parser.add_argument("--retries", type=int, default=0, help="how often the run is started again")
    parser.add_argument(
        "--patience", type=float, default=90, help="seconds from the end of one process, or a signal, to kill -9"
    )
    parser.add_argument("command", nargs="+", help="after --: the command")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error("--processes: at least one is needed")
    if options.devices and options.gpus_per_process:
        parser.error("give either --devices (simulated, on the CPU) or --gpus_per_process")
    return options


def environment(options: argparse.Namespace, index: int) -> dict[str, str]:
    """What process `index` sees of the machine."""
    result = dict(os.environ, PYTHONUNBUFFERED="1")
    if options.devices:
        kept = re.sub(rf"{DEVICE_COUNT}=\S+", "", result.get("XLA_FLAGS", ""))
        result |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{kept} {DEVICE_COUNT}={options.devices}".strip()}
    if options.gpus_per_process:
        first, last = index * options.gpus_per_process, (index + 1) * options.gpus_per_process
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(i) for i in range(last)]
        if last > len(gpus):
            sys.exit(f"error: CUDA_VISIBLE_DEVICES={given} has too few GPUs for --processes={options.processes}")
        result["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:last])
    return result


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Job:
    """One start of all processes."""

    def __init__(self, options: argparse.Namespace):
        self._seen: set[str] = set()
        self._patience = options.patience
        meeting = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={options.processes}"]
        self.processes, self._readers = [], []
        for index in range(options.processes):
            process = subprocess.Popen(
                [*options.command, *meeting, f"--process_id={index}"], env=environment(options, index),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
            )  # fmt: skip
            self.processes.append(process)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=self._pass_on, args=(index, source, sink), daemon=True)
                reader.start()
                self._readers.append(reader)

    def _pass_on(self, index: int, source, sink) -> None:
        for line in source:
            if line.startswith("[Gloo]"):  # every connection between simulated devices
                continue
            if line.startswith("error: "):  # a mistake in the command line is found by all: told once
                if line in self._seen:
                    continue
                self._seen.add(line)
            print(f"[{index}] {line}", end="", file=sink, flush=True)

    def send(self, number: int) -> None:
        """A signal to all that live."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, told: threading.Event) -> list[int]:
        """Exit codes, in the order in which the processes ended; kills those that outlast the first for too long."""
        ended, deadline = [], None
        while len(ended) < len(self.processes):
            ended += [p for p in self.processes if p.poll() is not None and p not in ended]
            if deadline is None and (ended or told.is_set()):
                deadline = time.monotonic() + self._patience
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.1)
        for reader in self._readers:
            reader.join(timeout=5)  # grandchildren may hold on to the pipe
        return [process.returncode for process in ended]


def verdict(codes: list[int]) -> int:
    """The exit code of the run, given those of its processes in the order of their end (negative = by a signal)."""
    codes = [code if code >= 0 else 128 - code for code in codes]
    if USER_ERROR in codes:
        return USER_ERROR
    return next((code for code in codes if code != 0), 0)


def starts_again(codes: list[int]) -> bool:
    """Whether it is worth another try: some process was stopped or killed, none found a mistake."""
    return not {FAILED, USER_ERROR} & set(codes) and any(code < 0 or code in (ABORTED, PREEMPTED) for code in codes)


def main(argv: list[str]) -> int:
    """Runs the command until it is done; the exit code."""
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
        print(f"processes left with {codes}: starting again, {retries_left - 1} left", file=sys.stderr, flush=True)
    return verdict(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
