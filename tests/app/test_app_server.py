"""Who may reach the app, and how much they may send."""

import os
import socket
import subprocess
import sys

import gradio as gr
import pytest
from accelerate.utils.other import get_free_port
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.server import BodyLimit, check_exposure, is_loopback, private_files, read_auth, serve
from tests.conftest import REPOSITORY, run_script


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_password(host):
    assert is_loopback(host) and check_exposure(host, False, None) is None


OTHERS = [(host, False) for host in ("0.0.0.0", "::", "example.org", "")]


@pytest.mark.parametrize(("host", "share"), [*OTHERS, ("127.0.0.1", True)])
def test_others_need_one(host, share):
    with pytest.raises(ValueError, match="needs a password; set ELITE_APP_AUTH=USER:PASSWORD"):
        check_exposure(host, share, None)
    assert "can draw with this machine" in str(check_exposure(host, share, ("me", "secret")))


def test_passwords_come_from_the_flag_or_the_environment(monkeypatch):
    monkeypatch.delenv("ELITE_APP_AUTH", raising=False)
    assert read_auth(None) is None
    monkeypatch.setenv("ELITE_APP_AUTH", "me:se:cret")
    assert read_auth(None) == ("me", "se:cret")
    assert read_auth("you:other") == ("you", "other")
    for bad in ("", "me", "me:", ":secret"):
        monkeypatch.setenv("ELITE_APP_AUTH", bad)
        with pytest.raises(ValueError, match="expected USER:PASSWORD"):
            read_auth(None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--share",), "--share: others could reach the app, so it needs a password"),
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others could reach the app"),
        (("--auth", "me"), "--auth: got 'me', expected USER:PASSWORD"),
        (("--port", "0"), "--port: got 0, expected at least 1"),
        (("--port", "70000"), "--port: got 70000, expected at most 65535"),
        (("--test_data_dir", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_the_script_says_what_is_wrong(monkeypatch, capsys, flags, said):
    monkeypatch.delenv("ELITE_APP_AUTH", raising=False)
    assert run_script("app_gradio.py", "--device", "cpu", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken, gr.Blocks() as page:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^--port {port}: cannot listen there .* another"):
            serve(page, port=port, prevent_thread_lock=True, quiet=True)


def test_files_lie_in_a_folder_of_their_own(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    with private_files() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "file").touch()
    assert not folder.exists() and os.environ["GRADIO_TEMP_DIR"] == "before"
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with private_files():
        pass
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_what_people_upload_is_removed_when_the_app_is_terminated(tmp_path):
    flags = ["--device", "cpu", "--port", str(get_free_port())]
    app = subprocess.Popen(
        [sys.executable, "app_gradio.py", *flags],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert app.stdout is not None
    assert any("http://127.0.0.1" in line for line in app.stdout), "never served"
    assert list(tmp_path.glob("elite_app_*"))
    app.terminate()
    app.communicate(timeout=60)
    assert not list(tmp_path.glob("elite_app_*"))


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def limited() -> TestClient:
    """Answers with a body's length, up to 1000 bytes."""
    routes = [Route("/", length, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(BodyLimit, limit=1000)])
    return TestClient(app, raise_server_exceptions=True)


def test_bodies_up_to_the_limit_pass(limited):
    assert limited.post("/", content=b"x" * 1000).text == "1000"


def test_announced_bodies_above_it_are_refused(limited):
    assert limited.post("/", content=b"x" * 1001).status_code == 413
    assert limited.post("/", headers={"content-length": "-5"}).status_code == 413


def test_bodies_of_unknown_length_are_counted(limited):
    assert limited.post("/", content=(b"x" * 100 for _ in range(10))).text == "1000"
    assert limited.post("/", content=(b"x" * 100 for _ in range(11))).status_code == 413
