"""The times of the page: python tests/benchmarks/page.py [--model DIR] [--num-images N] [--rounds N]

Reported are the seconds from the start of `latentdiff serve` to the first images, and of each request after it: what a visitor
waits for, with the previews, the PNG files and their zip. The seeds differ, so nothing is drawn before. 10 s and 2 s are aimed
at, for 16 images of weights/fashion-mnist in float32 on two cores.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gradio_client import Client

MODEL = Path(__file__).parents[2] / "weights" / "fashion-mnist"
PATIENCE = 120  # seconds until the page must answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "latentdiff", "serve", str(given.model), "--port", str(port)])
    try:
        client = opened(port, server)
        times = []
        for seed in range(given.rounds + 1):
            client.predict(model=given.model.name, num_images=given.num_images, seed=seed, api_name="/generate")
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
    finally:
        server.terminate()
        server.wait()
    first, *others = times
    print(f"first {first:.2f} s; next {min(others):.2f} to {max(others):.2f} s, median {statistics.median(others):.2f} s")


def opened(port: int, server: subprocess.Popen[bytes]) -> Client:
    """A client of the page, as soon as it answers."""
    for _ in range(10 * PATIENCE):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False)
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the page did not answer in {PATIENCE} s")


if __name__ == "__main__":
    main()
