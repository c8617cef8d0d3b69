"""Serves the page: who may reach it, and how much they may send."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

AUTH_VARIABLE = "ELITE_APP_AUTH"
FILES_VARIABLE = "GRADIO_TEMP_DIR"
MAX_SESSIONS = 200  # whose state is kept; older ones start anew
STYLE = Path(__file__).with_name("assets") / "style.css"
FONT, MONOSPACE = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # none to download


class BodyLimit:
    """Refuses requests of more bytes than `limit`, announced or not, before they fill the memory;
    Gradio itself limits uploaded files only."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = PlainTextResponse(f"more than {self.limit} bytes", status_code=413)
        if not announced.isdigit() or int(announced) > self.limit:
            return await refusal(scope, receive, send)
        received, answered = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise _TooLong
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLong:
            if not answered:
                await refusal(scope, receive, send)


class _TooLong(Exception):
    pass


@contextmanager
def private_files() -> Iterator[Path]:
    """Within it, what people upload and get lies in a folder of this process alone, deleted at the
    end; Gradio's own is one for all its apps, which any user of the machine can read.

    A page is to be built within it.
    """
    before = os.environ.get(FILES_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="elite_app_", ignore_cleanup_errors=True) as folder:
        os.environ[FILES_VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(FILES_VARIABLE)
            if before is not None:
                os.environ[FILES_VARIABLE] = before


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_auth(auth: str | None) -> tuple[str, str] | None:
    """User and password from USER:PASSWORD; None takes the environment's ELITE_APP_AUTH.

    Raises:
        ValueError: one of the two is missing.
    """
    given = auth if auth is not None else os.environ.get(AUTH_VARIABLE)
    if given is None:
        return None
    user, _, password = given.partition(":")
    if not user or not password:
        raise ValueError(f"{AUTH_VARIABLE}: expected USER:PASSWORD; set both")
    return user, password


def check_exposure(host: str, share: bool, auth: tuple[str, str] | None) -> str | None:
    """A warning where others than this machine reach the app; None where they do not.

    Raises:
        ValueError: they do, and there is no password.
    """
    if is_loopback(host) and not share:
        return None
    flag = "--share" if share else f"--host {host}"
    if auth is None:
        raise ValueError(
            f"{flag}: others could reach the app, so it needs a password; set "
            f"{AUTH_VARIABLE}=USER:PASSWORD (or --auth), or leave {flag.split()[0]} out"
        )
    where = "anyone on the internet" if share else "anyone in your network"
    return f"warning: {flag}: {where} with the password can draw with this machine"


def theme() -> gr.themes.Base:
    """Gradio's, with more contrast."""
    colours = {
        name + mode: f"*neutral_{shade}"
        for name in ("block_info_text_color", "body_text_color_subdued", "block_label_text_color")
        for mode, shade in (("", 600), ("_dark", 300))
    }
    base = gr.themes.Default(primary_hue="indigo", font=FONT, font_mono=MONOSPACE)
    return base.set(**colours)


def serve(
    page: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    max_upload: int = 20 * 2**20,
    queue_size: int = 32,
    **launch: Any,
) -> str:
    """Starts serving and returns the address; with `prevent_thread_lock=True` at once.

    Args:
        port: None takes the first free one.
        max_upload: bytes of a file, and of any request.
        queue_size: requests that may wait; more are refused with a message.

    Raises:
        ValueError: others could reach the app without a password, or nothing can listen there.
    """
    warning = check_exposure(host, share, auth)
    if warning:
        print(warning, flush=True)
    page.queue(max_size=queue_size, api_open=False)
    slack = 2**20  # of a form around a file
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            max_file_size=max_upload,
            app_kwargs={"middleware": [Middleware(BodyLimit, limit=max_upload + slack)]},
            state_session_capacity=MAX_SESSIONS,
            theme=theme(),
            css_paths=[STYLE],
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            **launch,
        )
    except OSError:
        raise ValueError(
            f"--port {port}: cannot listen there at {host}, since another program does, or the "
            "address is not this machine's; choose another one"
        ) from None
    return address
