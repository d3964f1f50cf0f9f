"""From `argv` to checked options: command line, config file, conversions, kinds, checks; all problems at once."""

import os
from collections.abc import Sequence
from typing import Any

from library.errors import Problem, UserError
from library.options import checks, presets, values
from library.options.config_file import FromFile, read_config, write_config
from library.options.datasets import read_datasets
from library.options.parser import read_command_line
from library.options.registry import FLAGS, GROUPS, Options
from library.options.specs import DatasetSpec


def parse(argv: Sequence[str], needs: Sequence[str] = tuple(checks.NEEDS)) -> Options:
    """The options that `argv`, without the program's name, and the config file in it ask for.

    `needs` are the flags that must be given: those of a training, unless a tool needs fewer.

    Raises:
        UserError: with every problem that was found.
        SystemExit: code 0, after `--help` or `--output_config`.
    """
    typed, problems = read_command_line(argv)
    if typed.get("list_optimizers"):
        from library.options.optimizer_names import list_text

        print(list_text())
        raise SystemExit(0)
    file = _config_file(typed)
    problems += file.problems
    given = {**file.values, **typed}
    places = {**file.places, **{name: f"--{name}" for name in typed}}
    preset = presets.read_presets(str(given.get("preset") or ""), places.get("preset", "--preset"))
    preset.add_length(file, str(typed.get("config_file")))
    problems += preset.problems
    if preset.length and not {"max_train_steps", "max_train_epochs"} & given.keys():
        given["max_train_steps"], places["max_train_steps"] = preset.length.steps, "preset: steps"
    places = {**preset.places, **places}
    read, bad = _read({**preset.values, **given}, places, problems)
    notices = [*file.notices, *_judge(read, places, bad, problems)]
    for cached in ("cache_latents", "cache_text_encoder_outputs"):
        if read.get(f"{cached}_to_disk"):
            read[cached] = True
    options = _build(read, places, notices)
    if options.config.output_config:
        _write(options, problems)
    found = checks.check(options, frozenset(bad), needs)
    problems += found.problems
    datasets = read_datasets(options, frozenset(bad))
    problems += datasets.problems
    if preset.length and not problems and "dataset_repeats" not in read:
        options = _repeated(options, preset.length, datasets.specs, notices)
    if options.config.print_command and not problems:
        print(presets.command(options))
        raise SystemExit(0)
    told = dict.fromkeys([*notices, *found.notices, *datasets.notices])
    lines = tuple(line for line in told if not line.startswith("preset "))
    if problems:
        raise UserError(dict.fromkeys(problems), lines)
    return options.model_copy(update={"notices": lines})


def _repeated(options: Options, length: presets.Length, specs: Sequence[DatasetSpec], notices: list[str]) -> Options:
    """The options with as many repeats as a preset's epochs need, for the subsets that name none."""

    def with_repeats(number: int) -> Options:
        dataset = options.dataset.model_copy(update={"dataset_repeats": number})
        return options.model_copy(update={"dataset": dataset, "explicit": options.explicit | {"dataset_repeats"}})

    batches = options.training.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    number, pictures = presets.repeats(length, specs, read_datasets(with_repeats(2)).specs, batches)
    if not pictures or number == options.dataset.dataset_repeats:
        return options
    notices.append(f"preset: --dataset_repeats {number} for {pictures} pictures makes about {length.epochs} epochs")
    return with_repeats(number)


def _config_file(typed: dict[str, Any]) -> FromFile:
    """What the config file says; nothing if there is none, if its name is wrong, or if it is about to be written."""
    path = typed.get("config_file")
    if not path or typed.get("output_config"):
        return FromFile()
    try:
        return read_config(values.read(FLAGS["config_file"], path))
    except ValueError:
        return FromFile()


def _read(raw: dict[str, Any], places: dict[str, str], problems: list[Problem]) -> tuple[dict[str, Any], set[str]]:
    """The values of the flags that were set, and the names of those that make no sense."""
    read: dict[str, Any] = {}
    bad: set[str] = set()
    for name, text in raw.items():
        try:
            value = values.read(FLAGS[name], text)
        except ValueError as error:
            problems.append(Problem(places[name], str(error)))
            bad.add(name)
            continue
        if not isinstance(value, values.Unset):
            read[name] = value
    return read, bad


def _judge(read: dict[str, Any], places: dict[str, str], bad: set[str], problems: list[Problem]) -> list[str]:
    """Problems for refused flags and values; returns a line for each flag that needs nothing to be done."""
    lines = []
    for name, value in read.items():
        flag = FLAGS[name]
        if str(value) in flag.refuse:
            problems.append(Problem(places[name], f"{value} can't be used", flag.refuse[str(value)]))
            bad.add(name)
            continue
        if value == flag.default or not value:
            continue
        if flag.kind == "equivalent":
            lines.append(f"{places[name]}: nothing to do: {flag.why}")
        elif flag.needs is not None and read.get(flag.needs, FLAGS[flag.needs].default) == FLAGS[flag.needs].default:
            lines.append(f"{places[name]}: has no effect without --{flag.needs}")
        elif flag.kind == "refused":
            wrong, _, advice = flag.why.partition("; ")
            problems.append(Problem(places[name], wrong, advice))
            bad.add(name)
    return lines


def _build(read: dict[str, Any], places: dict[str, str], notices: list[str]) -> Options:
    by_group: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name, value in read.items():
        by_group[FLAGS[name].group][name] = value
    groups = {name: GROUPS[name](**members) for name, members in by_group.items()}
    return Options.model_validate({**groups, "explicit": frozenset(read), "places": places, "notices": tuple(notices)})


def _write(options: Options, problems: list[Problem]) -> None:
    """Serve `--output_config`, and stop."""
    if options.config.config_file is None:
        problems.append(Problem("--output_config", "needs the name of the file", "add --config_file FILE.toml"))
    if problems:
        raise UserError(dict.fromkeys(problems))
    assert options.config.config_file is not None
    path = write_config(options.config.config_file, options)
    print(f"wrote {path}")
    raise SystemExit(0)
