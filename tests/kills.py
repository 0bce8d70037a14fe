"""Twenty random SIGKILLs over cache filling and training; the end is that of an undisturbed run.

    python -m tests.kills [KILLS]     # not part of the tests: a few minutes

The teacher is an image API on this machine (pillow is needed), its pictures go through the cache.
Each round starts the same command, or --resume where a run has begun, and kills it after a random
time. At the end no more pictures may have been asked for than there are texts and kills, and the
students must be equal.
"""
import base64
import http.server
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OF_THE_CLOCK = ("tokens_per_second", "seconds")  # what two equal runs log otherwise

asked = Counter()  # text: how often its picture was asked for


class Api(http.server.BaseHTTPRequestHandler):
    """Draws a picture whose colour is a function of the text."""

    def do_POST(self):
        request = self.rfile.read(int(self.headers["Content-Length"]))
        text = json.loads(request)["prompt"]
        asked[text] += 1
        time.sleep(0.03)
        colour = tuple(text.encode()[:3].ljust(3))
        file = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(file, "png")
        picture = base64.b64encode(file.getvalue()).decode()
        body = json.dumps({"data": [{"b64_json": picture}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass  # the client was killed

    def log_message(self, *args):
        pass


def start(folder, name, cache, port):
    """Start the run FOLDER/NAME, or go on with it where it has begun; return its process."""
    out = folder / name
    flags = ["--teacher", f"api:http://127.0.0.1:{port}/v1", "--cache-dir", str(folder / cache),
             "--arms", "undistilled,armada", "--seeds", "0,1", "--epochs", "6",
             "--eval-every", "2", "--device", "cpu", "--out", str(out)]
    if (out / "config.json").exists():
        flags = ["--resume", str(out)]
    nowhere = subprocess.DEVNULL
    command = [sys.executable, "train.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere)


def kill_often(kills, folder, port):
    """Kill the run FOLDER/killed so many times, each after a random time, then let it end."""
    rng = random.Random(0)
    killed = 0
    while killed < kills:
        wait = rng.uniform(3, 11)
        process = start(folder, "killed", "cache", port)
        try:
            status = process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            finished = len(list(folder.glob("killed/*/*/metrics.json")))
            print(f"kill {killed} after {wait:.1f} s: {len(asked)} pictures, "
                  f"{finished} of 4 cells finished", flush=True)
            continue
        assert status == 0
        shutil.rmtree(folder / "killed")  # done early: train once more
    assert start(folder, "killed", "cache", port).wait() == 0


def log_lines(path):
    """The lines of a log.jsonl, but for what depends on the clock."""
    lines = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        lines.append({name: line[name] for name in line if name not in OF_THE_CLOCK})
    return lines


def compare(folder):
    """Assert that FOLDER/whole and FOLDER/killed hold the same students and the same logs."""
    weights = [*folder.glob("whole/*/*/last/*.safetensors")]
    logs = [*folder.glob("whole/*/*/log.jsonl")]
    assert weights and len(logs) == 4
    for path in weights + logs:
        other = folder / "killed" / path.relative_to(folder / "whole")
        if path in logs:
            assert log_lines(path) == log_lines(other), path
        else:
            assert path.read_bytes() == other.read_bytes(), path


def main(kills=20):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    folder = Path(tempfile.mkdtemp())
    kill_often(kills, folder, port)
    worst = max(asked.values())
    total = sum(asked.values())
    assert total <= len(asked) + kills, (total, len(asked))
    asked.clear()
    assert start(folder, "whole", "cache2", port).wait() == 0
    assert set(asked.values()) == {1}
    compare(folder)
    print(f"{kills} kills: {len(asked)} pictures asked for {total} times (one at most {worst} "
          "times); students and logs bit-identical")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
