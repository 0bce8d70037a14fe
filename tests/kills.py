"""Twenty random SIGKILLs over cache filling and training; the end must be that of an undisturbed run.

    python -m tests.kills [KILLS]     # not part of the tests: a few minutes

The teacher is an image API on this machine (pillow is needed), its pictures go through the cache. Each round
starts the same command, or --resume where a run has begun, and kills it after a random time. At the end no
more pictures may have been asked for than there are texts and kills, and the students must be equal.
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

ROOT, asked = Path(__file__).resolve().parent.parent, Counter()

class Api(http.server.BaseHTTPRequestHandler):
    """Draws a picture whose colour is a function of the text."""

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        asked[text] += 1
        time.sleep(0.03)
        file = io.BytesIO()
        Image.new("RGB", (32, 32), tuple(text.encode()[:3].ljust(3))).save(file, "png")
        body = json.dumps({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass  # the client was killed

    def log_message(self, *args):
        pass

def main(kills=20):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rng, folder = random.Random(0), Path(tempfile.mkdtemp())

    def command(name, cache):
        out = folder / name
        begin = ["--teacher", f"api:http://127.0.0.1:{server.server_port}/v1", "--cache-dir",
                 str(folder / cache), "--arms", "undistilled,armada", "--seeds", "0,1", "--epochs", "6",
                 "--eval-every", "2", "--out", str(out)]
        begun = (out / "config.json").exists()
        return [sys.executable, "train.py", *(["--resume", str(out)] if begun else begin)]

    def run(*args):
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(command(*args), cwd=ROOT, stdout=nowhere, stderr=nowhere)

    killed = 0
    while killed < kills:
        process, wait = run("killed", "cache"), rng.uniform(3, 11)
        try:
            assert process.wait(wait) == 0  # done early: train once more
            shutil.rmtree(folder / "killed")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            print(f"kill {killed} after {wait:.1f} s: {len(asked)} pictures, "
                  f"{len(list(folder.glob('killed/*/*/metrics.json')))} of 4 cells finished", flush=True)
    assert run("killed", "cache").wait() == 0
    worst, total = max(asked.values()), sum(asked.values())
    assert total <= len(asked) + kills, (total, len(asked))
    asked.clear()
    assert run("whole", "cache2").wait() == 0
    assert set(asked.values()) == {1}
    for path in [*folder.glob("whole/*/*/last/*.safetensors"), *folder.glob("whole/*/*/log.jsonl")]:
        other = Path(str(path).replace("/whole/", "/killed/"))
        if path.suffix == ".jsonl":  # but for the clock
            a, b = ([{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
                     for line in file.read_text().splitlines()] for file in (path, other))
            assert a == b, path
        else:
            assert path.read_bytes() == other.read_bytes(), path
    print(f"{kills} kills: {len(asked)} pictures asked for {total} times (one at most {worst} times); "
          "students and logs bit-identical")

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
