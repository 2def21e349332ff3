"""Processes that needn't import torch and transformers first: they are forked off a server that has.

Each test process starts a server when it needs one. Signals, environment, output and exit code are any process's.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "eigenslice.slicing",
        "eigenslice.finetune",
        "eigenslice.cli",
        "transformers.models.llama.modeling_llama",
        "torch.distributed",
    ]
)


def call(
    function: Callable[..., None], *arguments: Any, log: Path, environment: Mapping[str, object] | None = None
) -> ForkServerProcess:
    """A process that calls a function of a module.

    Args:
        function: The function.
        arguments: Its arguments.
        log: File that standard output and error are appended to.
        environment: Variables beside those of this process.
    """
    variables = {name: str(value) for name, value in (environment or {}).items()}
    process = CONTEXT.Process(target=_run, args=(function, arguments, str(log), variables))
    process.start()
    return process


def command(*arguments: object, log: Path, environment: Mapping[str, object] | None = None) -> ForkServerProcess:
    """A process that runs the command line, as `python -m eigenslice ...` does."""
    return call(run_command, *map(str, arguments), log=log, environment=environment)


def run_command(*arguments: str) -> None:
    """Run the command line in this process."""
    from eigenslice.cli import main

    sys.argv = ["eigenslice", *arguments]
    main()


def ranks(size: int, *arguments: object, log: Path, run: Callable[..., None] = run_command) -> list[ForkServerProcess]:
    """Processes that run the command line together, with the variables that torchrun would set.

    Args:
        size: Number of processes.
        arguments: Arguments of the command line.
        log: File that standard output and error are appended to.
        run: Function of a module that runs the command line in its process.
    """
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        call(run, *map(str, arguments), log=log, environment=common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in range(size)
    ]


def free_port() -> int:
    """A port for ranks to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(function: Callable[..., None], arguments: tuple[Any, ...], log: str, variables: dict[str, str]) -> None:
    import torch

    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    torch.cpu.get_capabilities = dict  # float32 on every CPU, as in conftest.py
    function(*arguments)
