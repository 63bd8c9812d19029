"""The command line: flags and YAML in, one line out for every error.

Exit status: 0 done, 1 the run failed, 2 what was given cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from jsonargparse import ArgumentParser

from tvmerge import __version__
from tvmerge.config import (
    ALIASES,
    LIST_SETTINGS,
    SWITCHES,
    ApplyConfig,
    DashboardConfig,
    JglueConfig,
    MoeConfig,
    MtBenchConfig,
    PlanConfig,
    PushConfig,
    WorkerConfig,
)
from tvmerge.errors import ConfigError, InputError, TaskError, TvmergeError
from tvmerge.interrupt import listen, was_interrupted

__all__ = ["main"]


def _run_jglue(config: JglueConfig) -> None:
    # Threads that wait by spinning cost a run five times its time as soon as another process uses one of its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tvmerge.run import jglue

    jglue(config)


def _run_mt_bench(config: MtBenchConfig) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tvmerge.run import mt_bench

    mt_bench(config)


def _run_plan(config: PlanConfig) -> None:
    from tvmerge.plan import plan

    plan(config)


def _run_apply(config: ApplyConfig) -> None:
    gc.disable()  # nothing of what is imported can be collected, and looking takes a while
    from tvmerge.export import export_recipe
    from tvmerge.files import local_path
    from tvmerge.rebuild import apply_recipe

    gc.enable()

    output = local_path(config.output_dir, flag="--output_dir")
    dtype = None if config.dtype == "auto" else config.dtype
    recipe = local_path(config.recipe, flag="recipe")
    if config.export:
        file = export_recipe(recipe, tool=config.export, output=output, dtype=dtype, cache_dir=config.cache_dir)
        print(f"{file}: what {config.export} makes the model of {config.recipe} from")
        return
    apply_recipe(recipe, output=output, dtype=dtype, cache_dir=config.cache_dir, save_experts=config.save_experts)
    print(f"{config.output_dir}: the model of {config.recipe}")


def _run_moe(config: MoeConfig) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tvmerge.assembly import assemble

    assemble(config)
    print(f"{config.output_dir}: the mixture of experts of {config.mixture}")


def _run_worker(config: WorkerConfig) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tvmerge.supervisor import follow_parent, own_name, supervise

    name = config.name or own_name()
    if config.restart:
        own = {key: value for key, value in vars(config).items() if key not in ("restart", "name")}
        given = {key: str(value) for key, value in own.items() if value is not None}
        return supervise([f"--{key}={value}" for key, value in given.items()], name=name)
    follow_parent()
    from tvmerge.worker import work

    work(replace(config, name=name))
    return 0


def _run_push(config: PushConfig) -> None:
    from tvmerge.push import push

    push(config)


def _run_dashboard(config: DashboardConfig) -> None:
    from tvmerge.dashboard import dashboard

    dashboard(config)


#: Command → its configuration and what runs it. Heavy modules are imported when a command runs, not before.
COMMANDS: dict[str, tuple[type, Callable[..., int | None]]] = {
    "jglue": (JglueConfig, _run_jglue),
    "mt_bench": (MtBenchConfig, _run_mt_bench),
    "plan": (PlanConfig, _run_plan),
    "apply": (ApplyConfig, _run_apply),
    "moe": (MoeConfig, _run_moe),
    "worker": (WorkerConfig, _run_worker),
    "push": (PushConfig, _run_push),
    "dashboard": (DashboardConfig, _run_dashboard),
}

#: Settings that take several values behind one flag only.
ONCE = frozenset({"--target_model"})
#: What to say when a command is interrupted.
GOES_ON = {
    **dict.fromkeys(("tvmerge jglue", "tvmerge mt_bench"), "the same command goes on where it stopped"),
    "tvmerge worker": "its trial is handed back",
    "tvmerge push": "nothing was committed",
}
#: How jsonargparse calls what a setting is to be, and how people do.
TYPES = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
#: Settings that are given without a flag.
POSITIONAL = {"recipe": "a recipe.yaml that a run has written", "mixture": "a YAML file as mergekit-moe reads it"}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tvmerge",
        description="Find, prove and save a better merge of language models: target + Σ w·(tuned − base).",
        exit_on_error=False,
        version=__version__,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (config_class, _) in COMMANDS.items():
        purpose = (config_class.__doc__ or "").partition("\n")[0]
        command = ArgumentParser(exit_on_error=False, description=purpose)
        command.add_argument("--config", action="config", help="YAML file with these settings; flags win over it")
        command.add_class_arguments(config_class, None, as_group=False, skip={*POSITIONAL})
        for argument, text in POSITIONAL.items():
            if argument in {field.name for field in fields(config_class)}:
                command.add_argument(argument, type=str, help=text)
        commands.add_subcommand(name, command, help=purpose)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status.
    """
    command = "tvmerge"
    status: int | None = None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console of another encoding must not end a run
    try:
        arguments = _parser().parse_args(_in_order(sys.argv[1:] if argv is None else argv))
        command = f"tvmerge {arguments.command}"
        values = arguments[arguments.command].as_dict()
        values.pop("config", None)
        config_class, run = COMMANDS[arguments.command]
        _refuse_null(config_class, values)
        try:
            status = run(config_class(**values))
        except SystemExit as error:  # would end this process as if all were well
            raise TaskError(f"code of a task or of a library ended the run by sys.exit({error.code!r})") from error
    except (argparse.ArgumentError, UnicodeError) as error:
        return _complain("tvmerge", _in_our_words(error, sys.argv[1:] if argv is None else argv), status=2)
    except TvmergeError as error:
        if was_interrupted():  # in the midst of what made another error of it
            return _say_interrupted(command)
        return _complain(command, error, status=2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that has gone
        return _complain(command, error, status=1)
    except KeyboardInterrupt:
        return _say_interrupted(command)
    return status or 0


def _say_interrupted(command: str) -> int:
    print(f"\n{command}: interrupted; {GOES_ON.get(command, 'nothing was written')}", file=sys.stderr)
    return 130


def _refuse_null(config_class: type, values: Mapping[str, Any]) -> None:
    """Refuse a null of a YAML file, which jsonargparse takes for every setting.

    Raises:
        ConfigError: with the setting's name.
    """
    for field in fields(config_class):
        if values.get(field.name, "") is None and "None" not in str(field.type):
            raise ConfigError(f"{field.name} is null: leave the line out of the file, or give a value")


def _in_order(arguments: Sequence[str]) -> list[str]:
    """Rearrange a command line so that jsonargparse reads it as people mean it.

    `--config FILE` goes right behind the command, so that flags win over the file whatever their order. The values of
    a setting that takes several, `--tuned_model a b` or the flag repeated, become one list, a switch that stands alone
    is on, and flags of other names are known by them.

    Raises:
        ConfigError: targets are given twice: once the last of them counted alone.
    """
    rest: list[str] = []
    files: list[str] = []
    lists: dict[str, list[str]] = {}
    waiting = deque(_joined_targets(arguments))
    while waiting:
        argument = waiting.popleft()
        flag, separator, value = argument.partition("=")
        if flag in ALIASES:
            flag = ALIASES[flag]
            argument = f"{flag}{separator}{value}"
        if flag == "--config":
            files += [argument] if separator else [argument, *([waiting.popleft()] if waiting else [])]
        elif flag.removeprefix("--") in LIST_SETTINGS and flag.startswith("--"):
            if flag in ONCE and flag in lists:
                raise ConfigError(f"{flag} is given twice: name all models behind one flag, as in {flag} a b")
            values = lists.setdefault(flag, [])
            values += [value] if separator else []
            while not separator and waiting and not re.match("-+[a-zA-Z]", waiting[0]):
                values.append(waiting.popleft())
        elif flag.removeprefix("--") in SWITCHES and not separator and not _is_truth(waiting):
            rest.append(f"{flag}=true")
        else:
            rest.append(argument)
    joined = [f"{flag}={json.dumps(values, ensure_ascii=False)}" for flag, values in lists.items()]
    return [*rest[:1], *files, *joined, *rest[1:]]


def _joined_targets(arguments: Sequence[str]) -> list[str]:
    """Write `--target_model_1 a --target_model_2 b` as `--target_model a b`, whatever their order.

    Raises:
        ConfigError: a number is missing, given twice, or given beside `--target_model`.
    """
    rest: list[str] = []
    numbered: dict[int, str] = {}
    waiting = deque(arguments)
    while waiting:
        argument = waiting.popleft()
        found = re.fullmatch(r"--target_model_(\d{1,3})(?:=(.*))?", argument, flags=re.DOTALL)
        if found is None:
            rest.append(argument)
            continue
        number = int(found[1])
        if number in numbered:
            raise ConfigError(f"--target_model_{number} is given twice")
        if found[2] is None and not waiting:
            raise ConfigError(f"{argument} needs a model: a folder or a Hub id")
        numbered[number] = waiting.popleft() if found[2] is None else found[2]
    numbered = {number: name for number, name in numbered.items() if name}  # scripts leave unused ones empty
    missing = [number for number in range(1, max(numbered, default=0) + 1) if number not in numbered]
    if missing or 0 in numbered:
        without = f" without --target_model_{missing[0]}" if missing else ""
        raise ConfigError(f"--target_model_{max(numbered) if missing else 0}{without}: count from 1")
    if numbered and any(argument.partition("=")[0] == "--target_model" for argument in rest):
        raise ConfigError("--target_model and --target_model_1 are two ways to say the same: use one of them")
    return [*rest, *(["--target_model", *(numbered[n] for n in sorted(numbered))] if numbered else [])]


def _is_truth(waiting: Sequence[str]) -> bool:
    """Whether the next argument is the value of a switch."""
    return bool(waiting) and waiting[0].lower() in {"true", "false"}


def _complain(command: str, error: Exception | str, *, status: int) -> int:
    print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _config_files(arguments: Sequence[str]) -> list[str]:
    after = [*arguments[1:], ""]
    return [
        value if separator else next_one
        for (flag, separator, value), next_one in zip((each.partition("=") for each in arguments), after, strict=True)
        if flag == "--config"
    ]


def _in_our_words(error: Exception, arguments: Sequence[str]) -> str:
    """What jsonargparse complains of, with flags as people write them, the file, and what may have been meant."""
    text = " ".join(str(error).split())
    command = next((argument for argument in arguments[:1] if argument in COMMANDS), None)
    known = [field.name for field in fields(COMMANDS[command][0])] if command else []
    given = dict.fromkeys(argument.partition("=")[0] for argument in arguments)
    key = re.match(r'Parser key "(\w+)"', text)
    of_file = text.startswith(("Problems parsing config", "Unexpected config", "Subcommand"))
    of_file = of_file or (key is not None and f"--{key[1]}" not in given)
    if found := re.fullmatch(r"""Parser key "(\w+)": Expected an? (.+?)\. Got value: ?(.*)""", text):
        kind = TYPES.get(found[2], found[2])
        if names := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
            kind = "one of " + names[1].replace("'", "")
        text = f"--{found[1]} {found[3]}: is not {kind}"
    text = re.sub(r'^Parser key "(\w+)": ', r"--\1: ", text)
    if text.startswith("the following arguments are required: "):
        text = re.sub(rf"\b{command}\.(\w+)", lambda m: m[1] if m[1] in POSITIONAL else f"--{m[1]}", text)
    if of_file and "--config" in given:
        text = f"--config {', '.join(_config_files(arguments))}: {text}"
    if found := re.search(r"(?:unrecognized arguments: --|does not accept option ')(\w+)", text):
        meant = difflib.get_close_matches(found[1], known, n=1)
        text += f": is {meant[0]} meant?" if meant else ""
    return f"{text} (see tvmerge {command + ' ' if command else ''}--help)"


def entry() -> None:
    """The console script and `python -m tvmerge`: run a command and leave at once.

    Everything is written and closed by now, and torch takes 0.3 seconds to take itself down.
    """
    listen()
    status = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed before we began
        try:
            stream.flush()
        except OSError:
            status = status or 1
    os._exit(status)
