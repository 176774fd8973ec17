"""`--accelerate_config`: a command starts its own processes, as `trl sft --accelerate_config zero3` does.

In: the words of a command. Out: the exit code of the processes that ran it; None where this process is to run it.

The one idea: the launcher is accelerate's, with a file of `accelerate config`; the common ones are in
`accelerate_configs/`, by name. Every process is given the same words, and a mark in its environment.
"""

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import yaml

from ropo.cli.faults import DONE
from ropo.cli.parser import SentenceParser
from ropo.options import Rule, check_options, option, read_yaml
from ropo.spelling import did_you_mean

CONFIGS = Path(__file__).parent / "accelerate_configs"

_LAUNCHED = "ROPO_LAUNCHED"  # in the environment of the processes that were started here
_PORT = 29500  # accelerate's, known to all machines; on one machine any free one will do


@dataclass
class LaunchArguments:
    """How the processes of a command are started."""

    accelerate_config: str | None = option(
        None,
        "Start the processes with accelerate: one_gpu, ddp, fsdp2, zero2, zero3, qlora, or a file that `accelerate "
        "config` wrote.",
    )
    num_processes: Annotated[int | None, Rule(low=1)] = option(
        None, "Processes on all machines together. Default: what the file says, or one per GPU."
    )
    num_machines: Annotated[int | None, Rule(low=1)] = option(None, "Machines; the same command runs on each.")
    machine_rank: Annotated[int | None, Rule(low=0)] = option(None, "Number of this machine, from 0.")
    main_process_ip: str | None = option(None, "Address of machine 0.")
    main_process_port: Annotated[int | None, Rule(low=1, high=65535)] = option(
        None, f"Free port of machine 0. Default with several machines: {_PORT}."
    )


def launch(command: str, words: Sequence[str]) -> int | None:
    """Start the processes that a command asks for, and wait for their end.

    Args:
        command: train or audit.
        words: What follows it.

    Returns:
        Exit code; None if this process is to run the command: it is one of them, or the only one.

    Raises:
        ValueError: If an option of a launch does not fit.
    """
    given = _asked(command, words)
    if given.accelerate_config is None:
        named = [one.name for one in fields(given) if getattr(given, one.name) is not None]
        if named:
            raise ValueError(f"{named[0]} needs accelerate_config, which says how to start them. Add it.")
        return None
    if _LAUNCHED in os.environ:
        return None
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        raise ValueError(
            "accelerate_config needs a command that starts its own processes; this one was started by `accelerate "
            "launch` or torchrun. Leave it out, or start `ropo` directly."
        )
    arguments = arguments_of(given, command, words)
    if arguments is None:
        return None
    os.environ[_LAUNCHED] = "1"
    try:
        return _run(arguments, command)
    finally:
        del os.environ[_LAUNCHED]


def _asked(command: str, words: Sequence[str]) -> LaunchArguments:
    """The options of the launch alone: the others are for the processes."""
    parser = SentenceParser(command)
    for one in fields(LaunchArguments):
        parser.add(one.name, type=int if one.name.startswith(("num", "machine")) or "port" in one.name else str)
    parser.add("config", type=Path)
    given, _ = parser.parse_known_args(list(words))
    recipe = {} if given.config is None else read_yaml(given.config)
    values = {one.name: getattr(given, one.name) for one in fields(LaunchArguments)}
    found = LaunchArguments(**{name: recipe.get(name) if value is None else value for name, value in values.items()})
    check_options(found)
    return found


def _file_of(name: str) -> Path:
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    file = shipped.get(name, Path(name))
    if not file.is_file():
        known, close = ", ".join(shipped), did_you_mean(name, shipped)
        raise ValueError(f"accelerate_config needs one of {known}, or a file; got {name!r}.{close}")
    return file


def _read(file: Path) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file  # noqa: PLC0415 - imports torch

    try:
        return load_config_from_file(str(file))
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"accelerate_config needs a file of `accelerate config`; {file} is none: {sentence}") from None


def arguments_of(given: LaunchArguments, command: str, words: Sequence[str]) -> Namespace | None:
    """What `accelerate launch` is told.

    Args:
        given: How the processes are started.
        command: train or audit.
        words: What follows it.

    Returns:
        Its arguments; None for one process, which is this one.

    Raises:
        ValueError: If there is no such file, or machines or processes are not numbered.
    """
    from accelerate.commands.launch import launch_command_parser  # noqa: PLC0415 - imports torch

    file = _file_of(str(given.accelerate_config))
    config = _read(file)
    if config.distributed_type == "NO":
        _stay(given, config)
        return None
    num_machines = given.num_machines or config.num_machines
    lacking = [name for name in ("machine_rank", "main_process_ip") if getattr(given, name) is None]
    if given.num_machines is not None and num_machines > 1 and lacking:
        raise ValueError(f"num_machines {num_machines} needs {lacking[0]}; got none. Add --{lacking[0]}.")
    if num_machines == 1 and given.num_machines is None:  # a script for any number of machines says 1, and who is first
        _refuse_idle(given)
    num_processes = given.num_processes or max(config.num_processes, 0) or _num_gpus() * num_machines
    if not num_processes:
        raise ValueError(f"accelerate_config {given.accelerate_config} needs num_processes where no GPU is. Add it.")
    if num_processes % num_machines:
        raise ValueError(f"num_processes needs a multiple of num_machines, {num_machines}; got {num_processes}.")
    options = {
        "num_processes": num_processes,
        "num_machines": num_machines,
        "machine_rank": given.machine_rank,
        "main_process_ip": given.main_process_ip,
        # On one machine any free one.
        "main_process_port": given.main_process_port or config.main_process_port or (_PORT if num_machines > 1 else 0),
        # Accelerate would take one; the audit's linear models run on CPUs.
        "num_cpu_threads_per_process": os.environ.get("OMP_NUM_THREADS")
        or max(1, (os.cpu_count() or 1) * num_machines // num_processes),
    }
    chosen = [f"--{name}={value}" for name, value in options.items() if value is not None]
    arguments: Namespace = launch_command_parser().parse_args(
        [f"--config_file={file}", *chosen, "--module", "ropo", command, *words]
    )
    return arguments


def _stay(given: LaunchArguments, config: Any) -> None:
    """Take over what a file for one process says."""
    _refuse_idle(given)
    if (given.num_processes or 1) > 1 or (given.num_machines or 1) > 1:
        raise ValueError(f"accelerate_config {given.accelerate_config} starts one process; got more. Use ddp or fsdp2.")
    if config.mixed_precision not in (None, "no"):
        os.environ["ACCELERATE_MIXED_PRECISION"] = config.mixed_precision
    if config.gpu_ids not in (None, "all"):
        os.environ["CUDA_VISIBLE_DEVICES"] = str(config.gpu_ids)


def _refuse_idle(given: LaunchArguments) -> None:
    """Refuse what would do nothing on one machine."""
    for name in ("machine_rank", "main_process_ip"):
        if getattr(given, name):
            raise ValueError(f"{name} needs num_machines; got it alone. Add --num_machines.")


def _num_gpus() -> int:
    import torch  # noqa: PLC0415 - takes seconds

    return torch.cuda.device_count()


def _run(arguments: Namespace, command: str) -> int:
    """Run `accelerate launch`, whose failures become exit codes."""
    from accelerate.commands.launch import launch_command  # noqa: PLC0415 - imports torch
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415

    logging.getLogger(SignalException.__module__).setLevel(logging.CRITICAL)  # the processes have said why
    try:
        launch_command(arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"ropo {command}: process {rank} was ended by {name}. The same command resumes.", file=sys.stderr)
        return 128 - failure.exitcode
    return DONE
