"""Kill a run at random moments, resume it, and compare the result with that of an uninterrupted run, byte for byte.

    python benchmarks/interruptions.py MODEL --kills 30 --options "--keep 0.75 --calibration builtin --samples 8" \\
        -o benchmarks/results/NAME

writes NAME.json. Each time a process is started, killed (SIGKILL) at a random moment of an uninterrupted run's time
after Python's imports, and the same command is run again with --resume, until as many runs were hit as were asked for.
With --disk MIB, the runs work on a tmpfs of that size (needs root), and instead of a kill a file takes all room at that
moment; it is gone before the run is resumed.
"""

import argparse
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMPORTS = "from eigenslice.slicing import slice_model"


def command(model: str, options: list[str], output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "eigenslice", "slice", model, "-o", str(output), "--quiet", *options, *more]


def timed(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(arguments, check=True, capture_output=True)
    return time.perf_counter() - start


def differences(one: Path, other: Path) -> list[str]:
    """Names of the files that differ; the manifest by all but the options that name the output and resume."""
    names = {path.name for folder in (one, other) for path in folder.iterdir()}
    different = []
    for name in sorted(names):
        contents = [(folder / name).read_bytes() if (folder / name).exists() else b"" for folder in (one, other)]
        if name == "eigenslice.json":
            manifests = [json.loads(content) for content in contents]
            for manifest in manifests:
                manifest["options"] = manifest["options"] | {"output": "", "resume": False}
            contents = [json.dumps(manifest).encode() for manifest in manifests]
        if name != "README.md" and contents[0] != contents[1]:  # the model card says how it was made
            different.append(name)
    return different


def killed(arguments: list[str], after: float) -> bool:
    """Start a process and kill it after some seconds; whether it was still running."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def filled(arguments: list[str], disk: Path, after: float) -> bool:
    """Start a process and take all room on its disk after some seconds; whether it failed."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            with (disk / "filler").open("wb") as filler:
                try:
                    while True:
                        filler.write(bytes(1 << 16))
                        filler.flush()
                except OSError:
                    pass
        failed = process.wait() != 0
    (disk / "filler").unlink(missing_ok=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--options", default="--keep 0.75 --calibration builtin --samples 8 --seqlen 256")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--disk", type=int, help="MiB of a tmpfs that is filled up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    options, moments = shlex.split(arguments.options), random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        imports = timed([sys.executable, "-c", IMPORTS])
        whole = timed(command(arguments.model, options, work / "whole"))
        disk = work / "disk"
        if arguments.disk:
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={arguments.disk}m", "tmpfs", str(disk)], check=True)
        try:
            while sum(row["interrupted"] for row in rows) < arguments.kills:
                number = len(rows)
                output = (disk if arguments.disk else work) / f"run-{number}"
                after = moments.uniform(imports, whole)
                begun = command(arguments.model, options, output)
                hit = filled(begun, disk, after) if arguments.disk else killed(begun, after)
                resumed = subprocess.run(
                    command(arguments.model, options, output, "--resume"), capture_output=True, text=True, check=False
                )
                wrong = [resumed.stderr] if resumed.returncode else differences(work / "whole", output)
                rows.append({"seconds": round(after, 3), "interrupted": hit, "different": wrong})
                print(rows[-1], flush=True)
                for left in (output, output.with_name(f"{output.name}.partial")):
                    shutil.rmtree(left, ignore_errors=True)
        finally:
            if arguments.disk:
                subprocess.run(["umount", str(disk)], check=True)
    result = {
        "model": Path(arguments.model).name,
        "options": options,
        "disk_mib": arguments.disk,
        "seconds": {"imports": imports, "whole": whole},
        "interrupted": sum(row["interrupted"] for row in rows),
        "same": sum(not row["different"] for row in rows),
        "runs": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_name(arguments.output.name + ".json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['same']} of {len(rows)} are the same")


if __name__ == "__main__":
    main()
