"""A thousand malformed requests and uploads, and twenty visitors at once: one line each, nothing from outside, no mix-ups."""

import asyncio
import io
import json
import os
import random
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from served import LIMITS

from latentdiff.web.gate import Gate
from latentdiff.web.jobs.draw import Settings, draw
from latentdiff.web.jobs.job import Job

ROOT = Path(__file__).parents[2]
SECRET = "a word that stands outside"
API = "gradio_api"
VISITORS = 20
# What no answer may hold, unless the request held it: paths of the server, and the traces of its errors
LEAKS = (SECRET, str(ROOT), str(Path.home()) + "/", "site-packages", "Traceback", "/usr/lib", 'File "')
VALUES = [
    None,
    True,
    -1,
    0,
    0.5,
    10**9,
    2**70,
    1e308,
    "",
    "x" * 5000,
    "../../etc/passwd",
    "\ud83d\ude00\u202e\x1b[31m",
    "<script>alert(1)</script>",
    "fashion-mnist\0",
    [],
    [None],
    [[[[[[[]]]]]]],
    {},
    {"a": 1},
    {"path": "/etc/passwd"},
    {"path": "http://127.0.0.1:1/x.png", "url": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "../../../../etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update", "choices": ["x"], "value": "x"},
    "/etc/passwd",
    "__proto__",
]


def memory(site) -> int:
    """The bytes of memory that the server and its process that computes have."""
    processes = [os.getpid(), site.context.work.worker.process_id]
    return sum(psutil.Process(process).memory_info().rss for process in processes)


def check(text: str, sent: str, status: int = 200) -> None:
    """One answer: a line, without a path of the server that the request did not hold."""
    for leak in LEAKS:
        assert leak not in text or leak in sent, (sent[:300], text[:600])
    assert not re.search(r"root:.*:0:0:", text), sent
    if status >= 400:
        assert "\n" not in text.strip(), (sent[:300], text[:600])


@pytest.fixture(scope="module")
def client(site) -> httpx.Client:
    """A program that asks whatever it wants; paths are sent as they stand."""
    with httpx.Client(base_url=site.url, timeout=60) as asks:
        yield asks


def events(client: httpx.Client) -> dict[str, dict]:
    """The events of the page, by name."""
    return {each["api_name"]: each for each in client.get("config").json()["dependencies"]}


def call(client: httpx.Client, event: dict, values: list[list], session: str) -> list[str]:
    """Put events with these values into the queue, and wait for all: the errors, or "" for one that succeeded."""
    joined, errors = [], []
    for data in values:
        body = {"data": data, "fn_index": event["id"], "session_hash": session}
        answer = client.post(f"{API}/queue/join", content=json.dumps(body), headers={"content-type": "application/json"})
        check(answer.text, json.dumps(data, ensure_ascii=False), answer.status_code)
        if answer.status_code == 200:
            joined.append(answer.json()["event_id"])
        else:
            errors.append(str(answer.json()["detail"]))
    if not joined:
        return errors
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data:"):
                continue
            message = json.loads(line[5:])
            if message["msg"] == "process_completed":
                joined.remove(message["event_id"])
                errors.append("" if message["success"] else str(message["output"].get("error")))
            if message["msg"] == "close_stream" or not joined:
                break
    assert not joined
    return errors


def outside_addresses(site) -> list[str]:
    """Addresses that ask for what lies elsewhere, or for what the page does not need."""
    files = [
        "/etc/passwd",
        str(ROOT / "README.md"),
        str(ROOT / "weights/fashion-mnist/latentdiff.json"),
        __file__,
        "/proc/self/environ",
    ]
    files += [
        "../" * 8 + "etc/passwd",
        "..%2f" * 8 + "etc/passwd",
        "%2e%2e/" * 8 + "etc/passwd",
        "/etc/passwd%00.png",
        "~/.bashrc",
    ]
    files += [f"{os.environ['GRADIO_TEMP_DIR']}/../../{name}" for name in ("etc/passwd", "secret", "x")]
    files += [
        "http://127.0.0.1:1/",
        "https://example.org/x.png",
        "file:///etc/passwd",
        "HTTP://127.0.0.1:1",
        "ftp://x/y",
        "//etc/passwd",
    ]
    files += ["\\\\server\\share", "C:\\Windows\\win.ini", "C:/Windows/win.ini", "", ".", "/", "x" * 5000, "%00", "%ff%fe"]
    asked = (
        [f"{API}/file={file}" for file in files] + [f"file={file}" for file in files] + [f"{API}/file/{file}" for file in files]
    )
    for base in ("assets", "static", "svelte", f"{API}/custom_component/1/client/component", f"{API}/stream/a/1/2"):
        asked += [f"{base}/{'../' * k}{name}" for k in (1, 3, 8) for name in ("etc/passwd", "routes.py", "config.json")]
        asked += [f"{base}/{'..%2f' * k}etc/passwd" for k in (1, 8)] + [f"{base}//etc/passwd"]
    names = [
        "proxy=http://127.0.0.1:1/",
        "proxy=https://x.hf.space/",
        "vibe-code",
        "vibe-edit",
        "dev/reload",
        "profiling/summary",
    ]
    names += [
        "runs",
        "process_recording",
        "deep_link",
        "run-history/records",
        "monitoring",
        "stream/a/b/1/playlist.m3u8",
        "mcp/",
    ]
    asked += [f"{API}/{name}" for name in names] + [
        "monitoring/summary",
        "docs",
        "redoc",
        "openapi.json",
        "pwa_icon",
        "login",
        ".git/config",
    ]
    return asked


def uploads(random_of: random.Random) -> list[tuple[dict, bytes]]:
    """(headers, body) of uploads, most of them wrong."""
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    bomb = header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT"
    contents = [
        b"",
        b"\0" * 1000,
        picture.getvalue(),
        picture.getvalue()[:40],
        bomb,
        b"GIF89a",
        b"x" * 300_000,
        b"\xff\xd8\xff" * 50,
    ]
    names = [
        "a.png",
        "../../../x.png",
        "/etc/cron.d/x",
        "..",
        "",
        "a/b\\c",
        "x" * 300,
        "a\\0.png",
        "\x7f",
        "é😀.svg",
        "CON",
        ".htaccess",
        "a;b'c.html",
    ]
    made = []
    for content in contents:
        for name in names:
            boundary = f"b{random_of.random()}"
            body = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
            made.append(
                (
                    {"content-type": f"multipart/form-data; boundary={boundary}"},
                    body + content + f"\r\n--{boundary}--\r\n".encode(),
                )
            )
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/plain",
        "",
        "multipart/form-data; boundary=" + "x" * 3000,
    ):
        made += [({"content-type": kind}, body) for body in (b"", b"--x", b"\r\n" * 500, bytes(range(256)) * 8)]
    return made


def bodies(random_of: random.Random, count: int) -> list[tuple[str, bytes]]:
    """(path, body) of requests that are no events."""
    paths = [
        "queue/join",
        "run/predict",
        "run/generate",
        "call/generate",
        "call/v2/generate",
        "call/edit",
        "call/nothing",
        "cancel",
    ]
    paths += ["component_server", "reset", "api/generate", "run/__class__", "call/../config", "call/v2/false"]
    raw = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 30000,
        b'{"a":' * 5000,
        b"\xff\xfe",
        b'{"data": NaN}',
        b"x" * 100_000,
        b'{"data": [' + b"1," * 9000 + b"1]}",
    ]
    made: list[tuple[str, bytes]] = []
    for _ in range(count):
        body = {
            name: random_of.choice([*VALUES, 3, 8, "generate"])
            for name in (
                "data",
                "fn_index",
                "session_hash",
                "event_id",
                "trigger_id",
                "component_id",
                "fn_name",
                "simple_format",
                "batched",
            )
            if random_of.random() < 0.6
        }
        made.append((random_of.choice(paths), random_of.choice(raw) if random_of.random() < 0.3 else json.dumps(body).encode()))
    return made


def test_a_thousand_malformed_requests(site, client, runs_folder, tmp_path):
    scratch, random_of = Path(os.environ["GRADIO_TEMP_DIR"]), random.Random(0)
    (scratch.parent / "secret").write_text(SECRET)
    (runs_folder / "leads-out").symlink_to(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"stage": SECRET}))
    before, count = memory(site), 0
    beside = set(scratch.parent.iterdir())

    for address in outside_addresses(site):
        for method in ("GET", "HEAD", "DELETE"):
            # httpx would take "../" out of the path
            answer = client.request(method, client.base_url.copy_with(raw_path=b"/" + address.encode("utf-8", "replace")))
            check(answer.text, address, answer.status_code)
            assert answer.status_code >= 400, (method, address, answer.text[:200])
            count += 1

    for headers, body in uploads(random_of):
        answer = client.post(f"{API}/upload", content=body, headers=headers)
        check(answer.text.replace(str(scratch), ""), "", answer.status_code)
        for path in answer.json() if answer.status_code == 200 else ():
            assert Path(path).resolve().is_relative_to(scratch) and Path(path).stat().st_size <= site.context.limits.upload
        count += 1

    for path, body in bodies(random_of, 250):
        answer = client.post(f"{API}/{path}", content=body, headers={"content-type": "application/json"})
        check(answer.text, body.decode("utf-8", "replace"), answer.status_code)
        count += 1

    known = events(client)
    for name in (
        "generate",
        "edit",
        "interpolate",
        "guidance",
        "trajectory",
        "compare_records",
        "model_card",
        "choose",
        "false",
    ):
        event = known.get(name)
        if event is None:
            continue
        for session in range(3):
            values = [[random_of.choice(VALUES) for _ in event["inputs"]] for _ in range(8)]
            errors = call(client, event, values, f"hostile-{name}-{session}")
            count += len(values)
            for error in errors:
                check(error, json.dumps(values, ensure_ascii=False), 400)

    assert count >= 1000
    assert client.get("").status_code == 200 and site.context.work.running == 0
    assert memory(site) - before < 400_000_000
    assert set(scratch.parent.iterdir()) == beside  # nothing was written beside the folder of uploads
    (runs_folder / "leads-out").unlink()


def test_the_gate_refuses_uploads_while_too_much_is_kept(tmp_path):
    asked, answers = [], []

    async def app(scope, receive, send) -> None:
        asked.append(scope["path"])

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message) -> None:
        answers.append(message)

    def ask(gate: Gate, method: str, path: str) -> None:
        request = gate({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
        with ThreadPoolExecutor(1) as pool:  # the browser of other tests has a loop in this thread
            pool.submit(asyncio.run, request).result()

    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "kept").write_bytes(bytes(1001))
    ask(Gate(app, tmp_path, 1001), "POST", f"/{API}/upload")
    assert asked == [f"/{API}/upload"] and answers == []
    ask(Gate(app, tmp_path, 1000), "POST", f"/{API}/upload")
    assert len(asked) == 1 and answers[0]["status"] == 507
    ask(Gate(app, tmp_path, 1000), "GET", "/")
    assert asked[1:] == ["/"]


def test_nothing_is_fetched_for_a_visitor(site, client):
    picture = {"path": "https://example.org/x.png", "meta": {"_type": "gradio.FileData"}}
    event = events(client)["edit"]
    values = [[picture if k == at else None for k in range(len(event["inputs"]))] for at in range(len(event["inputs"]))]
    errors = call(client, event, values, "fetches")
    assert any("this server fetches nothing" in error for error in errors) and "" not in errors


def test_twenty_visitors_at_once(site, models, client, tmp_path):
    """Each asks for a picture of its own seed; everybody gets their own, and the page answers meanwhile."""
    event = events(client)["generate"]
    expected = {}
    for seed in range(VISITORS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        drawn = draw(models, Job(), LIMITS, Settings("fashion-mnist", ["Bag"], "", "", 1, seed, 2, "", 2.0, 0, 1), folder)
        expected[seed] = drawn.files[0].read_bytes()
    assert len(set(expected.values())) == VISITORS
    first = ["fashion-mnist", ["Bag"], "", "", 1, 0, 2, "default", 2.0, 0, 1]
    first += [None] * (len(event["inputs"]) - len(first))
    assert call(client, event, [first], "first") == [""]  # the model is loaded then, in whatever order tests run
    before = memory(site)
    got: dict[int, bytes | str] = {}

    def visit(seed: int) -> None:
        with httpx.Client(base_url=site.url, timeout=120) as asks:
            data = ["fashion-mnist", ["Bag"], "", "", 1, seed, 2, "default", 2.0, 0, 1]
            data += [None] * (len(event["inputs"]) - len(data))
            body = {"data": data, "fn_index": event["id"], "session_hash": f"visitor-{seed}"}
            answer = asks.post(f"{API}/queue/join", json=body)
            assert answer.status_code == 200, answer.text
            with asks.stream("GET", f"{API}/queue/data", params={"session_hash": f"visitor-{seed}"}) as stream:
                for line in stream.iter_lines():
                    message = json.loads(line[5:]) if line.startswith("data:") else {}
                    if message.get("msg") == "process_completed":
                        got[seed] = str(message["output"].get("error"))
                        for entry in (message["output"].get("data") or [[]])[2] or []:
                            got[seed] = asks.get(entry["image"]["url"]).content
                        break

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(VISITORS)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        assert client.get("config").status_code == 200
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.2)
    assert got == expected
    assert slowest < 10 and memory(site) - before < 300_000_000
    assert site.context.work.running == 0
