"""Files by names on the hub: the form of names, the cache, a hub on this machine, and what goes wrong."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import huggingface_hub.constants as hub
import pytest
from hub_cache import COMMIT, offline_cache, put_into_cache
from user_errors import error_of

from common import hub as ours
from common.files import file_sha256
from common.hub import absolute_name, local_file

CONTENT = b"weights"
# What the hub answers for a file: status and its code for the error
ANSWERS = {
    "/ward/models/resolve/main/ae.ckpt": (200, ""),
    "/ward/models/resolve/main/none.ckpt": (404, "EntryNotFound"),
    "/ward/models/resolve/v2/ae.ckpt": (404, "RevisionNotFound"),
    "/ward/gated/resolve/main/ae.ckpt": (403, "GatedRepo"),
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        status, code = ANSWERS.get(self.path, (404, "RepoNotFound"))
        self.send_response(status)
        headers = {"X-Error-Code": code, "X-Error-Message": "said the hub"} if code else {}
        headers |= {"ETag": '"abc"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(CONTENT))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(CONTENT)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def small_hub(monkeypatch, tmp_path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    offline_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    yield
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once_and_then_there_without_a_network(small_hub, monkeypatch, tmp_path):
    path = local_file("hf://ward/models/ae.ckpt")
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    offline_cache(monkeypatch, tmp_path / "cache")
    assert local_file("hf://ward/models/ae.ckpt") == path
    assert local_file(f"hf://ward/models/ae.ckpt@{COMMIT}") == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ward/models/none.ckpt", "the repository has no file none.ckpt: correct the name"),
        ("ward/models/ae.ckpt@v2", "the repository has no revision v2: name another"),
        (
            "ward/gated/ae.ckpt",
            "a gated repository: accept its terms on https://huggingface.co/ward/gated, then",
        ),
        ("ward/none/ae.ckpt", "no such repository, or a private one: correct its name, or log in"),
    ],
)
def test_what_the_hub_refuses_is_one_line(small_hub, name, message):
    assert error_of(local_file, f"hf://{name}").startswith(f"hf://{name}: {message}")


def test_a_full_disk_is_one_line(monkeypatch):
    def fill(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fill)
    found = error_of(local_file, "hf://ward/models/large.ckpt")
    assert "large.ckpt: could not be fetched ([Errno 28] No space left on device): try again" in found


def test_revisions_and_folders_in_a_cache(monkeypatch, tmp_path):
    (tmp_path / "ae.ckpt").write_bytes(CONTENT)
    put_into_cache(tmp_path / "cache", "ward/models", tmp_path / "ae.ckpt", revision="v1.0")
    offline_cache(monkeypatch, tmp_path / "cache")
    assert file_sha256("hf://ward/models/ae.ckpt@v1.0") == file_sha256(tmp_path / "ae.ckpt")
    missing = "hf://ward/models/ae.ckpt"
    expected = f"{missing}: not in the cache {tmp_path / 'cache'}, and HF_HUB_OFFLINE is set: fetch it where there is"
    assert error_of(local_file, missing).startswith(expected)


@pytest.mark.parametrize("name", ["hf://ae.ckpt", "hf://ward/models", "hf://ward/models/", "hf://ward/models/ae.ckpt@"])
def test_names_of_another_form(name):
    assert error_of(local_file, name) == f"{name}: expected hf://OWNER/NAME/FILE or hf://OWNER/NAME/FILE@REVISION"


def test_paths_stay_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "_fetched", None)
    assert str(local_file("hf/ae.ckpt")) == "hf/ae.ckpt"
    assert absolute_name("ae.ckpt") == str(tmp_path / "ae.ckpt")
    assert absolute_name("hf://ward/models/ae.ckpt") == "hf://ward/models/ae.ckpt"
