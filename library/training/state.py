"""Resumable states: a folder with our own manifest, the trained tensors and the optimizer's.

Because every random draw is keyed by its place in the run, a state holds no random numbers: where the run stands, what
was learned, and the settings that a resumed run must share. Folders are complete or absent: they are written under a
temporary name, flushed and renamed, and every file's hash stands in the manifest. What isn't here: when states are
written and which old ones go (steps, saving), and what the settings are (run_settings).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library.console import warn
from library.errors import UserError
from library.training.same_run import differences

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TENSORS = "trained.safetensors"
OPTIMIZER = "optimizer.pt"
SUFFIX = "-state"
_REPLACED = ".replaced"
_DELETED = ".deleted"

_START_ANEW = "or start from its weights with --network_weights (embeddings: --weights) and --initial_step"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after `updates_done` updates, and its settings.

    A resume must share `settings`; `may_change` holds those that it may change, with a line that says so. `watch` is
    what JSON can hold of the advisor's state (training.watch); `world_size` is the number of processes; `frozen` has
    the parts that are trained no more, by name, with the update after which they weren't.
    """

    updates_done: int
    session_id: int
    started_at: float
    seed: int
    schedule_total: int
    total_updates: int
    losses: tuple[float | None, ...]
    settings: dict[str, str]
    may_change: dict[str, str]
    watch: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    frozen: dict[str, int] = field(default_factory=dict)


class UnstorableStateError(Exception):
    """An optimizer or schedule keeps objects that can't be read back without running code; nothing was written."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_state(folder: Path, state: RunState, tensors: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Write a state folder; one of the same name is replaced only when the new one is complete.

    Raises:
        UnstorableStateError: the optimizer's state can't be read back as `load_tensors` does; older states stay.
    """
    _tidy(folder)
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    try:
        _write_files(temporary, state, tensors, optimizer)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(folder.with_name(f".{folder.name}{_REPLACED}"))
    temporary.rename(folder)
    flush(folder.parent)
    _tidy(folder)


def _write_files(folder: Path, state: RunState, tensors: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """The files of a state, flushed to the disk."""
    import torch

    from library.weights.files import save_safetensors

    folder.mkdir(parents=True)
    save_safetensors(tensors, folder / TENSORS, {})
    torch.save(dict(optimizer), folder / OPTIMIZER)
    with _known_classes():
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(folder / OPTIMIZER)
    if unknown:
        raise UnstorableStateError(f"the optimizer or schedule keeps {', '.join(sorted(unknown))} in its state")
    manifest = {
        "format": "lorasmith state",
        "version": FORMAT_VERSION,
        "files": {name: _digest(folder / name) for name in (TENSORS, OPTIMIZER)},
        **asdict(state),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def _known_classes() -> Any:
    """A context in which torch also reads numpy's arrays and numbers, which are harmless to build.

    Of other classes it knows tensors and Python's plain ones; the rest is refused, since reading it would run code.
    """
    import numpy as np
    import torch

    arrays: list[Callable[..., Any]] = [np.ndarray, np.dtype, *_numpy_builders()]
    numbers = [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")]
    return torch.serialization.safe_globals([*arrays, *numbers])


def _numpy_builders() -> list[Callable[..., Any]]:
    """The functions by which numpy's pickles are read."""
    import numpy as np

    return [builder for builder in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]) if callable(builder)]


def delete_state(folder: Path) -> None:
    """Delete a state folder; if that is cut short, no half of one bears its name."""
    doomed = folder.with_name(f".{folder.name}{_DELETED}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Delete what earlier, killed writers of this state left behind; bring the old state back if it is all there is."""
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete state of ours, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == "lorasmith state" else None


def find_latest(output_dir: Path, output_name: str | None) -> Path | None:
    """The whole state of this output name that is furthest in the run that was saved last, or None.

    Damaged ones are passed over with a warning, unless there is no other.
    """
    for replaced in output_dir.glob(f".*{SUFFIX}{_REPLACED}"):
        _tidy(replaced.with_name(replaced.name[1:].removesuffix(_REPLACED)))
    found: dict[tuple[int, float], list[tuple[int, Path]]] = {}
    saved_at: dict[tuple[int, float], float] = {}
    for folder in sorted(output_dir.glob(f"*{SUFFIX}")):
        manifest = _manifest(folder) if _is_named(folder, output_name) else None
        if manifest:
            run = (int(manifest.get("session_id", 0)), float(manifest.get("started_at", 0)))
            found.setdefault(run, []).append((int(manifest.get("updates_done", 0)), folder))
            saved_at[run] = max(saved_at.get(run, 0.0), (folder / MANIFEST).stat().st_mtime)
    runs = sorted(found, key=lambda run: saved_at[run], reverse=True)
    candidates = [folder for run in runs for _, folder in sorted(found[run], reverse=True)]
    for folder in candidates:
        damage = _damage(folder)
        if damage is None:
            return folder
        warn(f"--resume latest: {folder} is damaged ({damage}) and passed over")
    return candidates[0] if candidates else None


def _is_named(folder: Path, output_name: str | None) -> bool:
    """Whether a state folder has one of the names that runs of this output name give."""
    stem = folder.name.removesuffix(SUFFIX)
    base, _, tail = stem.rpartition("-")
    if output_name is None:
        return stem == "last" or base in ("at", "epoch")
    return stem == output_name or (base == output_name and tail.removeprefix("step").isdigit())


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a state that has a manifest."""
    manifest = _manifest(folder) or {}
    for name, digest in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            return f"{name} is missing or changed"
    return None


def read_state(folder: Path) -> RunState:
    """The manifest of a state folder, after its files were checked against their hashes. Imports no torch.

    Raises:
        UserError: no folder, a state of another program or version, or damaged files.
    """

    def refuse(wrong: str, advice: str) -> UserError:
        return UserError.single("--resume", f"{folder} {wrong}", advice)

    if not folder.is_dir():
        raise refuse("is no folder", "give a folder that --save_state has written, or `latest`")
    manifest = _manifest(folder)
    if manifest is None:
        if (folder / "train_state.json").exists() or (folder / "random_states_0.pkl").exists():
            raise refuse(
                "was written by sd-scripts; its data order and random numbers can't be taken over",
                _START_ANEW.removeprefix("or "),
            )
        raise refuse("holds no manifest.json of lorasmith", "give a folder that --save_state has written, or `latest`")
    version = manifest.get("version")
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        advice = f"finish that run with the lorasmith that wrote it, {_START_ANEW}" if older else "update lorasmith"
        raise refuse(f"has format version {version}, this program reads {FORMAT_VERSION}", advice)
    if damage := _damage(folder):
        raise refuse(f"is damaged: {damage}", "resume from another state")
    fields = {key: manifest[key] for key in RunState.__dataclass_fields__ if key in manifest or key != "frozen"}
    return RunState(**{**fields, "losses": tuple(fields["losses"])})


def check_same_run(state: RunState, settings: Mapping[str, str]) -> None:
    """Refuse to go on with other settings than the run was started with.

    Raises:
        UserError: one problem for each setting that differs.
    """
    if problems := list(differences(state.settings, settings)):
        raise UserError(problems)


def changes(state: RunState, may_change: Mapping[str, str], world_size: int | None = None) -> list[str]:
    """A line for each setting that a resumed run has otherwise than the run was started with."""
    lines = [
        f"--resume: {name} was {state.may_change.get(name)}, from here on it is {value}"
        for name, value in may_change.items()
        if state.may_change.get(name, value) != value
    ]
    if world_size is not None and world_size != state.world_size:
        lines.append(
            f"--resume: the run had {state.world_size} processes, from here on {world_size}: samples and noise stay "
            "the same, sums over processes may differ in their last bits"
        )
    return lines


def schedule_total(state: RunState, total: int, choice: str | None) -> int:
    """How many steps the learning-rate curve of a resumed run spans.

    Raises:
        UserError: the run is complete, or its number of steps changed and the user did not choose what that means.
    """
    if total <= state.updates_done:
        raise UserError.single(
            "--resume",
            f"this run is complete: {state.updates_done} of {total} steps are done",
            "for more, raise --max_train_steps and say --resume_schedule keep or stretch",
        )
    if total == state.total_updates:
        return state.schedule_total
    if choice is None:
        raise UserError.single(
            "--max_train_steps",
            f"the run was started for {state.total_updates} steps, this is for {total}",
            "say --resume_schedule keep (the old learning-rate curve) or stretch (a curve over the new total)",
        )
    return total if choice == "stretch" else state.schedule_total


def load_tensors(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained tensors and the optimizer's state dict. Never runs code from the file."""
    import torch
    from safetensors.torch import load_file

    with _known_classes():
        optimizer = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
    return load_file(folder / TENSORS), optimizer
