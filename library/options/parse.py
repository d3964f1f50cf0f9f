"""From `argv` to checked options: command line, config file, conversions, kinds, checks; all problems at once."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError
from library.options import checks, presets, scale_lr, values
from library.options.config_file import FromFile, named, read_config, write_config
from library.options.datasets import read_datasets
from library.options.other_names import OTHER_NAMES, names_of_script
from library.options.parser import read_command_line, scripts_with
from library.options.registry import FLAGS, GROUPS, Options, flags_of_script
from library.options.renaming import Place, combine, rename
from library.options.scripts import TRAIN_NETWORK, Script
from library.options.specs import DatasetSpec


def parse(argv: Sequence[str], needs: Sequence[str] | None = None, script: Script = TRAIN_NETWORK) -> Options:
    """The options that `argv`, without the program's name, and the config file in it ask for.

    Args:
        needs: flags that must be given: those of the script, unless a tool needs fewer.
        script: whose command line it is. Flags of other scripts are unknown in it, and are left out of files.

    Raises:
        UserError: with every problem that was found.
        SystemExit: code 0, after `--help` or `--output_config`.
    """
    typed, problems = read_command_line(argv, script)
    if typed.get("list_optimizers"):
        from library.options.optimizer_names import list_text

        print(list_text())
        raise SystemExit(0)
    file = _config_file(typed)
    problems += file.problems
    preset = presets.read_presets(*_preset(file, typed))
    preset.add_length(file, _file_name(typed))
    problems += preset.problems
    from_line = Place(typed, {name: f"--{name}" for name in typed})
    from_file = Place(file.values, file.places, _without(file.values, script, _file_name(typed)))
    from_preset = Place(preset.values, preset.places, _without(preset.values, script, f"--preset {preset.name}"))
    given = _together((from_line, from_file, from_preset), script, preset.length)
    problems += given.problems
    places = given.places
    read, bad = _read(given.values, places, problems)
    notices = [*file.notices, *given.notices, *_judge(read, places, bad, problems)]
    for cached in ("cache_latents", "cache_text_encoder_outputs"):
        if read.get(f"{cached}_to_disk"):
            read[cached] = True
    options = _build(script, read, places, notices)
    if options.config.output_config:
        _write(options, problems)
    found = checks.check(options, frozenset(bad), tuple(script.needs) if needs is None else needs)
    problems += found.problems
    datasets = read_datasets(options, frozenset(bad))
    problems += datasets.problems
    if preset.length and not problems and "dataset_repeats" not in read:
        options = _repeated(options, preset.length, datasets.specs, notices)
        datasets = read_datasets(options)
    problems += scale_lr.problems(options, datasets.specs)
    if options.config.print_command and not problems:
        print(presets.command(options))
        raise SystemExit(0)
    options, rates = scale_lr.scaled(options, datasets.specs)
    told = dict.fromkeys([*notices, *found.notices, *datasets.notices, *rates])
    lines = tuple(line for line in told if not line.startswith("preset "))
    if problems:
        raise UserError(dict.fromkeys(problems), lines)
    return options.model_copy(update={"notices": lines})


def _preset(file: FromFile, typed: dict[str, Any]) -> tuple[str, str]:
    """The presets that are asked for, and the place that asks."""
    if "preset" in typed:
        return str(typed["preset"] or ""), "--preset"
    return str(file.values.get("preset") or ""), file.places.get("preset", "--preset")


def _file_name(typed: dict[str, Any]) -> str:
    """The config file, as messages name it."""
    return str(named(Path(typed["config_file"]))) if typed.get("config_file") else ""


def _without(found: dict[str, Any], script: Script, where: str) -> list[str]:
    """Drop what a file says for flags that the script doesn't have; the line that tells it."""
    known = {*flags_of_script(script.name), *names_of_script(script)}
    foreign = [name for name in found if name not in known]
    for name in foreign:
        del found[name]
    owners = " and ".join(dict.fromkeys(scripts_with(name) for name in foreign))
    listed = ", ".join(sorted(foreign))
    return [f"{where}: flags of {owners} have no effect here and are ignored: {listed}"] if foreign else []


def _together(places: Sequence[Place], script: Script, length: presets.Length | None) -> Place:
    """What all places say, by our names, and how long a preset's run is; places that come first win."""
    theirs = {name for place in places for name in place.values if name in OTHER_NAMES}
    above: set[str] = set()
    for place in places:
        rename(place, above)
        above |= place.values.keys()
    given = Place({}, {})
    for place in reversed(places):
        for pair in (("scale_lr", "no_scale_lr"), ("caption_preset", "caption_templates")):
            for flag, opposite in (pair, pair[::-1]):
                if place.values.get(flag) not in (None, False, "false", "0", ""):
                    given.values.pop(opposite, None)
                    given.places.pop(opposite, None)
        given.values |= place.values
        given.places |= place.places
    for place in places:
        given.notices += place.notices
        given.problems += place.problems
    combine(given, theirs, script, paced=length is not None)
    given.notices += presets.settle(given.values, given.places, script)
    if length and not {"max_train_steps", "max_train_epochs"} & given.values.keys():
        given.put("max_train_steps", length.steps, "preset: steps")
    return given


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


def _build(script: Script, read: dict[str, Any], places: dict[str, str], notices: list[str]) -> Options:
    by_group: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name, value in {**script.defaults, **read}.items():
        by_group[FLAGS[name].group][name] = value
    groups = {name: GROUPS[name](**members) for name, members in by_group.items()}
    more = {"script": script.name, "explicit": frozenset(read), "places": places, "notices": tuple(notices)}
    return Options.model_validate({**groups, **more})


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
