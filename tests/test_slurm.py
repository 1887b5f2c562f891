"""recipes/slurm.sh with a feigned Slurm: two nodes that are this machine, of a GPU each that is a CPU."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Prepared
from test_train import flags, load, run

import train

pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="a script for bash")
COMMANDS = {
    # Starts its command on each node, and ends with the status of one that failed.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & nodes+=($!); done
        for node in "${nodes[@]}"; do wait $node || status=$?; done
        exit ${status-0}""",
    "scontrol": """
        echo "$@" >> "$(dirname "$0")/asked"
        case $1 in show) printf 'localhost\\nother\\n';; requeue) kill "$(cat "$(dirname "$0")/job")";; esac""",
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}
# Says what it was given, and works until it is asked to stop.
BUSY = """
    trap 'kill $!; echo "stopped $*"; exit 143' TERM
    sleep 60 & echo $$ > "$(dirname "$0")/job"; wait"""


def submit(folder: Path, arguments: list[str], **commands: str) -> subprocess.Popen[str]:
    """Starts the script as sbatch would, with Slurm's commands and variables."""
    folder.mkdir()
    for name, text in (COMMANDS | commands).items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()),
                   "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
                   "SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(["bash", "recipes/slurm.sh", *arguments], cwd=Path(train.__file__).parent, text=True,
                            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def said_by(script: subprocess.Popen[str]) -> str:
    try:
        return script.communicate(timeout=100)[0]
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)


def test_two_nodes_are_one_run_which_goes_on_where_it_stood(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(prepared, out, "--stage", 1, "--epochs", 1)
    script = submit(tmp_path / "slurm", flags(prepared, out, "--stage", 1))
    said = said_by(script)
    assert script.returncode == 0, said
    begun = re.findall("batches, (.*) in float32; begins at epoch (.*), batch (.*);", said)
    assert begun == [("2 x cpu", "2", "1")], "one run, and not one on each node"
    rows = [json.loads(line) for line in (out / f"log_{prepared.name}.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert load(out, prepared)["training"]["world_size"] == 2


def test_a_job_whose_time_is_up_is_put_in_the_queue_again(tmp_path: Path) -> None:
    script = submit(tmp_path / "slurm", ["--output_folder", "a folder"], srun=BUSY)
    while not (tmp_path / "slurm" / "job").exists() and script.poll() is None:
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    said = said_by(script)
    assert script.returncode == 143
    assert said.startswith("stopped --kill-on-bad-exit=1 ") and "train.py --checkpoint auto --output_folder a" in said
    asked = (tmp_path / "slurm" / "asked").read_text().splitlines()
    assert asked == ["show hostnames node[1-2]", f"requeue {os.getpid()}"]
