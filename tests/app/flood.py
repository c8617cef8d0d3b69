"""Memory of the app while requests pour in: `python -m tests.app.flood --floods 14`.

Each flood is 200 requests at once by a new visitor. The small world is served by a process of its
own, whose resident memory is read between the floods (Linux).
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
from accelerate.utils.other import get_free_port

from tests.app.conftest import Client, in_parallel
from tests.conftest import REPOSITORY

REQUESTS = 200
PICTURE = REPOSITORY / "test_datasets" / "11_turquoise_red_striped_round.jpg"


def wait_for(url: str) -> SimpleNamespace:
    """The page, once it is served."""
    for _ in range(300):
        try:
            return SimpleNamespace(config=httpx.get(f"{url}config").json())
        except httpx.TransportError:
            time.sleep(1)
    raise TimeoutError(f"{url}: nobody answers")


def flood(client: Client) -> tuple[int, int]:
    """Requests that were answered, and those that were refused."""
    draw = client.dependency("draw", "click", then=True)
    picture = client.upload(PICTURE)
    joined = in_parallel(REQUESTS, lambda _: client.ask(draw, picture=picture, steps=1))
    waiting = {answer.json()["event_id"] for answer in joined if answer.status_code == 200}
    taken = len(waiting)
    for said in client.messages():
        if said["msg"] == "process_completed":
            waiting.discard(said["event_id"])
        if not waiting:
            break
    return taken, REQUESTS - taken


def resident(process: int) -> int:
    """MiB."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s*(\d+)", status).group(1)) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--floods", type=int, default=14)
    floods = parser.parse_args().floods
    port = get_free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "app_gradio.py", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as server:
        try:
            page = wait_for(url)
            print(f"before: {resident(server.pid)} MiB")
            for number in range(floods):
                taken, refused = flood(Client(page, url))
                after = resident(server.pid)
                print(
                    f"flood {number + 1}: {taken} drawn, {refused} refused, {after} MiB", flush=True
                )
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
