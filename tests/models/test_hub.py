"""Models by hub id, with a small server on this machine in the hub's place: only what is needed is downloaded, once."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.models.inspect import inspect
from tests.programs import ROOT, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = (
    "import json, sys\n"
    "from library.errors import UserError\n"
    "from library.models.inspect import inspect\n"
    "try: info = inspect(sys.argv[1], **json.loads(sys.argv[2]))\n"
    "except UserError as error: print(error); sys.exit(2)\n"
    "print(info.line); print(info.name); print(info.path); print(info.vae_name)\n"
    "for path in info.files(): print(path.parent.name, path.name)\n"
    "assert 'torch' not in sys.modules\n"
)


class Hub:
    """A hub that serves folders by name, and remembers what it was asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self, status: int, body: bytes, headers: dict[str, str], *, send: bool) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if send:
                    self.wfile.write(body)

            def _serve(self, *, send: bool) -> None:
                path = self.path.partition("?")[0].strip("/")
                hub.asked.append(f"{self.command} {path}")
                for name, folder in folders.items():
                    if path.startswith(f"api/models/{name}"):
                        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
                        told = {"id": name, "modelId": name, "sha": COMMIT, "tags": [], "private": False,
                                "siblings": [{"rfilename": file} for file in files]}  # fmt: skip
                        kind = {"Content-Type": "application/json"}
                        return self._answer(200, json.dumps(told).encode(), kind, send=send)
                    file = folder / path.removeprefix(f"{name}/resolve/main/")
                    if path.startswith(f"{name}/resolve/") and file.is_file():
                        body = file.read_bytes()
                        tag = hashlib.sha256(body).hexdigest()
                        return self._answer(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, send=send)
                if "gated" in path:
                    return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"}, send=send)
                if "broken" in path:
                    return self._answer(500, b"oh", {}, send=send)
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send=send)

            def do_GET(self) -> None:  # the base class calls it so
                self._serve(send=True)

            def do_HEAD(self) -> None:
                self._serve(send=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self) -> list[str]:
        """The files that were downloaded."""
        return sorted(
            path.split("/resolve/main/")[1] for path in self.asked if path.startswith("GET") and "/resolve/" in path
        )


@pytest.fixture(scope="module")
def folders(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in several formats, as on the hub, and a VAE alone."""
    model = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(tiny_sdxl, model)
    for path in list(model.rglob("*.safetensors")):
        shutil.copy(path, path.with_name(f"{path.stem}.fp16.safetensors"))
        path.with_suffix(".bin").write_bytes(b"a pickle that nobody wants")
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    unet.rename(unet.with_name(shard))
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": shard}})
    )
    (model / "everything.ckpt").write_bytes(b"also here")
    return {"someone/model": model, "someone/vae": tiny_sdxl / "vae"}


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    made = Hub(folders)
    yield made
    made.server.shutdown()
    made.server.server_close()


def look(
    name: str, home: Path, address: str, offline: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`inspect` in a process of its own, since the hub's client reads its environment once."""
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    return subprocess.run(
        [sys.executable, "-c", CODE, name, json.dumps(options)],
        env=environment(**variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_only_what_is_needed_is_downloaded_and_only_once(hub: Hub, tmp_path: Path) -> None:
    first = look("someone/model", tmp_path, hub.address)
    assert first.returncode == 0, first.stdout + first.stderr
    line, name, path, vae, *files = first.stdout.splitlines()
    assert "SDXL, from the hub, predicts noise" in line and name == "someone/model" and vae == "None"
    assert path.startswith(str(tmp_path)) and path.endswith(COMMIT)
    assert files == [
        "unet diffusion_pytorch_model-00001-of-00001.safetensors",
        "vae diffusion_pytorch_model.safetensors",
        "text_encoder model.safetensors",
        "text_encoder_2 model.safetensors",
    ]
    assert hub.files() == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00001.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert "someone/model: downloading from the hub" in first.stderr
    hub.asked.clear()
    assert look("someone/model", tmp_path, hub.address).stdout == first.stdout
    assert hub.asked == []
    assert look("someone/model", tmp_path, "http://127.0.0.1:9", offline=True).stdout == first.stdout
    shutil.rmtree(next(tmp_path.rglob("text_encoder_2")))
    assert look("someone/model", tmp_path, hub.address).stdout == first.stdout
    blob = next(tmp_path.rglob("diffusion_pytorch_model-00001-of-00001.safetensors"))
    blob.resolve().unlink()
    blob.unlink()
    assert look("someone/model", tmp_path, hub.address).stdout == first.stdout
    assert hub.files()[-1] == "unet/diffusion_pytorch_model-00001-of-00001.safetensors"
    variant = look("someone/model", tmp_path, hub.address, variant="fp16").stdout.splitlines()
    assert variant[4:] == [
        "unet diffusion_pytorch_model.fp16.safetensors",
        "vae diffusion_pytorch_model.fp16.safetensors",
        "text_encoder model.fp16.safetensors",
        "text_encoder_2 model.fp16.safetensors",
    ]


def test_parts_by_hub_id(hub: Hub, tiny_sdxl_file: Path, tmp_path: Path) -> None:
    done = look(str(tiny_sdxl_file), tmp_path, hub.address, vae="someone/vae")
    assert done.stdout.splitlines()[3] == "someone/vae", done.stdout
    assert hub.files() == ["config.json", "diffusion_pytorch_model.safetensors"]
    hub.asked.clear()
    done = look(str(tiny_sdxl_file), tmp_path, hub.address, vae="someone/model", text_encoder="someone/model")
    assert "VAE from --vae someone/model, text encoders from --text_encoder someone/model" in done.stdout
    assert {name.split("/")[0] for name in hub.files()} == {
        *("model_index.json", "scheduler", "text_encoder", "text_encoder_2", "unet", "vae")
    }
    assert not any(name.startswith("unet/") and name != "unet/config.json" for name in hub.files())


@pytest.mark.parametrize(
    ("name", "offline", "options", "said"),
    [
        ("someone/nothing", False, {}, "neither a file nor a folder here, nor a model on the hub"),
        ("someone/a--b", False, {}, "nor a model on the hub"),
        ("someone/gated", False, {}, "only to people who accepted its terms; accept them at"),
        ("someone/broken", False, {}, "answers 500"),
        ("someone/model", True, {}, "HF_HUB_OFFLINE forbids to download it; unset HF_HUB_OFFLINE"),
        ("someone/vae", False, {}, "holds no diffusers model with the weights that are asked for"),
        ("someone/model", False, {"variant": "int4"}, "with the weights that are asked for; there is everything.ckpt"),
    ],
)
def test_what_the_hub_does_not_give(
    name: str, offline: bool, options: dict[str, str], said: str, hub: Hub, tmp_path: Path
) -> None:
    done = look(name, tmp_path, hub.address, offline=offline, **options)
    assert done.returncode == 2, done.stderr
    (line,) = done.stdout.splitlines()
    assert said in line and name in line
    assert "Traceback" not in done.stderr


def test_no_network(tmp_path: Path) -> None:
    done = look("someone/model", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 2 and "is not here and can't be downloaded" in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 and "check the network" in done.stdout


def test_the_network_is_left_alone_for_everything_else(hub: Hub, tiny_sdxl: Path, tmp_path: Path) -> None:
    for given in (str(tiny_sdxl), str(tmp_path / "none"), "somewhere/model.ckpt", "library/modles", "a/b/c"):
        look(given, tmp_path, hub.address)
    assert hub.asked == []


def test_a_test_run_stays_offline() -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        inspect("runwayml/stable-diffusion-v1-5")
