"""Command line: composes the configuration with Hydra, runs the command, and turns expected errors into one message and an exit code.

This module does not import torch, so that `--help` and configuration errors appear immediately.
"""

import gc
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from clip_exp._version import __version__
from clip_exp.config.command_line import read, sweeps
from clip_exp.config.compose import run_hydra, secrets_refused
from clip_exp.config.jobs import current_job
from clip_exp.config.messages import explain
from clip_exp.config.targets import TargetNotAllowedError
from clip_exp.devices import is_out_of_memory
from clip_exp.errors import PREEMPTED_EXIT_CODE, ClipExpError, ConfigError, DeviceMemoryError, nearest, printable
from clip_exp.ranks.environment import is_first_rank, started_by_launcher
from clip_exp.ranks.failure import end_process

# Exit codes after which a sweep starts no further job
STOPPED = {PREEMPTED_EXIT_CODE, 130}
ALLOW = "allow_targets="


def main(command: str | None = None) -> NoReturn:
    """Run a command with the arguments of the process, and exit with the command's exit code."""
    arguments = sys.argv[1:]
    if command is None:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            width = max(map(len, COMMANDS))
            rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
            print(f"usage: clip-exp <command> [key=value …]\n\n{rows}\n")
            print("`clip-exp <command> --help` lists a command's options and keys.")
            sys.exit(0)
        if arguments[0] == "--version":
            print(__version__)
            sys.exit(0)
        command, arguments = arguments[0], arguments[1:]
        if command not in COMMANDS:
            sys.exit(_report(f"unknown command '{command}': {nearest(command, COMMANDS)}", 2))
    end_process(run(command, arguments))


def run(command: str, arguments: list[str]) -> int:
    """Compose the configuration of `command` from Hydra overrides and flags, run the command, and return its exit code.

    A sweep (`-m`) continues after a failed job and returns the exit code of the first failure.
    """
    # The parser of flags reads the name of the program
    sys.argv = [f"{command}.py", *arguments]
    try:
        arguments = read(command, arguments)
    except ConfigError as error:
        return _report(str(error), error.exit_code)
    codes: list[int] = []
    # This saves a tenth of the time: composing creates no garbage, and pydantic would search all installed packages for
    # plugins.
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

    def job(typed: Callable[[], Any]) -> None:
        gc.enable()
        if not STOPPED & set(codes):
            sweeping = sweeps(arguments)
            codes.append(_guarded(lambda: _call(command, typed(), arguments), command, arguments, sweeping=sweeping))

    # Without this variable, Hydra prints its own errors and exits with 1. With it, errors are raised, and `_guarded`
    # prints them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with secrets_refused():
        code = _guarded(lambda: run_hydra(command, arguments, job), command, arguments)
    gc.enable()
    return next((c for c in codes if c), 0) or code


def _guarded(action: Callable[[], int | None], command: str, arguments: list[str], sweeping: bool = False) -> int:
    """Run `action` and return its exit code. An expected error is printed as one message.

    Unexpected errors propagate, with two exceptions, in which the traceback is printed: in a sweep, so that the other
    jobs run, and in one of several ranks, since the process must exit without waiting for the other ranks.
    """
    try:
        return action() or 0
    except TargetNotAllowedError as error:
        complete = f"\n  {_allowing(error, command, arguments)}" if error.packages else ""
        return _report(f"{error}{complete}", error.exit_code)
    except ClipExpError as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _report("interrupted.", 130)
    except Exception as error:
        if is_out_of_memory(error):
            return _report(f"out of memory: reduce batch_size. {str(error).strip()}", DeviceMemoryError.exit_code)
        message = explain(error)
        if message is None and (sweeping or started_by_launcher()):
            traceback.print_exc()
            return 1
        if message is None:
            raise
        return _report(message, 2)


def _allowing(error: TargetNotAllowedError, command: str, arguments: list[str]) -> str:
    """Return the command with the key that allows the custom code, in addition to the code that it allows already."""
    from clip_exp.reports.html import command_line, split_arguments

    flags, overrides = split_arguments(arguments)
    typed = " ".join(word.removeprefix(ALLOW) for word in overrides if word.startswith(ALLOW))
    packages = dict.fromkeys([*re.findall(r"[\w.]+", typed), *error.packages])
    kept = [word for word in overrides if not word.startswith(ALLOW)]
    return command_line(command, [*flags, *kept, f"{ALLOW}[{','.join(packages)}]"])


COMMANDS = {
    "train": "train a CLIP model on image-text pairs",
    "evaluate": "evaluate a CLIP model: zero-shot classification, retrieval, …",
    "predict": "predict the probabilities of texts for images or videos",
    "rank": "rank images by their similarity with a text",
    "search": "build an index of images, and search it by text or by image",
    "embed": "write the features of images and captions to files",
    "models": "list models and their published weights",
    "export": "export a model for open_clip, Hugging Face, ONNX or clip_exp",
    "convert": "convert a torch file to safetensors, which cannot contain code",
    "check-data": "check a data set for problems before training on it",
    "make-shards": "write a data set as WebDataset shards or Parquet files",
}


def _call(command: str, config: Any, arguments: list[str]) -> int:
    """Run a command with its typed configuration. The command's package is imported here, since composing and `--help` do not need it."""
    match command:
        case "train":
            from clip_exp.training.launch import launch as train

            return train(config, arguments, current_job(arguments))
        case "evaluate":
            from clip_exp.evaluation.launch import launch as evaluate

            return evaluate(config, arguments)
        case "predict":
            from clip_exp.inference.commands import predict

            return predict(config)
        case "rank":
            from clip_exp.inference.commands import rank

            return rank(config)
        case "search":
            from clip_exp.inference.commands import search

            return search(config)
        case "embed":
            from clip_exp.inference.embed import embed

            return embed(config, arguments)
        case "models":
            from clip_exp.inference.models import models

            return models(config)
        case "export":
            from clip_exp.export.command import export

            return export(config)
        case "convert":
            from clip_exp.weights.convert import convert

            return convert(config)
        case "check-data":
            from clip_exp.checks.command import check_data

            return check_data(config, arguments)
        case "make-shards":
            from clip_exp.shards.command import make_shards

            return make_shards(config, arguments)
    raise KeyError(command)


def _report(message: str, code: int) -> int:
    first, *rest = printable(message).strip().splitlines() or [""]
    # An indented line continues the problem above it.
    problems = [f"    {line.strip()}" if line.startswith(" ") else f"  - {line}" for line in rest]
    several = any(not line.startswith(" ") for line in rest)
    text = "\n".join(["error:", f"  - {first}", *problems] if several else [f"error: {first}", *problems])
    if is_first_rank() or message.startswith("rank "):
        print(text, file=sys.stderr, flush=True)
    return code
