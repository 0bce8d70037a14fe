"""Black-box teachers: a text goes in, a vector comes out; nothing of the teacher is trained or opened.

    teacher = build_teacher("painter")                   # "NAME[:ARGUMENT]" of TEACHERS
    teacher.encode(["is a mouse bigger than a piano?"])  # float32 array (N, teacher.dim)
    python teacher.py --task rte --teacher stable-diffusion   # make its vectors ahead; once more to go on

A teacher of your own is a class with name, dim and encode, and one line in TEACHERS. A vector depends on its
text alone, never on its neighbours in a list, so each is made once and kept.
"""
import base64
import functools
import hashlib
import io
import json
import os
import re
import sqlite3
import sys
import time
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data import (CACHE, OBJECTS, Parser, UserError, check_available, explain_loading, find_task, known,
                  load_task, load_tokenizer, retry)

class Teacher:
    """The interface: name (with all that changes a vector: it is the cache's key), dim, encode(texts)."""
    costly = True     # asked once a text, by way of the cache; else it has reader(split, texts) of its own
    at_once = 256     # texts between two writes to the cache: what a kill can lose
    tokenizer = None  # of a teacher that reads max_tokens of a text and no more
    def items(self, split, texts):
        """What encode() is given for each text, and the cache's key holds."""
        return texts

class Painter(Teacher):
    """A procedural text-to-picture function: a text's objects, side by side, 4 x 16 x 16 = 1024 numbers.
    Channels: red, green, blue, coverage. Sizes on a log scale, .5 cm one pixel, 60 m the whole height. Any
    other word leaves a faint pixel of its own, so every text has a picture; beyond OBJECTS it knows NOTHING.
    painter:RHO gives RHO picture + sqrt(1 - RHO^2) noise of the same power: the dose of the teacher."""
    dim, costly = 1024, False
    colours = {"red": (.9, .1, .1), "green": (.1, .7, .2), "blue": (.1, .3, .9), "brown": (.5, .3, .1),
               "grey": (.5, .5, .5), "white": (1, 1, 1), "black": (.1, .1, .1), "yellow": (.95, .85, .1),
               "orange": (.95, .5, .1), "pink": (1, .6, .7)}
    def __init__(self, rho):
        if not re.fullmatch(r"|0|1|1\.0*|0?\.\d+", rho):
            raise UserError(f"painter:{rho}: write painter:RHO with a dose RHO from 0 (noise) to 1 (picture)")
        self.rho = float(rho or 1)
        self.name = f"painter:{self.rho:g}"
        self.paint = functools.lru_cache(10_000)(self.paint)  # 80 MB at most; each painter has its own

    def encode(self, texts):
        return np.array([self.paint(text).ravel() for text in texts], np.float32).reshape(-1, self.dim)

    def reader(self, split, texts):
        return lambda rows: self.encode([texts[i] for i in rows])  # to paint anew is quick

    def picture(self, text):
        from PIL import Image
        *colours, cover = self.paint(text)  # on white paper
        pixels = 255 * np.clip(np.stack(colours, -1) + 1 - cover[..., None], 0, 1)
        return Image.fromarray(pixels.astype(np.uint8))

    def paint(self, text):
        """What encode flattens, (4, 16, 16)."""
        picture, words = np.zeros((4, 16, 16)), re.findall(r"\w+", text.lower())
        for own in [_generator("word", word) for word in words if word not in OBJECTS]:
            picture[:3, own.integers(16), own.integers(16)] += 0.1 * own.random(3)
        things = [OBJECTS[word] for word in words if word in OBJECTS]
        y, x = np.mgrid[:16, :16] + 0.5  # pixel centres
        for i, (size, colour, shape) in enumerate(things):
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

# ---- models that see or draw -------------------------------------------------------------------------------
def _device():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"

def _frozen(name, kind):
    """(model, tokenizer) of a transformers class, without gradients, on the GPU where there is one."""
    import torch
    import transformers
    name = name or "openai/clip-vit-large-patch14"
    how = check_available(name)  # asks the hub once and words its refusals
    with explain_loading(name):
        tokenizer = load_tokenizer(name, how)
        model, info = getattr(transformers, kind).from_pretrained(**how, dtype=torch.float32,
                                                                  output_loading_info=True)
    if lacks := ", ".join(sorted(info["missing_keys"])[:3]):
        raise UserError(f"{name} is no {kind}: it lacks {lacks}")
    return model.eval().requires_grad_(False).to(_device()), tokenizer

class Clip(Teacher):
    """The text side of CLIP's image-text space: where a picture of the text would lie, without drawing it."""
    def __init__(self, model):
        self.model, self.tokenizer = _frozen(model, "CLIPTextModelWithProjection")
        self.name, config = f"clip:{self.model.name_or_path}", self.model.config
        self.dim, self.max_tokens = config.projection_dim, config.max_position_embeddings  # 768 and 77

    def encode(self, texts):
        out = np.zeros((len(texts), self.dim), np.float32)
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(texts[i:i + 64], padding=True, truncation=True, max_length=self.max_tokens,
                                   return_tensors="pt").to(self.model.device)
            out[i:i + 64] = self.model(**batch).text_embeds.cpu().numpy()
        return out

def pixels(_):
    """The colours themselves, 16 x 16 of them, -1 .. 1."""
    return lambda picture: np.array(picture.resize((16, 16))).ravel() / 127.5 - 1

def clip_pixels(name):
    """The picture side of CLIP's image-text space, 768 numbers: what is to be seen, hardly where."""
    from transformers import CLIPImageProcessorPil
    model, _ = _frozen(name, "CLIPVisionModelWithProjection")
    prepare = CLIPImageProcessorPil.from_pretrained(model.name_or_path)
    return lambda picture: model(
        **prepare(picture, return_tensors="pt").to(model.device)).image_embeds[0].cpu().numpy()

def vae(name):
    """Stable Diffusion's own eye: the 4 x 16 x 16 latent of the picture at 128 x 128, 1024 numbers."""
    from diffusers import AutoencoderKL, image_processor
    model = AutoencoderKL.from_pretrained(**check_available(name or "stabilityai/sd-vae-ft-mse"),
                                          use_safetensors=True).requires_grad_(False).to(_device())
    prepare = image_processor.VaeImageProcessor().preprocess  # to -1 .. 1, in which the VAE was trained
    return lambda picture: (model.config.scaling_factor * model.encode(
        prepare(picture, 128, 128).to(model.device)).latent_dist.mode()).flatten().cpu().numpy()

ENCODERS = {"pixels": pixels, "clip": clip_pixels, "vae": vae}  # each makes a function picture -> vector

class Pictures(Teacher):
    """A teacher whose pictures a picture encoder turns into vectors; a subclass gives picture(text)."""
    at_once = 1  # a picture takes seconds and may cost money: a kill loses the one in work
    def __init__(self, name, encoder):
        from PIL import Image
        make, model = split_spec(encoder or "pixels", ENCODERS)
        model = os.path.abspath(model) if os.path.isdir(model) else model
        self.see, self.name = make(model), f"{name} {make.__name__}:{model}"
        self.dim = len(self.see(Image.new("RGB", (64, 64))))

    def encode(self, texts):
        return np.array([self.see(self.picture(text)) for text in texts], np.float32)

class StableDiffusion(Pictures):
    """The paper's teacher: a 512 x 512 picture, then image-to-image at 128 x 128 to a 4 x 16 x 16 latent; for
    a picture encoder that picture. Each text is drawn alone, from a seed of its own: no order matters."""
    recipe = [{"num_inference_steps": 20, "guidance_scale": 7.5}, {
        "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.75, "output_type": "latent"}]
    def __init__(self, model, encoder):
        import torch
        from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
        how = check_available(model or "stable-diffusion-v1-5/stable-diffusion-v1-5", "model_index.json")
        draw = DiffusionPipeline.from_pretrained(  # no safety checker: its black squares would be data
            **how, use_safetensors=True, safety_checker=None, requires_safety_checker=False,
            dtype=torch.float16 if _device() == "cuda" else torch.float32)
        if _device() == "cuda" and torch.cuda.get_device_properties(0).total_memory < 6 << 30:
            draw.enable_attention_slicing()  # slower, and fits 4 GiB
        self.pipes = draw.to(_device()), AutoPipelineForImage2Image.from_pipe(draw)
        for pipe in self.pipes:
            pipe.set_progress_bar_config(disable=True)
        self.tokenizer, self.max_tokens = draw.tokenizer, draw.tokenizer.model_max_length  # 77
        super().__init__(f"stable-diffusion:{draw.name_or_path} {self.recipe}", encoder)
        if not encoder:
            self.see, self.dim, self.name = None, 256 * draw.vae.config.latent_channels, f"{self.name} latent"

    def picture(self, text, stage=0, **more):
        import torch
        seed = torch.Generator().manual_seed(int(_generator("stable-diffusion", text).integers(2**63)))
        return self.pipes[stage](text, generator=seed, **self.recipe[stage], **more).images[0]

    def encode(self, texts):
        if self.see:
            return super().encode(texts)
        latents = [self.picture(text, 1, image=self.picture(text).resize((128, 128))) for text in texts]
        return np.stack([latent.float().cpu().numpy().ravel() for latent in latents])

# ---- pictures that others make -----------------------------------------------------------------------------
def _open(file):
    """A picture from a path or bytes, in red, green and blue; OSError where it is not whole."""
    from PIL import Image
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file).convert("RGB")

class Api(Pictures):
    """An OpenAI-compatible images endpoint, api:https://HOST/v1#model=NAME&size=512x512: what follows # are
    fields of each request. The key stands in OPENAI_API_KEY, goes to that host alone, is written nowhere."""
    def __init__(self, url, encoder):
        self.cache = None  # where bought pictures are kept: another encoder sees the same ones
        base, _, fields = url.partition("#")
        self.url = base.removesuffix("/").removesuffix("/images/generations") + "/images/generations"
        self.fields = dict(urllib.parse.parse_qsl(fields))
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())  # a broken header is shown in errors
        if self.key and not re.match(r"https:|http://(localhost|127\.0\.0\.1)[:/]", self.url):
            raise UserError(f"http shows OPENAI_API_KEY to everyone on the way to {self.url}: use https")
        super().__init__(f"api:{url}", encoder)

    def picture(self, text):
        key = Cache.key(f"{self.url} {sorted(self.fields.items())}", text)
        found = self.cache and self.cache.get(key)
        if not found:
            found = self.ask(text)
            if self.cache:
                self.cache.put({key: found})
        return _open(found)

    def ask(self, text):
        """The bytes of the picture that the endpoint makes of the text."""
        what, body = f"{self.url} on {text[:80]!r}", {"n": 1, **self.fields, "prompt": text}
        request = urllib.request.Request(self.url, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")

        def whole(picture):  # one that was cut on its way raises, and is asked for again
            return picture if _open(picture) else None

        def made():
            found = json.load(urllib.request.urlopen(request, timeout=120))["data"][0]
            return found.get("url") or whole(base64.b64decode(found["b64_json"]))

        found = retry(made, what, self.key)
        if isinstance(found, bytes):
            return found
        if not re.match("https?://", found):
            raise UserError(f"{what}: the answer's url {found[:80]!r} is not on the web")
        return retry(lambda: whole(urllib.request.urlopen(found, timeout=120).read()), what, self.key)

class ImageFolder(Pictures):
    """Pictures that anyone made. FOLDER/manifest.jsonl has a line {"text": ..., "file": ...} for each, or
    {"split": "train", "index": 0, "file": ...} for row 0 of train."""
    def __init__(self, folder, encoder):
        self.manifest, self.files, number = Path(folder) / "manifest.jsonl", {}, 0  # by text, or (split, row)
        try:
            for number, line in enumerate(self.manifest.read_text("utf-8-sig").rstrip("\n").split("\n"), 1):
                row = json.loads(line)
                file = (Path(folder) / row["file"]).resolve()
                if not file.is_relative_to(Path(folder).resolve()) or not file.is_file():
                    raise ValueError(f"{row['file']} is no file inside the folder")
                self.files[row["text"] if "text" in row else (row["split"], int(row["index"]))] = file
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f'{self.manifest}:{number}: {error!r}: give each picture a line {{"text": ..., '
                            '"file": ...} or {"split": "train", "index": 0, "file": ...}') from None
        super().__init__(f"images:{folder}", encoder)

    def items(self, split, texts):
        """The file of each text and its state: one that was replaced since is another picture."""
        files = [self.files.get((split, i)) or self.files.get(text) for i, text in enumerate(texts)]
        if None in files:
            i, n = files.index(None), files.count(None)
            raise UserError(f"{self.manifest} lacks {n} {split} texts, first row {i}, {texts[i][:80]!r}")
        return [f"{file}\0{file.stat().st_size} bytes of {file.stat().st_mtime_ns}" for file in files]

    def picture(self, item):
        file = self.files.get(item) or item.partition("\0")[0]  # a text, or what items() made of it
        try:
            return _open(file)
        except Exception as error:  # pillow has many kinds
            raise UserError(f"{file} is not a whole picture ({error})") from None

class VectorFolder(Teacher):
    """Ready-made vectors: FOLDER/train.npy, dev.npy, row i for example i of the official file."""
    costly = False
    def __init__(self, folder):
        self.folder, self.name = Path(folder), "vectors:" + folder
        self.dim = self.open("train").shape[1]

    def encode(self, texts):
        raise UserError(f"{self.name} holds vectors by row, not by text: it has none for a new text")

    def open(self, split):
        path = self.folder / f"{split}.npy"
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)  # unpickling runs a stranger's code
            fits = rows.ndim == 2 and rows.dtype.kind == "f" and rows.flags.c_contiguous and rows.size
        except (OSError, ValueError, EOFError, AttributeError) as error:
            raise UserError(f"{path} is no readable array ({error}): write it with numpy.save") from None
        if not fits:
            raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}: expected floats, in C order")
        return rows

    def reader(self, split, texts):
        rows, wanted = self.open(split), (len(texts), self.dim)
        if rows.shape != wanted:
            raise UserError(f"{rows.filename} has shape {rows.shape}, expected {wanted}: one row an example")
        for i in range(0, len(rows), 4096):
            _checked(self.name, self.dim, rows[i:i + 4096], texts[i:i + 4096])
        file, start, dtype = open(rows.filename, "rb"), rows.offset, rows.dtype
        size = self.dim * dtype.itemsize
        # Read, not mapped: the pages of a map count as this process's memory, after an epoch all of them.
        return lambda at: [np.frombuffer(os.pread(file.fileno(), size, start + i * size), dtype) for i in at]

TEACHERS = {"painter": Painter, "clip": Clip, "stable-diffusion": StableDiffusion, "api": Api,
            "images": ImageFolder, "vectors": VectorFolder}

def split_spec(spec, names=TEACHERS, what="teacher"):
    """"NAME[:ARGUMENT]" -> (names[NAME], ARGUMENT). Builds nothing, so that a typo costs nothing."""
    name, _, argument = spec.partition(":")
    if name == "api" and (re.search("(?i)(key|token)=", argument)
                          or not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?(#.*)?", argument)):
        raise UserError("write api:https://HOST/v1#model=NAME&size=512x512; a key into OPENAI_API_KEY")
    return names[known(name, names, what)], argument

def build_teacher(spec, picture_encoder=None):
    """A teacher from "NAME[:ARGUMENT]" of TEACHERS; UserError says what is wrong. picture_encoder, one of
    ENCODERS likewise, is for those that draw: pixels by default, but stable-diffusion's own latent."""
    kind, argument = split_spec(spec)
    split_spec(picture_encoder or "pixels", ENCODERS, "--picture-encoder")  # before anything is loaded
    if picture_encoder and not issubclass(kind, Pictures):
        raise UserError(f"--picture-encoder {picture_encoder}: {spec} gives no pictures; leave it out")
    try:
        return kind(argument, picture_encoder) if issubclass(kind, Pictures) else kind(argument)
    except ImportError as error:
        raise UserError(f"{spec} needs {error.name}: pip install diffusers pillow") from None

# ---- from a teacher to the vectors of a task ---------------------------------------------------------------
class Cache:
    """Vectors and bought pictures on disk: sqlite in WAL mode survives a kill and takes two writers."""
    def __init__(self, folder):
        self.path = Path(folder) / "teachers.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        with FileLock(f"{self.path}.lock"):  # sqlite does not wait in the switch to WAL
            self.sql("PRAGMA journal_mode=WAL")
            self.sql("CREATE TABLE IF NOT EXISTS made (key INTEGER PRIMARY KEY, crc, value BLOB)")

    def sql(self, command, values=()):
        """All rows that a command gives."""
        try:
            return self.db.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {error}; if damaged, delete it: all is made anew") from None

    @staticmethod
    def key(name, item):
        """64 bits: among a million entries two share one with a chance under one in ten million."""
        return int.from_bytes(hashlib.sha256(f"{name}\0{item}".encode()).digest()[:8], "little", signed=True)

    def keys(self):
        return np.array(self.sql("SELECT key FROM made"), np.int64).reshape(-1)

    def get(self, key):
        """The bytes, or None where there are none. Damaged ones are thrown away, to be made again."""
        for value, crc in self.sql("SELECT value, crc FROM made WHERE key = ?", (int(key),)):
            if zlib.crc32(value) == crc:
                return value
            self.sql("DELETE FROM made WHERE key = ?", (int(key),))

    def reader(self, keys):
        """rows -> their vectors, a list of (dim,); nan for one that is not there."""
        nothing = np.float32(np.nan).tobytes()
        return lambda rows: [np.frombuffer(self.get(keys[i]) or nothing, np.float32) for i in rows]

    def put(self, entries):
        self.sql("BEGIN IMMEDIATE")
        for key, value in entries.items():
            self.sql("INSERT OR REPLACE INTO made VALUES (?, ?, ?)", (int(key), zlib.crc32(value), value))
        self.sql("COMMIT")

def _checked(teacher, dim, vectors, names):
    """float32 (n, dim), when all of them are there; else a UserError that names the first one that is not."""
    # DEVIATION: in the authors' code a missing vector becomes zeros, a picture that nobody made.
    for vector, name in zip(vectors, names):
        if np.shape(vector) != (dim,) or not float(np.abs(vector).max()) < 3e38:  # float32's range; nan too
            raise UserError(f"{teacher} has no finite vector of {dim} for {name[:80]!r}: start once more")
    return np.array(vectors, np.float32)

def fill(teacher, items, keys, cache, most=None):
    """Ask a costly teacher for what the cache lacks, each item once, `most` at most; returns how many."""
    with FileLock(f"{cache.path}.{Cache.key(re.split('[ #]', teacher.name)[0], '')}.lock"):  # one at a time
        for key in keys[::1 + len(keys) // 10_000]:  # of MNLI's 400,000 not all: that would take 20 s
            cache.get(key)  # throws a damaged one away
        missing = list({keys[i]: i for i in np.flatnonzero(~np.isin(keys, cache.keys()))}.values())
        todo, step = missing[:most], teacher.at_once
        texts = [items[i] for i in todo if teacher.tokenizer]
        if cut := sum(len(teacher.tokenizer(text)["input_ids"]) > teacher.max_tokens for text in texts):
            print(f"{teacher.name}: {cut} of {len(todo)} texts are too long for it and cut", file=sys.stderr)
        for start in tqdm(range(0, len(todo), step), desc=teacher.name, unit_scale=step, disable=None):
            rows, asked = todo[start:start + step], [items[i] for i in todo[start:start + step]]
            vectors = _checked(teacher.name, teacher.dim, teacher.encode(asked), asked)
            cache.put({keys[i]: vector.tobytes() for i, vector in zip(rows, vectors)})
    if len(todo) < len(missing):
        raise UserError(f"--max-pictures {most} are made, {len(missing) - most} to go: type the same again")
    return len(todo)

def open_vectors(teacher, task, examples, cache_dir, limit=None, most=None, eval_limit=None):
    """({split: the function rows -> float32 (n, dim)}, how many were made now). MNLI's vectors are 1.6 GB, so
    they are read a batch at a time. A costly teacher is not asked for texts beyond `limit`, `eval_limit`."""
    texts, made = {split: [task.prompt(each) for each in examples[split]] for split in ("train", "dev")}, 0
    n = len(texts["train"][:limit])
    if teacher.costly:
        cache = teacher.cache = Cache(cache_dir)  # in which a teacher may keep what it buys on the way
        items = teacher.items("train", texts["train"][:n]) + teacher.items("dev", texts["dev"][:eval_limit])
        keys = np.array([Cache.key(teacher.name, item) for item in items], np.int64)
        made = fill(teacher, items, keys, cache, most)
        readers = {"train": cache.reader(keys[:n]), "dev": cache.reader(keys[n:])}
    else:
        readers = {split: teacher.reader(split, texts[split]) for split in texts}
    name, dim = teacher.name, teacher.dim  # not the teacher: a model would stay on the GPU through training

    def read(split, rows):
        return _checked(name, dim, readers[split](rows), [examples[split][i].where for i in rows])

    # By the training rows' root mean square (of 6,000 at most), not centred: beta means the same everywhere.
    some = read("train", range(0, n, 1 + n // 6000))
    rms = np.float32(np.sqrt(np.einsum("ij,ij->", some, some, dtype=float) / some.size) or 1)
    return {split: lambda rows, split=split: read(split, rows) / rms for split in texts}, made

# ---- the command line --------------------------------------------------------------------------------------
def main(argv=None):
    parser = Parser(prog="teacher.py", allow_abbrev=False, description="Make vectors ahead; check the cache.")
    for flag, help, default in (
            ("task", "Task whose train and dev texts the teacher gets.", None),
            ("teacher", f"NAME[:ARGUMENT], with a NAME of {', '.join(TEACHERS)}.", "clip"),
            ("picture-encoder", "What looks at pictures: pixels, clip[:MODEL] or vae[:MODEL].", None),
            ("data-dir", "Folder with the official files, as in train.py.", None),
            ("cache-dir", "Folder for downloads and vectors.", CACHE),
            ("limit", "Only the first N training texts.", 10**9), ("max-pictures", "Make N at most.", 10**9)):
        parser.add_argument(f"--{flag}", help=help, metavar="X", default=default, type=type(default or ""))
    parser.add_argument("--verify", action="store_true", help="Throw damaged entries out of the cache.")
    parser.add_argument("--offline", action="store_true", help="Use no network.")
    args = parser.parse_args(argv)
    if not (args.task or args.verify) or args.limit < 1 or args.max_pictures < 0:
        parser.error("give --task or --verify, --limit at least 1, --max-pictures at least 0")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        if args.verify:
            cache = Cache(args.cache_dir)
            damaged = sum(cache.get(key) is None for key in cache.keys())
            print(f"{cache.path}: {len(cache.keys())} entries are whole; thrown away as damaged: {damaged}")
        if args.task:
            task, examples = find_task(args.task), load_task(args.task, args.data_dir, args.cache_dir)
            teacher, began = build_teacher(args.teacher, args.picture_encoder), time.perf_counter()
            _, made = open_vectors(teacher, task, examples, args.cache_dir, args.limit, args.max_pictures)
            n = len(examples["train"][:args.limit]) + len(examples["dev"])
            print(f"{teacher.name}: {n} vectors of {teacher.dim} numbers, {4e-6 * n * teacher.dim:.1f} MB; "
                  f"{made} made now, in {time.perf_counter() - began:.1f} s")
    except (UserError, OSError, ValueError, KeyboardInterrupt) as error:
        parser.exit(2, f"teacher.py: error: {str(error) or 'stopped; the same command goes on'}\n")

if __name__ == "__main__":
    main()
