"""Fixtures made once a session: a folder of stripes, a feature network, and a model of each stage trained on them."""

import json
import os
import re
import signal
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Before torch is imported: workers that all compute with every core take turns, and are several times as slow as one alone
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest
from stripes import stripes
from tiny_runs import SMALL_VQ, autoencoder_config, diffusion_config, discrete_config, tree, write_stripes
from tqdm import tqdm

from latentdiff.cli import main
from latentdiff.evaluation.feature_training import train_features
from latentdiff.training import train


def pytest_configure() -> None:
    """Signals that a test run was started to ignore, under nohup or in the background, still reach what it tests.

    A command respects that, so a signal sent to it would be waited for in vain. A handler that does nothing keeps the test
    run itself as it was asked to be, and is not handed on to other programs.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def bars_with_a_lock_of_their_own() -> None:
    """A test that is interrupted, or whose forked child is killed, may leave tqdm's lock taken; no later test waits for it."""
    tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session")
def stripe_folder(tmp_path_factory) -> Path:
    """48 grey 16x16 PNGs in three class sub-folders."""
    return write_stripes(tmp_path_factory.mktemp("stripes") / "data")


@pytest.fixture(scope="session")
def feature_folder(tmp_path_factory) -> Path:
    """A feature network that tells the stripes apart."""
    folder = tmp_path_factory.mktemp("features") / "net"
    train_features(stripes(240), steps=45, batch=32, widths=(8, 8, 16), name="stripes-net").save(folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder_run(tmp_path_factory, stripe_folder) -> Path:
    """Output folder of a finished stage-1 run of 60 steps."""
    output = tmp_path_factory.mktemp("stage1") / "run"
    train(autoencoder_config(stripe_folder, output, train__steps=60))
    return output


@pytest.fixture(scope="session")
def diffusion_run(tmp_path_factory, stripe_folder, autoencoder_run) -> Path:
    """Output folder of a finished stage-2 run of 60 steps; its checkpoint is in model/."""
    output = tmp_path_factory.mktemp("stage2") / "run"
    train(diffusion_config(stripe_folder, output, autoencoder_run, train__steps=60, train__picture_every=30))
    return output


@pytest.fixture(scope="session")
def vq_run(tmp_path_factory, stripe_folder) -> Path:
    """Output folder of a finished stage-1 run of 60 steps with six codes."""
    output = tmp_path_factory.mktemp("stage1-vq") / "run"
    train(autoencoder_config(stripe_folder, output, **SMALL_VQ, train__steps=60))
    return output


@pytest.fixture(scope="session")
def discrete_run(tmp_path_factory, stripe_folder, vq_run) -> Path:
    """Output folder of a finished run of 60 steps over the codes of that; its checkpoint is in model/."""
    output = tmp_path_factory.mktemp("stage2-codes") / "run"
    train(discrete_config(stripe_folder, output, vq_run, train__steps=60, data__flips=True))
    return output


@pytest.fixture(scope="session")
def curves():
    """curves(output) -> {name: [values in the order logged]} from a run's metrics.jsonl."""

    def read(output: Path) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for line in (output / "metrics.jsonl").read_text().splitlines():
            for name, value in json.loads(line).items():
                values.setdefault(name, []).append(value)
        return values

    return read


@pytest.fixture(scope="session")
def model(diffusion_run) -> Path:
    """The checkpoint of that run."""
    return diffusion_run / "model"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, so that whatever a command leaves behind is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(here, capsys):
    """run(*arguments) -> stdout of a command that succeeds."""

    def call(*arguments) -> str:
        capsys.readouterr()
        main([str(a) for a in arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(here, capsys):
    """refused(*arguments) -> the one line on stderr of a command that exits with 2 and leaves every file as it was."""

    def call(*arguments) -> str:
        capsys.readouterr()
        before = tree(here.parent)
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2 and out == ""
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("latentdiff: "), err
        assert tree(here.parent) == before
        return lines[0]

    return call


@pytest.fixture
def served(tmp_path):
    """serve(ranges=True) -> the address of tmp_path on a loopback server, and the list of the ranges it was asked for."""
    servers = []

    def serve(ranges: bool = True) -> tuple[str, list[str | None]]:
        asked: list[str | None] = []

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(tmp_path))

            def log_message(self, *_):
                pass

            def do_GET(self):
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                path = Path(self.translate_path(self.path))
                if not (ranges and wanted and path.is_file()):
                    return super().do_GET()
                asked.append(wanted[0])
                part = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{path.stat().st_size}")
                self.end_headers()
                self.wfile.write(part)

            def end_headers(self):
                self.send_header("Accept-Ranges", "bytes" if ranges else "none")
                super().end_headers()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
