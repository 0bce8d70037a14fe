"""Black-box teachers: a text goes in, one vector comes out, nothing of the teacher is trained or opened.

    teacher = build_teacher("painter")     # or painter:RHO, clip[:MODEL], vectors:FOLDER
    teacher.name, teacher.dim              # what it is, and d_e
    teacher.encode(["is a mouse bigger than a piano?"])     # float32 array (N, d_e)

A teacher of your own is a class with these three names and one line in TEACHERS. Vectors depend on the text alone, never on
its neighbours in a list, so that each is made once and kept (Cache).
"""
import hashlib
import re
import sqlite3
import sys
import zlib
from pathlib import Path

import numpy as np

from data import OBJECTS, UserError, known


class Teacher:
    """The interface. Subclasses set name (with every parameter that changes a vector), dim and encode."""

    name, dim = "", 0
    keep = True  # whether making a vector costs more than reading it back from the cache

    def encode(self, texts):
        """list of N texts -> float32 array (N, dim)."""
        raise NotImplementedError

    def vectors(self, split, texts):
        """The vectors of a split's examples, in order. Only a folder of ready-made rows needs to know the split."""
        return self.encode(texts)


class Painter(Teacher):
    """A procedural text-to-picture function: the objects a text names, drawn side by side, 4 x 16 x 16 = 1024 numbers.

    Channels: red, green, blue, coverage. Sizes are drawn on a log scale, .5 cm as one pixel, 60 m as the full half. Every
    other word leaves a small mark of its own, so any text has a picture; of the world beyond OBJECTS it knows NOTHING.
    painter:RHO returns RHO * picture + sqrt(1 - RHO^2) * noise of the picture's power: the dose of the teacher.
    """

    dim, keep = 1024, False  # drawing is cheaper than a look-up

    def __init__(self, rho=""):
        try:
            self.rho = float(rho or 1)
        except ValueError:
            self.rho = -1
        if not 0 <= self.rho <= 1:
            raise UserError(f"painter:{rho} is not a dose: write painter:RHO with RHO from 0 (noise) to 1 (the picture)")
        self.name = f"painter:{self.rho:g}"

    def encode(self, texts):
        return np.stack([self._paint(text).ravel() for text in texts]) if len(texts) else np.zeros((0, self.dim), np.float32)

    def _paint(self, text):
        picture = np.zeros((4, 16, 16))
        words = re.findall(r"\w+", text.lower())
        things = [word for word in words if word in OBJECTS]
        for word in words:
            if word not in OBJECTS:  # one faint pixel whose place and colour are the word's own
                place = _seeded("word", word)
                picture[:3, place.integers(16), place.integers(16)] += 0.1 * place.random(3)
        y, x = np.mgrid[:16, :16] + 0.5  # pixel centres
        for i, thing in enumerate(things):
            size, colour, shape = OBJECTS[thing]
            half = 8 / len(things)  # half the width of this object's share of the canvas
            dx, dy = (x - (2 * i + 1) * half) / half, (y - 8) / 8  # -1 .. 1 over the share
            distance = {"disc": np.hypot(dx, dy), "box": np.maximum(abs(dx), abs(dy)),
                        "bar": np.maximum(2 * abs(dx), abs(dy)), "cone": np.maximum(2 * abs(dx) - dy, abs(dy))}[shape]
            radius = 0.1 + 0.9 * np.log(size / 0.5) / np.log(6000 / 0.5)
            cover = np.clip((radius - distance) * half + 0.5, 0, 1) * (abs(dx) <= 1)  # soft edge: sizes between pixels show
            picture = picture * (1 - cover) + cover * np.array([*colour, 1.0])[:, None, None]
        noise = _seeded("noise", text).standard_normal(picture.shape) * np.sqrt((picture**2).mean() + 1e-12)
        return (self.rho * picture + (1 - self.rho**2) ** 0.5 * noise).astype(np.float32)


def _seeded(*parts):
    """A generator that depends on the parts alone (Python's own hash changes from run to run)."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "little"))


class Clip(Teacher):
    """The text side of CLIP's image-text space: what a picture of the text would look like to CLIP, without the picture."""

    def __init__(self, model=""):
        from student import load_pretrained  # one place asks the hub and one place words its refusals

        self.name = "clip:" + (model or "openai/clip-vit-large-patch14")
        from transformers import CLIPTextModelWithProjection

        self.model, self.tokenizer = load_pretrained(self.name[5:], CLIPTextModelWithProjection)
        self.model.eval()
        self.dim = self.model.config.projection_dim

    def encode(self, texts):
        import torch
        from tqdm import tqdm

        limit = self.model.config.max_position_embeddings  # 77
        cut = sum(len(ids) > limit for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]) if len(texts) else 0
        if cut:
            print(f"{self.name} reads {limit} tokens: {cut} of {len(texts)} texts were cut", file=sys.stderr)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)
        out = np.zeros((len(texts), self.dim), np.float32)
        with torch.inference_mode():
            for i in tqdm(range(0, len(texts), 64), desc=self.name, disable=None):
                batch = self.tokenizer(list(texts[i:i + 64]), padding=True, truncation=True, max_length=limit, return_tensors="pt")
                out[i:i + 64] = self.model(**batch.to(device)).text_embeds.float().cpu().numpy()
        self.model.to("cpu")  # the student needs the card
        return out


class VectorFolder(Teacher):
    """Ready-made vectors: FOLDER/train.npy, dev.npy (and test.npy), row i for example i of the official file."""

    keep = False

    def __init__(self, folder=""):
        self.folder, self.name = Path(folder), "vectors:" + folder
        if not folder or not (self.folder / "train.npy").is_file():
            raise UserError(f"vectors:{folder} has no train.npy: write vectors:FOLDER with train.npy and dev.npy in FOLDER, "
                            "one row an example")
        self.dim = self._open("train").shape[1]

    def encode(self, texts):
        raise UserError(f"{self.name} holds vectors by row, not by text: it can't encode a new text")

    def _open(self, split):
        path = self.folder / f"{split}.npy"
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)  # pickles run code: never
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable .npy array ({error}): write it with numpy.save, not pickled") from None
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}: expected floats (examples, dim)")
        return rows

    def vectors(self, split, texts):
        rows = self._open(split)
        if len(rows) != len(texts) or rows.shape[1] != self.dim:
            raise UserError(f"{self.folder / split}.npy has shape {rows.shape}, but {split} has {len(texts)} examples and "
                            f"train.npy is {self.dim} wide: one row an example, in the official file's order")
        return np.asarray(rows, np.float32)


TEACHERS = {"painter": Painter, "clip": Clip, "vectors": VectorFolder}


def check_spec(spec):
    """The class and the argument of "NAME[:ARGUMENT]"; builds nothing, so that a typo costs nothing."""
    name, _, argument = spec.partition(":")
    return TEACHERS[known(name, TEACHERS, "teacher")], argument


def build_teacher(spec):
    """A teacher from "painter", "painter:RHO", "clip[:MODEL]" or "vectors:FOLDER"; UserError names what does not fit."""
    teacher, argument = check_spec(spec)
    return teacher(argument)


class Cache:
    """Vectors on disk, keyed by (teacher name, text): sqlite in WAL mode survives a kill and takes two writers."""

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
        row = self.db.execute("SELECT value, crc FROM vectors WHERE key = ?", (self.key(teacher, text),)).fetchone()
        ok = row and zlib.crc32(row[0]) == row[1] and len(row[0]) == 4 * teacher.dim
        return np.frombuffer(row[0], np.float32) if ok else None

    def put(self, teacher, texts, vectors):
        rows = [(self.key(teacher, text), vector.tobytes()) for text, vector in zip(texts, vectors)]
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", [(key, blob, zlib.crc32(blob)) for key, blob in rows])
        self.db.execute("COMMIT")


def teacher_vectors(teacher, split, texts, cache_dir, limit=None):
    """float32 (N, dim), row i for texts[i], i below limit; each distinct text is made once, in chunks that a kill loses at most one of.

    Raises UserError naming the example when a vector is missing or not finite: training on a zero in its place would
    teach the student a picture that nobody made.
    """
    if not teacher.keep:
        vectors = teacher.vectors(split, texts)[:limit]
    else:
        texts = texts[:limit]
        cache = Cache(cache_dir)
        missing = [text for text in dict.fromkeys(texts) if cache.get(teacher, text) is None]
        for i in range(0, len(missing), 1024):
            cache.put(teacher, missing[i:i + 1024], teacher.encode(missing[i:i + 1024]))
        found = [cache.get(teacher, text) for text in texts]
        # DEVIATION: in the authors' code a missing vector silently becomes zeros; here it is an error.
        if any(vector is None for vector in found):
            row = [vector is None for vector in found].index(True)
            raise UserError(f"{teacher.name} has no vector for example {row} of {split}: {texts[row][:80]!r}")
        vectors = np.stack(found)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int((~finite).argmax())
        raise UserError(f"{teacher.name} gave a vector that is not finite for example {row} of {split}: {texts[row][:80]!r}")
    return vectors
