"""Hugging Face `datasets` as a source: its pictures as files, its captions as texts. Needs the extra `hub`.

Pictures are written once, byte for byte, into the subset's folder; rows that name local files are used where they lie.
Only columns are read, through Arrow: nothing is decoded, and torch isn't imported. The split is always `train`.
"""

import contextlib
import hashlib
import importlib
import json
import os
import posixpath
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from library.console import track
from library.data.captions import replaces
from library.data.sources.listing import Findings, Listed, caption_of
from library.data.sources.picture_files import Folders, some
from library.errors import Problem, UserError, nearest
from library.options.specs import Columns, HubDataset, SubsetSpec

SPLIT = "train"
MANIFEST = "lorasmith-export.json"
"""What the pictures of a folder were made from, and their names; written when all of them are there."""
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_SIGNS = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"),
    (4, b"ftypavi", ".avif"),
    (0, b"\xff\x0a", ".jxl"),
    (4, b"JXL ", ".jxl"),
    (0, b"GIF8", ".gif"),
)
_OURS = re.compile(r"\d{6,}(-mask)?\.[a-z]+")
_BATCH = 64
_PATIENCE = 3.0
"""Seconds until a hub that doesn't answer counts as out of reach."""
_VERSION = 1


@dataclass(frozen=True)
class _Exported:
    """File of each row: a name in the subset's folder, an absolute path, or empty where the row has no picture."""

    images: tuple[str, ...]
    masks: tuple[str, ...]


def list_hub(spec: SubsetSpec, findings: Findings) -> list[Listed]:
    """The pictures of `spec.hub`, in the order of its rows; what is wrong is in `findings`.

    The name is a hub id or a local path: what `save_to_disk` wrote, a data file, or a folder that `datasets` can read.
    A local path is read without the network; hub ids honour HF_HUB_OFFLINE and HF_DATASETS_OFFLINE. The mask column
    may be absent; it is used if `spec.masks`.
    """
    hub = spec.hub
    if hub is None:
        raise ValueError(f"a subset of kind {spec.source} without a dataset")
    try:
        rows = _open(hub)
        columns = _columns(rows, spec, findings)
        exported = _export(rows, columns, spec.image_dir, hub)
    except UserError as error:
        findings.problems += error.problems
        return []
    captions = _captions(rows, columns.get("caption"), spec, findings)
    return _listed(spec, exported, captions, findings)


def _local(hub: HubDataset) -> Path | None:
    """The path that a dataset's name means; None for a hub id."""
    path = Path(hub.name).expanduser()
    return path if path.exists() or path.is_absolute() or hub.name.startswith((".", "~")) else None


def _base(hub: HubDataset) -> Path:
    """The folder that relative names of pictures in a dataset's columns start from."""
    path = _local(hub) or Path()
    return (path.parent if path.is_file() else path).resolve()


def _open(hub: HubDataset) -> Any:
    """The `datasets.Dataset` of the split.

    Raises:
        UserError: the package is absent, there is no such dataset, configuration or split, or it can't be read.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        advice = "install it: pip install -e '.[hub]'"
        raise UserError.single(hub.name, "a dataset needs the package `datasets`", advice) from None
    path = _local(hub)
    if path is not None and not path.exists():
        raise UserError.single(hub.name, "there is no such file or folder", "name a hub id or an existing path")
    failures = (OSError, ValueError, RuntimeError, LookupError, TypeError, datasets.exceptions.DatasetsError)
    try:
        return _load(datasets, hub, path)
    except UserError:
        raise
    except failures as error:
        raise UserError([_failure(datasets, hub, path, error)]) from None


def _load(datasets: Any, hub: HubDataset, path: Path | None) -> Any:
    cache = None if hub.cache_dir is None else str(hub.cache_dir)
    if path is None:
        with _offline_if_unreachable(datasets):
            return datasets.load_dataset(hub.name, hub.config, split=SPLIT, cache_dir=cache)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if SPLIT not in found:
            raise UserError([_no_split(hub, list(found))])
        return found[SPLIT]
    cache = str(_own_cache(Path(cache or datasets.config.HF_DATASETS_CACHE), path))
    if path.is_file():
        kind = _FORMATS.get(path.suffix.lower())
        if kind is None:
            wrong = f"a dataset can't be read from a {path.suffix or 'nameless'} file"
            raise UserError.single(hub.name, wrong, f"name a folder, or a file that ends in {', '.join(_FORMATS)}")
        return datasets.load_dataset(kind, data_files=str(path.resolve()), split=SPLIT, cache_dir=cache)
    return datasets.load_dataset(str(path.resolve()), hub.config, split=SPLIT, cache_dir=cache)


@contextlib.contextmanager
def _offline_if_unreachable(datasets: Any) -> Iterator[None]:
    """Look into the cache alone where the hub doesn't answer: `datasets` would go on trying for half a minute."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    host = urlsplit(hub.ENDPOINT)
    try:
        if not getproxies():
            socket.create_connection((host.hostname or "", host.port or 443), timeout=_PATIENCE).close()
        reachable = True
    except OSError:
        reachable = False
    switches: list[tuple[Any, bool]] = [(module, module.HF_HUB_OFFLINE) for module in (hub, datasets.config)]
    try:
        for module, value in switches:
            module.HF_HUB_OFFLINE = value or not reachable
        yield
    finally:
        for module, value in switches:
            module.HF_HUB_OFFLINE = value


def _own_cache(parent: Path, path: Path) -> Path:
    """Where `datasets` keeps what it makes of a local path: a folder for this very state of its files, since it would
    take one local folder for another that has the same name and configurations."""
    digest = hashlib.blake2b(str(path.resolve()).encode("utf-8", "surrogateescape"), digest_size=12)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0".encode("utf-8", "replace"))
    return parent / f"lorasmith-{digest.hexdigest()}"


def _failure(datasets: Any, hub: HubDataset, path: Path | None, error: Exception) -> Problem:
    """Why `datasets` could not give the split, in one line."""
    text = " ".join(str(error).split())
    splits = re.search(r"Unknown split .* Should be one of \[(.*?)\]", text)
    if splits:
        return _no_split(hub, [name.strip(" '\"") for name in splits.group(1).split(",") if name.strip()])
    configs = re.search(r"(?:BuilderConfig .* not found\. Available|among the available configs): \[(.*?)\]", text)
    if configs:
        names = configs.group(1).replace("'", "")
        wrong = f"there is no configuration {hub.config}" if hub.config else "it has several configurations"
        return Problem(hub.name, f"{wrong}; they are: {names}", "name one with dataset_config_name")
    if path is None and datasets.config.HF_HUB_OFFLINE:
        wrong = "it isn't in the cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to fetch it"
        return Problem(hub.name, wrong, "fetch it once while online, or name a local path")
    if path is None and isinstance(error, OSError):
        wrong = "there is no such path here, it isn't in the cache, and the hub has none or can't be reached"
        return Problem(hub.name, wrong, f"name a path that exists, or fetch it once while online ({text[:150]})")
    cause = error.__cause__ or error.__context__
    why = f" ({' '.join(str(cause).split())[:200]})" if cause is not None and str(cause) not in text else ""
    return Problem(hub.name, f"the dataset can't be read: {text[:300]}{why}")


def _no_split(hub: HubDataset, names: Sequence[str]) -> Problem:
    wrong = f"the dataset has no split {SPLIT}, but {some(names) or 'nothing'}"
    return Problem(hub.name, wrong, f"save the pictures to train on as its split {SPLIT}")


def _columns(rows: Any, spec: SubsetSpec, findings: Findings) -> dict[str, str]:
    """The columns to read by role: `image`, and if they are there, `caption` and `mask`.

    Raises:
        UserError: a column that the user named is not there, or one holds something else than is wanted.
    """
    wanted = {"image": spec.columns.image, "caption": spec.columns.caption, "mask": spec.columns.mask}
    usual, there = Columns(), list(rows.column_names)
    found: dict[str, str] = {}
    problems: list[Problem] = []
    name = spec.hub.name if spec.hub else ""
    if spec.columns.mask in there and not spec.masks:
        findings.notices.append(f"{name}: its column {spec.columns.mask} is not used; --masked_loss uses it")
    for role, column in wanted.items():
        if role == "mask" and not spec.masks:
            continue
        if column in there:
            found[role] = column
            kind = _kind(rows.features[column])
            allowed = ("text",) if role == "caption" else ("picture", "bytes", "text", "pixels")
            if kind not in allowed:
                needed = "texts" if role == "caption" else "pictures or paths of pictures"
                wrong = f"column {column} holds {kind}, not {needed}"
                problems.append(Problem(name, wrong, f"name another with {role}_column: {_told(there, column)}"))
        elif role == "image" or column != getattr(usual, role):
            wrong = f"there is no column {column}, but {_told(there)}"
            advice = nearest(column, there) or f"name one with {role}_column"
            problems.append(Problem(name, wrong, advice))
        elif role == "caption" and not replaces(spec.caption):
            instead = f'the class tokens "{spec.class_tokens}" are' if spec.class_tokens else "an empty caption is"
            findings.notices.append(
                f"{name}: there is no column {column}, but {_told(there)}; {instead} used "
                "(caption_column names the column of captions)"
            )
    if problems:
        raise UserError(problems)
    return found


def _told(columns: Sequence[str], without: str = "") -> str:
    return some([column for column in columns if column != without], 20) or "no other"


def _kind(feature: Any) -> str:
    """What a column holds: `picture` (bytes or a path), `bytes`, `text`, `pixels`, or other things in words."""
    name, dtype = type(feature).__name__, str(getattr(feature, "dtype", ""))
    if name == "Image" or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature)):
        return "picture"
    if name == "Value" and dtype in ("string", "large_string"):
        return "text"
    if name == "Value" and dtype in ("binary", "large_binary"):
        return "bytes"
    if dtype == "uint8" and (name == "Array2D" or (name == "Array3D" and feature.shape[2] in (1, 2, 3, 4))):
        return "pixels"
    if name == "Value":
        return f"values of type {dtype}"
    return "lists" if isinstance(feature, list) or name in ("List", "LargeList", "Sequence") else f"{name} values"


def _captions(rows: Any, column: str | None, spec: SubsetSpec, findings: Findings) -> list[str | None]:
    """The caption of each row; None where the class tokens stand for it."""
    if column is None:
        return [None if spec.class_tokens else ""] * len(rows)
    texts = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    captions: list[str | None] = [caption_of(text or "", spec.caption.wildcards) for text in texts]
    empty = captions.count("")
    if empty and not replaces(spec.caption):
        findings.notices.append(f"{spec.name}: {empty} of {len(texts)} captions are empty")
    return captions


def _listed(spec: SubsetSpec, exported: _Exported, captions: Sequence[str | None], findings: Findings) -> list[Listed]:
    """Rows as pictures; says which rows have none, and which files are named twice or aren't there."""
    name = spec.hub.name if spec.hub else ""
    without: list[str] = []
    remote: list[str] = []
    twice: list[str] = []
    seen: set[str] = set()
    listed: list[Listed] = []
    for row, image in enumerate(exported.images):
        mask = exported.masks[row] if exported.masks else ""
        if not image:
            without.append(str(row))
        elif "://" in image or "://" in mask:
            remote.append(f"{image if '://' in image else mask} (row {row})")
        elif image in seen:
            twice.append(f"{image} (row {row})")
        else:
            seen.add(image)
            mask_path = str((spec.image_dir / mask).absolute()) if mask else None
            listed.append(Listed(image, captions[row], mask_path, f"{spec.name} row {row}"))
    folders = Folders()
    gone = [path for one in listed for path in (one.key, one.mask) if path and path[0] == "/" and path not in folders]
    for rows, wrong, advice in (
        (without, "rows without a picture", "remove them from the dataset"),
        (remote, "rows whose picture is an address, which isn't fetched", "save the pictures in the dataset"),
        (twice, "rows with a picture that an earlier row has", "name each picture once"),
        (gone, "rows name files that aren't there", "mend their paths"),
    ):
        if rows:
            findings.problems.append(Problem(name, f"{wrong}: {some(rows)}", advice))
    if not exported.images:
        findings.problems.append(Problem(name, f"the split {SPLIT} has no rows"))
    lost = set(gone)
    return [one for one in listed if one.key not in lost and one.mask not in lost]


def _export(rows: Any, columns: Mapping[str, str], folder: Path, hub: HubDataset) -> _Exported:
    """Make sure that every row's picture is a file; nothing is read that was exported before.

    Files that are there already with the same bytes stay as they are, so an interrupted export goes on where it
    stopped, several processes may do the same one, and cached latents stay valid when other rows change.

    Raises:
        UserError: a file can't be written.
    """
    roles = {role: columns[role] for role in ("image", "mask") if role in columns}
    origin = {"version": _VERSION, "fingerprint": rows._fingerprint, "rows": len(rows), "columns": roles}
    try:
        before = _manifest(folder)
        known = _known(folder, before, origin)
        if known is not None:
            return known
        folder.mkdir(parents=True, exist_ok=True)
        base = _base(hub)
        files: dict[str, list[str]] = {role: [] for role in roles}
        for row, values in enumerate(track(_values(rows, roles), "exporting pictures", len(rows))):
            for role, value in values.items():
                files[role].append(_file(value, f"{row:06d}{'-mask' if role == 'mask' else ''}", folder, base))
        for name in _outdated(before, origin) - {name for names in files.values() for name in names}:
            (folder / name).unlink(missing_ok=True)
        _write(folder / MANIFEST, json.dumps({"origin": origin, **files}).encode())
    except OSError as error:
        wrong = f"pictures can't be written to {folder}: {error.strerror or error}"
        raise UserError.single(hub.name, wrong, "make room, or let XDG_CACHE_HOME name another folder") from None
    return _Exported(tuple(files["image"]), tuple(files.get("mask", ())))


def _manifest(folder: Path) -> dict[str, Any]:
    """What an earlier run wrote of its export, empty if there is nothing that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _known(folder: Path, manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> _Exported | None:
    """What an earlier run exported from the same rows, if all of it is still there."""
    try:
        if manifest["origin"] != origin:
            return None
        exported = _Exported(tuple(manifest["image"]), tuple(manifest.get("mask", ())))
        there = {entry.name for entry in os.scandir(folder)}
        names = (*exported.images, *exported.masks)
        return exported if all(not name or "/" in name or name in there for name in names) else None
    except (OSError, LookupError, TypeError):
        return None


def _outdated(manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> set[str]:
    """The files that an earlier state of the same columns has made, and nobody else."""
    try:
        if manifest["origin"]["columns"] != origin["columns"]:
            return set()
        names = [name for role in origin["columns"] for name in manifest[role]]
        return {name for name in names if _OURS.fullmatch(name)}
    except (LookupError, TypeError):
        return set()


def _values(rows: Any, roles: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The stored values of each row by role, a few rows at a time."""
    chosen = rows.select_columns(list(dict.fromkeys(roles.values()))).with_format("arrow")
    for table in chosen.iter(batch_size=_BATCH):
        lists = {role: table.column(column).to_pylist() for role, column in roles.items()}
        for row in range(table.num_rows):
            yield {role: values[row] for role, values in lists.items()}


def _file(value: Any, name: str, folder: Path, base: Path) -> str:
    """The file of one stored value: written if it isn't one yet. Empty for no picture; an address stays as it is."""
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if not value:
        return ""
    if isinstance(value, str):
        return value if "://" in value else posixpath.normpath(base / value)
    data = value if isinstance(value, bytes) else _png(value)
    name += next((ending for at, sign, ending in _SIGNS if data[at:].startswith(sign)), ".bin")
    path = folder / name
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        _write(path, data)
    return name


def _png(pixels: Any) -> bytes:
    """Rows of uint8 pixels, (h, w) or (h, w, 1..4), as a PNG file."""
    import io

    import numpy as np
    from PIL import Image

    array = np.asarray(pixels, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(stream, "PNG")
    return stream.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that it is whole or not there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
