"""Checks of where scalars and messages go, which options a tracker may be told, and the picture that a file shows of
itself. Nothing is opened for writing."""

import importlib.util
import mimetypes
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.errors import Problem, nearest
from library.options.registry import FLAGS, Options

_TRACKERS = ("tensorboard", "wandb")
_WRITER_SETTINGS = ("comment", "purge_step", "max_queue", "flush_secs", "filename_suffix")
_PLACES = (
    *("pretrained_model_name_or_path", "vae", "text_encoder", "tokenizer_cache_dir", "resume", "base_weights"),
    *("log_tracker_config", "console_log_file", "metadata_thumbnail"),
)
"""Flags whose texts are paths, or may be."""
_THUMBNAIL = "give the path of a PNG, JPEG or WebP, or a data URL"
_SHOWN = 200
"""So much of a text that should be a path is shown."""


def wanted_trackers(options: Options) -> tuple[str, ...]:
    """The trackers that scalars go to: those of `--log_with`, or TensorBoard with `--logging_dir`."""
    flags = options.logging
    if flags.log_with is None:
        return ("tensorboard",) if flags.logging_dir is not None else ()
    return _TRACKERS if flags.log_with == "all" else (flags.log_with,)


def problems(options: Options) -> Iterator[Problem]:
    """Trackers that can't start, and files that can't be read or written."""
    flags = options.logging
    if flags.log_with in ("tensorboard", "all") and flags.logging_dir is None:
        yield Problem(options.where("log_with"), "TensorBoard needs a folder", "add --logging_dir DIR")
    if "wandb" in wanted_trackers(options) and importlib.util.find_spec("wandb") is None:
        advice = "pip install 'lorasmith[wandb]', or use --log_with tensorboard"
        yield Problem(options.where("log_with"), "wandb isn't installed", advice)
    if flags.log_tracker_config is not None:
        yield from _tracker_config(Path(flags.log_tracker_config), options.where("log_tracker_config"))
    if options.config.console_log_file is not None:
        yield from _log_file(Path(options.config.console_log_file), options.where("console_log_file"))
    if options.output.metadata_thumbnail is not None:
        yield from _thumbnail(options.output.metadata_thumbnail, options.where("metadata_thumbnail"))


def _tracker_config(path: Path, where: str) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem(where, f"there is no file {path}")
        return
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        yield Problem(where, f"{path} is no TOML file: {fault}")
        return
    for name, table in tables.items():
        if name not in _TRACKERS:
            advice = nearest(name, _TRACKERS) or f"known are [{'], ['.join(_TRACKERS)}]"
            yield Problem(f"{path} {name}", "is no table of a tracker", advice)
        elif not isinstance(table, dict):
            yield Problem(f"{path} {name}", "must be a table", f"such as [{name}]")
        elif name == "tensorboard":
            for key in table:
                if key not in _WRITER_SETTINGS:
                    advice = nearest(key, _WRITER_SETTINGS) or f"known are {', '.join(_WRITER_SETTINGS)}"
                    yield Problem(f"{path} {name}.{key}", "TensorBoard has no such setting", advice)


def _log_file(path: Path, where: str) -> Iterator[Problem]:
    """A problem if the file can't be written, or its folder neither is there nor could be made."""
    if path.is_dir():
        yield Problem(where, f"{path} is a folder", "give a file")
        return
    if path.exists():
        if not os.access(path, os.W_OK):
            yield Problem(where, f"{path} can't be written: no permission")
        return
    ancestor = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not ancestor.is_dir():
        yield Problem(where, f"{path} can't be made: {ancestor} is no folder")
    elif not os.access(ancestor, os.W_OK | os.X_OK):
        yield Problem(where, f"{path} can't be made: no permission in {ancestor}")


def _thumbnail(value: str, where: str) -> Iterator[Problem]:
    """A problem if it neither is a data URL nor the path of a picture. Of the file the head is read."""
    if value.startswith("data:"):
        return
    path = Path(value)
    try:
        if not path.is_file():
            yield Problem(where, f"there is no file {value[:_SHOWN]}", _THUMBNAIL)
            return
        if (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
            from PIL import Image

            with Image.open(path):
                return
    except (OSError, ValueError):
        pass
    yield Problem(where, f"{value[:_SHOWN]} is no picture that can be read", _THUMBNAIL)


def notices(options: Options) -> Iterator[str]:
    """Flags without effect, and secrets that others can see."""
    flags, trackers = options.logging, wanted_trackers(options)
    for name in ("log_tracker_name", "log_tracker_config"):
        if options.value(name) is not None and not trackers:
            yield f"{options.where(name)}: has no effect without --logging_dir or --log_with wandb"
    if flags.log_config and not trackers:
        yield f"{options.where('log_config')}: has no effect without --logging_dir or --log_with wandb"
    if flags.log_prefix is not None and "tensorboard" not in trackers:
        yield f"{options.where('log_prefix')}: has no effect without TensorBoard (--logging_dir)"
    for name in ("wandb_run_name", "wandb_api_key"):
        if options.value(name) is not None and flags.log_with == "tensorboard":
            yield f"{options.where(name)}: has no effect without --log_with wandb or all"
    if flags.wandb_api_key is not None and options.where("wandb_api_key") == "--wandb_api_key":
        yield "--wandb_api_key: other users of this machine can see command lines; better set WANDB_API_KEY"


def logged_options(options: Options) -> dict[str, bool | int | float | str | None]:
    """What trackers are told of the options: names and plain values, without secrets, paths, and what is refused."""
    found: dict[str, bool | int | float | str | None] = {}
    for name, value in options.effective().items():
        flag = FLAGS[name]
        if flag.shape != "path" and name not in _PLACES and flag.kind != "refused":
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> bool | int | float | str | None:
    """A value that every tracker takes; of a list, the items that aren't settings with a path in them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return " ".join(str(item) for item in value if not _is_path(str(item).partition("=")[2]))
    return str(value)


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text
