"""Sending what a run saves to the Hugging Face hub, and fetching a state from there. Imports no torch.

An upload is a copy of what lies in the output folder, and its failure a warning: neither a run nor a local file depends
on it. What is to be sent, and when, is told from outside (training.saving); models come by library.models.hub.
"""

import glob
import importlib
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.console import say, warn
from library.errors import UserError
from library.options.output import Hub
from library.options.state_checks import HubState, RepoKind, repo_kind

SPOOL = ".uploading"
"""Folder beside the saved files, in which those that wait to be sent have a second name (a hard link)."""


@dataclass(frozen=True)
class HubPlace:
    """Where on the hub files go: `folder` of the repository `user/name`, the empty text for its top. Without a user,
    the repository is one of whoever the token belongs to.

    `public` is None where nothing was said; a new repository is private then. `endpoint` is None for the hub itself.
    """

    repo: str
    kind: RepoKind = "model"
    folder: str = ""
    public: bool | None = None
    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    @classmethod
    def of(cls, flags: Hub) -> "HubPlace | None":
        """What the flags say; None where nothing is to be sent."""
        if flags.huggingface_repo_id is None:
            return None
        visibility = flags.huggingface_repo_visibility
        return cls(
            flags.huggingface_repo_id,
            repo_kind(flags.huggingface_repo_type),
            (flags.huggingface_path_in_repo or "").strip("/"),
            None if visibility is None else visibility.lower() == "public",
            flags.huggingface_token,
        )

    def name(self, path: Path, root: Path | None = None) -> str:
        """The name in the repository of a local file or folder: as under `root`, where that is told and holds it."""
        name = path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True)
class _Job:
    """A file or folder to be sent: its own place, and the second name under which it waits."""

    original: Path
    waiting: Path

    def forget(self) -> None:
        """Take the second name away."""
        if self.waiting != self.original:
            shutil.rmtree(self.waiting.parent, ignore_errors=True)
            with suppress(OSError):
                self.waiting.parent.parent.rmdir()

    def give_back(self) -> None:
        """Take the second name away; what has no other name any more gets its own one back."""
        if not self.original.exists() and self.waiting.exists():
            self.waiting.rename(self.original)
        self.forget()


class Uploader:
    """Sends saved files, one after the other; with `background`, on a thread of its own while the run goes on.

    With `background`, a file that is replaced or deleted meanwhile is sent as it was when it was saved.
    """

    def __init__(
        self, place: HubPlace, *, states: bool = False, background: bool = False, root: Path | None = None
    ) -> None:
        """Args:
        states: send state folders, too.
        root: the output folder; what lies in a folder of it has that folder on the hub, too.
        """
        self._place, self._states, self._root = place, states, root
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._failed: list[_Job] = []
        self._sent = 0
        self._number = 0
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True) if background else None

    @classmethod
    def of(cls, flags: Hub, root: Path | None = None) -> "Uploader | None":
        """What the flags ask for; None where nothing is to be sent. `root` is the output folder."""
        place = HubPlace.of(flags)
        if place is None:
            return None
        return cls(place, states=flags.save_state_to_huggingface, background=flags.async_upload, root=root)

    @property
    def address(self) -> str:
        """Where the files go, as a user writes it."""
        kind = "" if self._place.kind == "model" else f"{self._place.kind}s/"
        return f"{kind}{self._place.repo}" + (f"/{self._place.folder}" if self._place.folder else "")

    def check(self) -> None:
        """Find out whose repository it is, make it if there is none, and see that files may be put there. Called before
        a training.

        Raises:
            UserError: it can't be reached, or the token doesn't allow it.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        place, api = self._place, self._api()
        try:
            if "/" not in place.repo:
                place = self._place = replace(place, repo=f"{api.whoami()['name']}/{place.repo}")
            where = {"repo_id": place.repo, "repo_type": place.kind}
            try:
                found = api.repo_info(**where)
            except RepositoryNotFoundError:
                sdk = {"space_sdk": "static"} if place.kind == "space" else {}
                api.create_repo(**where, private=not place.public, exist_ok=True, **sdk)
                say(f"made the {'public' if place.public else 'private'} repository {place.repo} on the hub")
                return
            api.auth_check(**where, write=True)
        except Exception as fault:
            raise _refusal("--huggingface_repo_id", f"can't send files to {place.repo}", fault, "write") from fault
        if place.public is not None and bool(found.private) == place.public:
            seen = "private" if found.private else "public"
            warn(f"--huggingface_repo_visibility is for new repositories: {place.repo} exists and stays {seen}")

    def send(self, path: Path) -> None:
        """Send a file, or a state folder if states are to be sent. Never raises: a failure is a warning.

        What can't be put aside (the disk is full, say) is sent at once.
        """
        if path.is_dir() and not self._states:
            return
        self._number += 1
        spool = (self._root or path.parent) / SPOOL
        if self._number == 1:
            _tidy(spool)
        job = _Job(path, spool / f"{socket.gethostname()}-{os.getpid()}-{self._number}" / path.name)
        try:
            _link(path, job.waiting)
        except OSError:
            self._upload(_Job(path, path))
            return
        if self._thread is None:
            self._upload(job)
            return
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put(job)

    def finish(self) -> tuple[Path, ...]:
        """Wait until everything is sent, try once more what failed, and return what could not be sent. Ends the thread.

        Every path that is returned is that of a local file, which is there even if the run has deleted it as expired.
        """
        if self._thread is not None and self._thread.is_alive():
            if self._jobs.unfinished_tasks:
                say(f"waiting until what was saved is sent to {self.address}")
            self._jobs.put(None)
            self._thread.join()
        again, self._failed = self._failed, []
        for job in again:
            if job.waiting.exists():
                self._upload(job)
        for job in self._failed:
            job.give_back()
        lost = tuple(dict.fromkeys(job.original for job in self._failed))
        if self._sent:
            say(f"{self._sent} uploads to {self.address} on the hub")
        if lost:
            listed = ", ".join(str(path) for path in lost)
            warn(f"not sent to {self.address}: {listed}; `hf upload {self._place.repo} FILE` sends a file later")
        return lost

    def _work(self) -> None:
        """The thread: send what waits until None comes."""
        while (job := self._jobs.get()) is not None:
            self._upload(job)
            self._jobs.task_done()
        self._jobs.task_done()

    def _upload(self, job: _Job) -> None:
        """Send one file or folder; whatever goes wrong, the local one is not touched, and it is tried again later."""
        place, name = self._place, self._place.name(job.original, self._root)
        more = {"repo_id": place.repo, "repo_type": place.kind, "commit_message": f"{job.original.name} by lorasmith"}
        try:
            _no_bars()
            if job.waiting.is_dir():
                self._api().upload_folder(folder_path=job.waiting, path_in_repo=name, **more)
            else:
                self._api().upload_file(path_or_fileobj=job.waiting, path_in_repo=name, **more)
        except Exception as fault:
            self._failed.append(job)
            warn(f"{job.original} was not sent to {self.address} ({_reason(fault)}); the training goes on")
            return
        self._sent += 1
        say(f"sent {job.original} to {self.address}")
        job.forget()

    def _api(self) -> Any:
        """The hub's client; its methods have other arguments in each version."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._place.endpoint, token=self._place.token)


def fetch_state(spec: str, token: str | None, endpoint: str | None = None) -> Path:
    """The state folder `user/repo/path[:revision[:type]]` of the hub, in the hub's cache on this machine.

    Raises:
        UserError: not such an address, not reachable, or no state there.
    """
    from huggingface_hub import HfApi

    where = "--resume"
    try:
        wanted = HubState.parse(spec)
    except ValueError as fault:
        raise UserError.single(where, str(fault)) from fault
    api: Any = HfApi(endpoint=endpoint, token=token)
    say(f"fetching the state {spec} from the hub")
    try:
        files = {"repo_id": wanted.repo, "repo_type": wanted.kind, "revision": wanted.revision}
        root = Path(api.snapshot_download(**files, allow_patterns=f"{glob.escape(wanted.path)}/*"))
    except Exception as fault:
        raise _refusal(where, f"can't fetch the state {spec}", fault, "read") from fault
    folder = root / wanted.path
    if not folder.is_dir():
        wrong = f"{wanted.repo} has no folder {wanted.path}"
        raise UserError.single(where, wrong, "give the folder that --save_state_to_huggingface made there")
    return folder


def _refusal(where: str, what: str, fault: Exception, right: str) -> UserError:
    """One message for whatever the hub's client raises, whose kinds differ by version and transport."""
    from huggingface_hub import errors

    status = getattr(getattr(fault, "response", None), "status_code", None)
    if isinstance(fault, errors.RevisionNotFoundError):
        return UserError.single(where, f"{what}: there is no such revision", "check what stands behind the colon")
    advice = f"log in with `hf auth login` or give --huggingface_token, with a token that may {right} there"
    if isinstance(fault, errors.LocalTokenNotFoundError):
        return UserError.single(where, f"{what}: without a token nobody knows whose it is", advice)
    if isinstance(fault, errors.GatedRepoError | errors.RepositoryNotFoundError) or status in (401, 403):
        return UserError.single(where, f"{what}: it is not there, or not open to you", advice)
    if isinstance(fault, errors.HfHubHTTPError):
        return UserError.single(where, f"{what}: the hub answers {status}", "try again later")
    return UserError.single(where, f"{what} ({_reason(fault)})", "check the network, and the name")


def _reason(fault: Exception) -> str:
    """The first words of an error."""
    return " ".join(str(fault).split())[:160] or type(fault).__name__


def _link(path: Path, other: Path) -> None:
    """Give a file, or each file of a folder, a second name; a copy where the file system has no second names.

    Raises:
        OSError: neither is possible.
    """
    other.parent.mkdir(parents=True)
    try:
        if path.is_dir():
            shutil.copytree(path, other, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, other)
    except OSError:
        shutil.rmtree(other.parent, ignore_errors=True)
        raise


def _link_or_copy(path: str | Path, other: str | Path) -> str | Path:
    make: Callable[[Any, Any], Any]
    for make in (os.link, shutil.copy2):
        try:
            make(path, other)
        except OSError:
            if make is shutil.copy2:
                raise
        else:
            break
    return other


def _tidy(spool: Path) -> None:
    """Take away what runs of this machine left there that have ended."""
    for folder in spool.glob(f"{socket.gethostname()}-*"):
        process = folder.name.split("-")[-2]
        if os.name == "posix" and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _no_bars() -> None:
    """The client's bars would tear the training's."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    utils.disable_progress_bars()
