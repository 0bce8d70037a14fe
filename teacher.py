"""Black-box teachers: a text goes in, a vector comes out; nothing of the teacher is trained or opened.

    teacher = build_teacher("painter")                   # or painter:RHO, clip[:MODEL], vectors:FOLDER
    teacher.name, teacher.dim                            # what it is, and d_e
    teacher.encode(["is a mouse bigger than a piano?"])  # float32 array (N, d_e)

A teacher of your own is a class with these three names and one line in TEACHERS. A vector depends on its text
alone, never on its neighbours in a list, so each is made once and kept.
"""
import hashlib
import re
import sqlite3
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import OBJECTS, Parser, UserError, known

class Teacher:
    """The interface: name (with all that changes a vector: it is the cache's key), dim, encode(texts)."""

    costly = True  # dearer than a look-up in the cache
    picture = None  # picture(text) -> uint8 (H, W, 3), of a teacher whose pictures can be looked at

    def vectors(self, split, texts, limit):
        """The first `limit` vectors of a split; only a folder of ready-made rows needs to know which."""
        return self.encode(texts[:limit])

    def too_long(self, texts):
        """How many of the texts the teacher does not read to their end."""
        return 0

class Painter(Teacher):
    """A procedural text-to-picture function: a text's objects, side by side, 4 x 16 x 16 = 1024 numbers.

    Channels: red, green, blue, coverage. Sizes on a log scale, .5 cm one pixel, 60 m the whole height. Any
    other word leaves a faint pixel of its own, so every text has a picture; beyond OBJECTS it knows NOTHING.
    painter:RHO gives RHO picture + sqrt(1 - RHO^2) noise of the same power: the dose of the teacher.
    """

    dim, costly = 1024, False
    colours = {"red": (.9, .1, .1), "green": (.1, .7, .2), "blue": (.1, .3, .9), "brown": (.5, .3, .1),
               "grey": (.5, .5, .5), "white": (1, 1, 1), "black": (.1, .1, .1), "yellow": (.95, .85, .1),
               "orange": (.95, .5, .1), "pink": (1, .6, .7)}

    def __init__(self, rho):
        try:
            self.rho = float(rho or 1)
        except ValueError:
            self.rho = -1
        if not 0 <= self.rho <= 1:
            raise UserError(f"painter:{rho}: write painter:RHO with a dose RHO from 0 (noise) to 1 (picture)")
        self.name = f"painter:{self.rho:g}"

    def encode(self, texts):
        return np.array([self.paint(text).ravel() for text in texts], np.float32).reshape(-1, self.dim)

    def picture(self, text):
        *colours, cover = self.paint(text)  # on white paper
        return (255 * np.clip(np.stack(colours, -1) + 1 - cover[..., None], 0, 1)).astype(np.uint8)

    def paint(self, text):
        """What encode flattens, (4, 16, 16)."""
        picture, words = np.zeros((4, 16, 16)), re.findall(r"\w+", text.lower())
        for word in words:
            if word not in OBJECTS:
                own = _generator("word", word)
                picture[:3, own.integers(16), own.integers(16)] += 0.1 * own.random(3)
        things = [word for word in words if word in OBJECTS]
        y, x = np.mgrid[:16, :16] + 0.5  # pixel centres
        for i, thing in enumerate(things):
            size, colour, shape = OBJECTS[thing]
            half = 8 / len(things)       # half the width of this object's share of the canvas
            dx, dy = (x - (2 * i + 1) * half) / half, (y - 8) / 8  # -1 .. 1 inside it
            distance = {"disc": np.hypot(dx, dy), "box": np.maximum(abs(dx), abs(dy)),
                        "bar": np.maximum(2 * abs(dx), abs(dy)),
                        "cone": np.maximum(2 * abs(dx) - dy, abs(dy))}[shape]
            radius = 0.1 + 0.9 * np.log(size / 0.5) / np.log(6000 / 0.5)
            # The soft edge makes sizes between two pixels visible.
            cover = np.clip((radius - distance) * half + 0.5, 0, 1) * (abs(dx) <= 1)
            picture = picture * (1 - cover) + cover * np.array([*self.colours[colour], 1.0])[:, None, None]
        noise = _generator("noise", text).standard_normal(picture.shape) * np.sqrt((picture**2).mean())
        return self.rho * picture + np.sqrt(1 - self.rho**2) * noise

def _generator(*parts):
    """A random generator that depends on the parts alone; Python's own hash() changes from run to run."""
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "little"))

class Clip(Teacher):
    """The text side of CLIP's image-text space: where a picture of the text would lie, without drawing it."""

    def __init__(self, model):
        import torch
        from transformers import CLIPTextModelWithProjection

        from student import load_pretrained  # asks the hub once and words its refusals

        self.name = "clip:" + (model or "openai/clip-vit-large-patch14")
        model, self.tokenizer = load_pretrained(self.name[5:], CLIPTextModelWithProjection)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        # 768 numbers a vector; 77 tokens at most
        self.dim, self.max_tokens = model.config.projection_dim, model.config.max_position_embeddings

    def too_long(self, texts):
        return sum(len(self.tokenizer(text, verbose=False)["input_ids"]) > self.max_tokens for text in texts)

    def encode(self, texts):
        import torch

        out = np.zeros((len(texts), self.dim), np.float32)
        with torch.inference_mode():
            for i in range(0, len(texts), 64):
                batch = self.tokenizer(list(texts[i:i + 64]), padding=True, truncation=True,
                                       max_length=self.max_tokens, return_tensors="pt").to(self.model.device)
                out[i:i + 64] = self.model(**batch).text_embeds.cpu().numpy()
        return out

class VectorFolder(Teacher):
    """Ready-made vectors: FOLDER/train.npy, dev.npy, row i for example i of the official file."""

    costly = False

    def __init__(self, folder):
        self.folder, self.name = Path(folder), "vectors:" + folder
        if not folder or not (self.folder / "train.npy").is_file():
            raise UserError(f"{self.name} has no train.npy: it holds train.npy, dev.npy, one row an example")
        self.dim = self.open("train").shape[1]

    def encode(self, texts):
        raise UserError(f"{self.name} holds vectors by row, not by text: it has none for a new text")

    def open(self, split):
        path = self.folder / f"{split}.npy"
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)  # unpickling runs a stranger's code
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable array ({error}): write it with numpy.save") from None
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}: expected floats")
        return rows

    def vectors(self, split, texts, limit):
        rows = self.open(split)
        if rows.shape != (len(texts), self.dim):
            raise UserError(f"{self.folder / split}.npy has shape {rows.shape}, expected "
                            f"{(len(texts), self.dim)}: a row for each example in the file")
        return np.asarray(rows[:limit], np.float32)

TEACHERS = {"painter": Painter, "clip": Clip, "vectors": VectorFolder}

def check_spec(spec):
    """"NAME[:ARGUMENT]" -> (class, argument). Builds nothing, so that a typo costs nothing."""
    name, _, argument = spec.partition(":")
    return TEACHERS[known(name, TEACHERS, "teacher")], argument

def build_teacher(spec):
    """A teacher from "painter[:RHO]", "clip[:MODEL]" or "vectors:FOLDER"; UserError says what is wrong."""
    teacher, argument = check_spec(spec)
    return teacher(argument)

class Cache:
    """Vectors on disk by (teacher name, text): sqlite in WAL mode survives a kill and takes two writers."""

    def __init__(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(Path(folder) / "vectors.sqlite", timeout=60, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, value BLOB, crc INTEGER)")

    @staticmethod
    def key(teacher, text):
        return hashlib.sha256(f"{teacher.name}\0{text}".encode()).digest()

    def get(self, teacher, text):
        """The vector (dim,), or None where there is none or its bytes are damaged."""
        row = self.db.execute("SELECT value, crc FROM vectors WHERE key = ?",
                              (self.key(teacher, text),)).fetchone()
        whole = row and zlib.crc32(row[0]) == row[1] and len(row[0]) == 4 * teacher.dim
        return np.frombuffer(row[0], np.float32) if whole else None

    def put(self, teacher, texts, vectors):
        blobs = [np.ascontiguousarray(vector, np.float32).tobytes() for vector in vectors]
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", [
            (self.key(teacher, text), blob, zlib.crc32(blob)) for text, blob in zip(texts, blobs)])
        self.db.execute("COMMIT")

def teacher_vectors(teacher, split, texts, cache_dir, limit=None):
    """float32 (N, dim), row i for texts[i], the first `limit` of them; a costly teacher makes each once."""
    if not teacher.costly:
        vectors = _finite(teacher, teacher.vectors(split, texts, limit), split, texts)
    else:
        cache, texts = Cache(cache_dir), texts[:limit]
        missing = [text for text in dict.fromkeys(texts) if cache.get(teacher, text) is None]
        if cut := teacher.too_long(missing):
            print(f"{teacher.name}: {cut} of {len(missing)} {split} texts are too long for it and were cut",
                  file=sys.stderr)
        for i in tqdm(range(0, len(missing), 256), desc=teacher.name, disable=None if missing else True):
            chunk = missing[i:i + 256]  # what a kill can lose
            cache.put(teacher, chunk, _finite(teacher, teacher.encode(chunk), split, chunk))
        vectors = np.array([cache.get(teacher, text) for text in texts])
    return vectors

def _finite(teacher, vectors, split, texts):
    """The vectors, when all of them are finite; else a UserError that shows the text."""
    # DEVIATION: in the authors' code a missing vector becomes zeros, a picture that nobody made.
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise UserError(f"{teacher.name} gave no finite vector for a text of {split}: "
                        f"{texts[int(bad.argmax())][:80]!r}")
    return vectors

def main(argv=None):
    parser = Parser(prog="teacher.py", allow_abbrev=False, description="Look at what a teacher makes.")
    parser.add_argument("--show", required=True, metavar="TEXT", help="Text to draw.")
    parser.add_argument("--teacher", default="painter", help="A teacher with pictures (painter by default).")
    parser.add_argument("--out", default="picture.png", help="File to write (picture.png by default).")
    args = parser.parse_args(argv)
    try:
        if check_spec(args.teacher)[0].picture is None:  # before anything is loaded
            raise UserError(f"{args.teacher} has no picture to show: try --teacher painter")
        pixels = build_teacher(args.teacher).picture(args.show)
        from PIL import Image

        factor = -(-512 // max(pixels.shape))  # to 512 pixels or somewhat more, none of them smoothed
        Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1)).save(args.out)
        print(f"wrote {args.out}")
    except ImportError:
        parser.exit(2, "teacher.py: error: --show needs pillow: pip install pillow\n")
    except (UserError, OSError, ValueError) as error:  # no such teacher, folder, file type
        parser.exit(2, f"teacher.py: error: {error}\n")

if __name__ == "__main__":
    main()
