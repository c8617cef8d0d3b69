"""What a stranger sends to the app: paths, files, floods."""

from tests.app.conftest import file_data


def test_probe(client, pairs):
    up = client.upload(pairs / "pair0.png")
    look = client.dependency("picture", "change")
    print(client.call(look, picture=up).keys())
    draw = client.dependency("draw", "click", then=True)
    print(client.call(draw, picture=up))
    for evil in (
        "/etc/passwd",
        "../../../../etc/passwd",
        "http://127.0.0.1:1/x.png",
        "http://10.255.255.1/x",
        str(pairs / "pair0.png"),
    ):
        for payload in (
            file_data(evil),
            {"path": evil},
            {"path": up["path"] + "/../../../../../etc/passwd"},
            {"path": evil, "url": "data:image/png;base64,AAAA"},
        ):
            try:
                got = client.call(look, picture=payload)
                print(evil, payload, {k: str(v)[:200] for k, v in got.items()})
            except Exception as e:
                print(evil, payload, "EXC", type(e), str(e)[:200])
    for url in (
        "/file=/etc/passwd",
        "/file=../../etc/passwd",
        "/file=README.md",
        "/file=app_gradio.py",
        "/file=http://127.0.0.1:1/",
        "/file=%2Fetc%2Fpasswd",
        "/file=..%2f..%2f..%2fetc%2fpasswd",
        "/file=" + str(pairs / "pair0.png"),
        "/file=" + up["path"] + "/../../../../../../etc/passwd",
    ):
        r = client.http.get(url)
        print(url, r.status_code, r.text[:80])
    for url in (
        "/monitoring/summary",
        "/runs",
        "/info",
        "/config",
        "/../config",
        "/vibe-code/",
        "/proxy=http://127.0.0.1:1/",
        "/startup-events",
        "/app_id",
        "/token",
    ):
        r = client.http.get(url)
        print(url, r.status_code, r.text[:80])
