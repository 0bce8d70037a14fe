"""Black-box teachers: text in, vector out; nothing of a teacher is trained or opened.

    teacher = build_teacher("painter")                   # "NAME[:ARGUMENT]" of TEACHERS
    teacher.encode(["is a mouse bigger than a piano?"])  # float32 array (N, teacher.dim)
    python teacher.py --task rte --teacher stable-diffusion   # make vectors ahead of training

Shapes: N texts; d_e = teacher.dim, the width of one vector e = E(x), where x is all the text of an
example. A vector depends on its text alone, so each is made once and kept in a cache.

To add a teacher, write a subclass of Teacher and give it a line in TEACHERS, then one in OFFLINE of
tests/test_teacher.py, which tests that it keeps the contract below.
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

from data import (
    CACHE,
    OBJECTS,
    Parser,
    UserError,
    check_available,
    explain_loading,
    find_task,
    known,
    load_task,
    load_tokenizer,
    retry,
)


class Teacher:
    """The interface of all teachers: what a subclass gives, and what is asked of it.

    A teacher is built as `Mine(argument)` from the text behind the colon of its spec. It has

    name     a text, not empty, with every argument that changes a vector. The cache knows a vector
             by this name and its text, so CHANGED CODE WANTS A NEW NAME ("mine-2:..."): under the
             old name the cache would silently give the old vectors;
    dim      the width d_e of a vector, a positive int;
    encode(texts) -> float32 array (N, dim), all of it finite. A vector depends on its own text
             alone: never on its neighbours in the list, on their order, on Python's hash() (another
             one in each process) or on a random generator that other texts have drawn from;
    costly   whether each text is asked for once, by way of the cache (True, the default). Where it
             is False, the teacher is asked anew for every batch and also has a method
             reader(split, texts), which returns a function rows -> their vectors (n, dim);
    planned_dim(argument, picture_encoder), a class method that tells dim before anything is loaded.

    build_teacher checks what can be checked at once; open_vectors checks every vector.
    """
    name = ""
    dim = 0
    costly = True
    at_once = 256     # texts between two writes to the cache: what a kill can lose
    tokenizer = None  # of a teacher that reads max_tokens of a text and no more
    max_tokens = None

    def items(self, split, texts):
        """Return what encode is given for each text of a split; the cache's key holds it too."""
        return texts

    @classmethod
    def planned_dim(cls, argument, picture_encoder=None):
        """Return the width of the vectors without loading a model, or None where it is unknown.

        `train.py --plan` asks, before anything is built. Here it is known where dim is an attribute
        of the class; a teacher whose __init__ finds dim overrides this, or leaves it unknown.
        """
        if type(cls.dim) is int and cls.dim > 0:
            return cls.dim
        return None


class Painter(Teacher):
    """A procedural text-to-picture function: a text's objects, side by side, 4 x 16 x 16 numbers.

    Channels: red, green, blue, coverage. Sizes on a log scale, .5 cm one pixel, 60 m the whole
    height. Any other word leaves a faint pixel of its own, so every text has a picture; beyond
    OBJECTS it knows NOTHING. painter:RHO gives RHO picture + sqrt(1 - RHO^2) noise of the same
    power: the dose of the teacher.
    """
    dim = 1024
    costly = False
    colours = {
        "red": (0.9, 0.1, 0.1),
        "green": (0.1, 0.7, 0.2),
        "blue": (0.1, 0.3, 0.9),
        "brown": (0.5, 0.3, 0.1),
        "grey": (0.5, 0.5, 0.5),
        "white": (1, 1, 1),
        "black": (0.1, 0.1, 0.1),
        "yellow": (0.95, 0.85, 0.1),
        "orange": (0.95, 0.5, 0.1),
        "pink": (1, 0.6, 0.7),
    }

    def __init__(self, rho):
        if not re.fullmatch(r"|0|1|1\.0*|0?\.\d+", rho):
            raise UserError(f"painter:{rho}: write painter:RHO with a dose RHO from 0 (noise) "
                            "to 1 (picture)")
        self.rho = float(rho or 1)
        self.name = f"painter:{self.rho:g}"
        # Each painter remembers its own pictures (80 MB at most): another dose, another picture.
        self.paint = functools.lru_cache(10_000)(self.paint)

    def encode(self, texts):
        vectors = [self.paint(text).ravel() for text in texts]
        return np.array(vectors, np.float32).reshape(-1, self.dim)  # (N, d_e), also for N = 0

    def reader(self, split, texts):
        """To paint anew is quick: nothing is kept on disk."""
        return lambda rows: self.encode([texts[row] for row in rows])

    def picture(self, text):
        """Return the painting on white paper, a PIL image to look at."""
        from PIL import Image
        painting = self.paint(text)  # (4, 16, 16)
        colours = np.moveaxis(painting[:3], 0, -1)  # (16, 16, 3)
        cover = painting[3][..., None]              # (16, 16, 1)
        pixels = 255 * np.clip(colours + 1 - cover, 0, 1)
        return Image.fromarray(pixels.astype(np.uint8))

    def paint(self, text):
        """Return RHO picture + sqrt(1 - RHO^2) noise, (4, 16, 16), which encode flattens."""
        words = re.findall(r"\w+", text.lower())
        picture = np.zeros((4, 16, 16))  # (channel, row, column)
        for word in words:
            if word not in OBJECTS:
                draw = seeded_generator("word", word)
                row = draw.integers(16)
                column = draw.integers(16)
                picture[:3, row, column] += 0.1 * draw.random(3)
        things = [OBJECTS[word] for word in words if word in OBJECTS]
        for place, thing in enumerate(things):
            picture = self.draw_over(picture, thing, place, len(things))
        noise = seeded_generator("noise", text).standard_normal(picture.shape)  # (4, 16, 16)
        noise = noise * np.sqrt((picture**2).mean())
        return self.rho * picture + np.sqrt(1 - self.rho**2) * noise

    def draw_over(self, picture, thing, place, count):
        """Return the picture, (4, 16, 16), with one of `count` objects drawn on its share of it.

        The canvas is cut into `count` upright shares; `place` counts them from the left.
        """
        size, colour, shape = thing
        y, x = np.mgrid[:16, :16] + 0.5  # pixel centres, (16, 16) each
        half = 8 / count                 # half the width of a share, in pixels
        centre = (2 * place + 1) * half
        dx = (x - centre) / half         # -1 .. 1 inside the share
        dy = (y - 8) / 8
        distance = distance_from_centre(shape, dx, dy)  # (16, 16)
        radius = 0.1 + 0.9 * np.log(size / 0.5) / np.log(6000 / 0.5)  # of .5 cm to 60 m: .1 .. 1
        # The soft edge makes sizes between two pixels visible.
        cover = np.clip((radius - distance) * half + 0.5, 0, 1)  # (16, 16)
        cover = cover * (abs(dx) <= 1)
        paint = np.array([*self.colours[colour], 1.0])  # (4,), full coverage
        return picture * (1 - cover) + cover * paint[:, None, None]


def distance_from_centre(shape, dx, dy):
    """Return how far points (dx, dy) lie from the centre; those at distance 1 outline the shape."""
    if shape == "disc":
        return np.hypot(dx, dy)
    if shape == "box":
        return np.maximum(abs(dx), abs(dy))
    if shape == "bar":
        return np.maximum(2 * abs(dx), abs(dy))
    if shape == "cone":
        return np.maximum(2 * abs(dx) - dy, abs(dy))
    raise ValueError(f"the painter draws disc, box, bar and cone, but no {shape}")


def seeded_generator(*parts):
    """Return a random generator that depends on the parts alone, which are texts.

    Python's own hash() would not do: it changes from process to process.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


class Clip(Teacher):
    """The text side of CLIP's image-text space: where a picture of the text would lie.

    Nothing is drawn. Any CLIP of the hub or of a folder: clip[:MODEL].
    """

    def __init__(self, model):
        self.model, self.tokenizer = load_frozen(model, "CLIPTextModelWithProjection")
        self.name = f"clip:{self.model.name_or_path}"
        config = self.model.config
        self.dim = config.projection_dim  # 768 of ViT-L/14
        self.max_tokens = config.max_position_embeddings  # 77: a longer text is cut

    @classmethod
    def planned_dim(cls, argument, picture_encoder=None):
        """Return 768, which is assumed: it is the width of ViT-L/14, the default model."""
        return 768

    def encode(self, texts):
        vectors = np.zeros((len(texts), self.dim), np.float32)  # (N, d_e)
        for start in range(0, len(texts), 64):
            part = slice(start, start + 64)
            batch = self.tokenizer(texts[part], padding=True, truncation=True,
                                   max_length=self.max_tokens, return_tensors="pt")
            output = self.model(**batch.to(self.model.device))
            vectors[part] = output.text_embeds.cpu().numpy()  # (n, d_e)
        return vectors


# ---- the method ends here; below is bookkeeping ----


# ---- models that see or draw ----

def device_name():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_frozen(name, kind):
    """Return (model, tokenizer) of a transformers class, frozen, on the GPU if there is one.

    UserError where the hub or folder `name` has no such model.
    """
    import torch
    import transformers
    name = name or "openai/clip-vit-large-patch14"
    how = check_available(name)  # asks the hub once and words its refusals
    with explain_loading(name):
        tokenizer = load_tokenizer(name, how)
        model_class = getattr(transformers, kind)
        model, info = model_class.from_pretrained(
            **how, dtype=torch.float32, output_loading_info=True)
    # transformers would fill missing weights in at random, anew in each process.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{name} is no {kind}: it lacks {', '.join(missing[:3])}")
    model = model.eval().requires_grad_(False)
    return model.to(device_name()), tokenizer


def pixels(_):
    """See the colours themselves, 16 x 16 of them, -1 .. 1: 768 numbers."""
    return lambda picture: np.array(picture.resize((16, 16))).ravel() / 127.5 - 1


def clip_pixels(name):
    """See with the picture side of CLIP, 768 numbers: what is to be seen, hardly where."""
    from transformers import CLIPImageProcessorPil
    model, _ = load_frozen(name, "CLIPVisionModelWithProjection")
    prepare = CLIPImageProcessorPil.from_pretrained(model.name_or_path)

    def see(picture):
        batch = prepare(picture, return_tensors="pt").to(model.device)
        features = model(**batch).image_embeds  # (1, d_e)
        return features[0].cpu().numpy()

    return see


def vae(name):
    """See with Stable Diffusion's own eye: the 4 x 16 x 16 latent of the picture at 128 x 128."""
    from diffusers import AutoencoderKL, image_processor
    how = check_available(name or "stabilityai/sd-vae-ft-mse")
    model = AutoencoderKL.from_pretrained(**how, use_safetensors=True)
    model = model.requires_grad_(False).to(device_name())
    # preprocess brings colours to -1 .. 1, the range in which the VAE was trained.
    prepare = image_processor.VaeImageProcessor().preprocess

    def see(picture):
        image = prepare(picture, 128, 128).to(model.device)    # (1, 3, 128, 128)
        latent = model.encode(image).latent_dist.mode()        # (1, 4, 16, 16)
        latent = model.config.scaling_factor * latent
        return latent.flatten().cpu().numpy()                  # (1024,)

    return see


# A picture encoder is a function of its argument that makes a function picture -> vector. Its own
# __name__ stands in the cache's keys, so a changed function wants a new name.
ENCODERS = {"pixels": pixels, "clip": clip_pixels, "vae": vae}
PLANNED_DIMS = {"pixels": 768, "clip": 768, "vae": 1024}  # of the usual models, for --plan


class Pictures(Teacher):
    """A teacher that gives pictures, which a picture encoder turns into vectors.

    A subclass is built as `Mine(argument, encoder)`, calls super().__init__(name, encoder), which
    sets name and dim, and has picture(text), which returns a PIL image.
    """
    at_once = 1  # a picture takes seconds and may cost money: a kill loses the one in work

    def __init__(self, name, encoder):
        from PIL import Image
        make_encoder, model = split_spec(encoder or "pixels", ENCODERS)
        if os.path.isdir(model):
            model = os.path.abspath(model)  # known by where it lies, not by how it was typed
        self.see = make_encoder(model)
        self.name = f"{name} {make_encoder.__name__}:{model}"
        blank = Image.new("RGB", (64, 64))
        self.dim = len(self.see(blank))

    @classmethod
    def planned_dim(cls, argument, picture_encoder=None):
        """Return the usual width of the picture encoder, or None if PLANNED_DIMS lacks it."""
        encoder, _, _ = (picture_encoder or "pixels").partition(":")
        return PLANNED_DIMS.get(encoder)

    def encode(self, texts):
        vectors = [self.see(self.picture(text)) for text in texts]
        return np.array(vectors, np.float32)  # (N, d_e)


class StableDiffusion(Pictures):
    """The paper's teacher: a 512 x 512 picture, then image-to-image at 128 x 128 to a latent.

    The latent has 4 x 16 x 16 numbers; a picture encoder is shown the picture instead. Each text is
    drawn alone, from a seed of its own: no order matters.
    """
    # The two stages stand in the name, hence in the cache's keys: another recipe, another teacher.
    recipe = [
        {"num_inference_steps": 20, "guidance_scale": 7.5},
        {"num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.75,
         "output_type": "latent"},
    ]

    def __init__(self, model, encoder):
        import torch
        from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
        model = model or "stable-diffusion-v1-5/stable-diffusion-v1-5"
        how = check_available(model, "model_index.json")
        on_gpu = device_name() == "cuda"
        dtype = torch.float16 if on_gpu else torch.float32
        draw = DiffusionPipeline.from_pretrained(
            **how,
            use_safetensors=True,
            safety_checker=None,  # its black squares would be data
            requires_safety_checker=False,
            dtype=dtype,
        )
        if on_gpu:
            memory = torch.cuda.get_device_properties(0).total_memory
            if memory < 6 * 2**30:
                draw.enable_attention_slicing()  # slower, and fits 4 GiB
        draw = draw.to(device_name())
        self.pipes = (draw, AutoPipelineForImage2Image.from_pipe(draw))
        for pipe in self.pipes:
            pipe.set_progress_bar_config(disable=True)
        self.tokenizer = draw.tokenizer
        self.max_tokens = draw.tokenizer.model_max_length  # 77
        super().__init__(f"stable-diffusion:{draw.name_or_path} {self.recipe}", encoder)
        if not encoder:
            self.see = None
            self.dim = 256 * draw.vae.config.latent_channels
            self.name = f"{self.name} latent"

    @classmethod
    def planned_dim(cls, argument, picture_encoder=None):
        """Return 1024, the numbers of its own latent, or the width of the picture encoder."""
        if not picture_encoder:
            return 1024
        return super().planned_dim(argument, picture_encoder)

    def picture(self, text, stage=0, **more):
        """Return what a stage of the recipe makes of the text: 0 an image, 1 its latent."""
        import torch
        seed = seeded_generator("stable-diffusion", text).integers(2**63)
        generator = torch.Generator().manual_seed(int(seed))
        pipe = self.pipes[stage]
        return pipe(text, generator=generator, **self.recipe[stage], **more).images[0]

    def encode(self, texts):
        if self.see:
            return super().encode(texts)
        vectors = []
        for text in texts:
            image = self.picture(text).resize((128, 128))
            latent = self.picture(text, 1, image=image)  # (4, 16, 16)
            vectors.append(latent.float().cpu().numpy().ravel())
        return np.stack(vectors)  # (N, d_e)


# ---- pictures that others make ----

def open_picture(file):
    """Return the RGB picture of a path or of bytes; OSError where it is not whole."""
    from PIL import Image
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    return Image.open(file).convert("RGB")


def check_picture(content):
    """Return the bytes of a picture as they are; one that was cut on its way raises OSError."""
    open_picture(content)
    return content


class Api(Pictures):
    """An OpenAI-compatible images endpoint, api:https://HOST/v1#model=NAME&size=512x512.

    What follows # are fields of each request. The key stands in OPENAI_API_KEY, goes to that host
    alone and is written nowhere.
    """

    def __init__(self, url, encoder):
        self.cache = None  # where bought pictures are kept: another encoder sees the same ones
        base, _, fields = url.partition("#")
        base = base.removesuffix("/").removesuffix("/images/generations")
        self.url = base + "/images/generations"
        self.fields = dict(urllib.parse.parse_qsl(fields))
        # White space is taken out, for urllib shows a header that holds a line break in its error.
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        is_private = re.match(r"https:|http://(localhost|127\.0\.0\.1)[:/]", self.url)
        if self.key and not is_private:
            raise UserError("http shows OPENAI_API_KEY to everyone on the way to "
                            f"{self.url}: use https")
        super().__init__(f"api:{url}", encoder)

    def picture(self, text):
        key = Cache.key(f"{self.url} {sorted(self.fields.items())}", text)
        content = None
        if self.cache:
            content = self.cache.get(key)
        if not content:
            content = self.ask(text)
            if self.cache:
                self.cache.put({key: content})
        return open_picture(content)

    def ask(self, text):
        """Return the bytes of the picture that the endpoint makes of the text, for money."""
        what = f"{self.url} on {text[:80]!r}"  # for messages
        body = {"n": 1, **self.fields, "prompt": text}
        request = urllib.request.Request(self.url, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if self.key:
            # An unredirected header does not follow a redirect to another host.
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")

        def buy():
            response = urllib.request.urlopen(request, timeout=120)
            answer = json.load(response)["data"][0]
            if answer.get("url"):
                return answer["url"]
            return check_picture(base64.b64decode(answer["b64_json"]))

        bought = retry(buy, what, self.key)  # the picture, or the address where it lies
        if isinstance(bought, bytes):
            return bought
        if not re.match("https?://", bought):  # urllib would open a file of ours, too
            raise UserError(f"{what}: the answer's url {bought[:80]!r} is not on the web")

        def fetch():
            response = urllib.request.urlopen(bought, timeout=120)
            return check_picture(response.read())

        return retry(fetch, what, self.key)


class ImageFolder(Pictures):
    """Pictures that anyone made, found by text or by row.

    FOLDER/manifest.jsonl has a line {"text": ..., "file": ...} for each of them, or
    {"split": "train", "index": 0, "file": ...} for row 0 of train.
    """

    def __init__(self, folder, encoder):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.jsonl"
        self.files = {}  # by text, or by (split, row)
        number = 0  # of the line that is read, for the message
        try:
            for line in self.manifest.read_text("utf-8-sig").rstrip("\n").split("\n"):
                number += 1
                self.read_line(json.loads(line))
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f'{self.manifest}:{number}: {error!r}: give each picture a line {{"text": ..., '
                '"file": ...} or {"split": "train", "index": 0, "file": ...}') from None
        super().__init__(f"images:{folder}", encoder)

    def read_line(self, line):
        """Note the file of one line of the manifest; any error where it leads to no such file."""
        file = (self.folder / line["file"]).resolve()
        if not file.is_relative_to(self.folder.resolve()) or not file.is_file():
            raise ValueError(f"{line['file']} is no file inside the folder")
        if "text" in line:
            self.files[line["text"]] = file
        else:
            self.files[line["split"], int(line["index"])] = file

    def items(self, split, texts):
        """Return the file of each text and its state: a replaced file is another picture."""
        files = []
        for row, text in enumerate(texts):
            files.append(self.files.get((split, row)) or self.files.get(text))
        if None in files:
            first = files.index(None)
            raise UserError(f"{self.manifest} lacks {files.count(None)} {split} texts, "
                            f"first row {first}, {texts[first][:80]!r}")
        items = []
        for file in files:
            state = file.stat()
            items.append(f"{file}\0{state.st_size} bytes of {state.st_mtime_ns}")
        return items

    def picture(self, item):
        """Return the picture of a text, or of what items() made of it."""
        file = self.files.get(item) or item.partition("\0")[0]
        try:
            return open_picture(file)
        except Exception as error:  # pillow has many kinds
            raise UserError(f"{file} is not a whole picture ({error})") from None


# ---- vectors that others made ----

class VectorFolder(Teacher):
    """Ready-made vectors: FOLDER/train.npy, dev.npy, row i for example i of the official file."""
    costly = False

    def __init__(self, folder):
        self.folder = Path(folder)
        self.name = "vectors:" + folder
        self.dim = self.open("train").shape[1]

    @classmethod
    def planned_dim(cls, argument, picture_encoder=None):
        """Return the width that the header of train.npy tells; UserError where there is none."""
        return cls(argument).dim

    def encode(self, texts):
        raise UserError(f"{self.name} holds vectors by row, not by text: "
                        "it has none for a new text")

    def open(self, split):
        """Return the array of a split, (rows, d_e), mapped and not read, or raise UserError."""
        path = self.folder / f"{split}.npy"
        try:
            # allow_pickle stays off: unpickling runs a stranger's code.
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            is_float_matrix = array.ndim == 2 and array.dtype.kind == "f" and array.size > 0
            fits = is_float_matrix and array.flags.c_contiguous
        except (OSError, ValueError, EOFError, AttributeError) as error:
            raise UserError(f"{path} is no readable array ({error}): "
                            "write it with numpy.save") from None
        if not fits:
            raise UserError(f"{path} holds {array.dtype} of shape {array.shape}: "
                            "expected floats, in C order")
        return array

    def reader(self, split, texts):
        array = self.open(split)
        wanted = (len(texts), self.dim)
        if array.shape != wanted:
            raise UserError(f"{array.filename} has shape {array.shape}, expected {wanted}: "
                            "one row an example")
        advice = f"mend {array.filename}"
        for start in range(0, len(texts), 4096):
            part = slice(start, start + 4096)
            check_vectors(array[part], self.name, self.dim, texts[part], advice)
        # Read, not mapped: the pages of a map count as this process's memory, after an epoch all.
        file = open(array.filename, "rb")
        begin = array.offset
        dtype = array.dtype
        row_bytes = self.dim * dtype.itemsize

        def read(rows):
            vectors = []
            for row in rows:
                content = os.pread(file.fileno(), row_bytes, begin + row * row_bytes)
                vectors.append(np.frombuffer(content, dtype))  # (d_e,)
            return vectors

        return read


# ---- a teacher from its spec ----

TEACHERS = {
    "painter": Painter,
    "clip": Clip,
    "stable-diffusion": StableDiffusion,
    "api": Api,
    "images": ImageFolder,
    "vectors": VectorFolder,
}


def split_spec(spec, names=TEACHERS, what="teacher"):
    """Return (names[NAME], ARGUMENT) of "NAME[:ARGUMENT]"; UserError suggests the nearest name.

    Nothing is built, so that a typo costs nothing.
    """
    name, _, argument = spec.partition(":")
    if name == "api":
        holds_key = re.search("(?i)(key|token)=", argument)
        is_address = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?(#.*)?", argument)
        if holds_key or not is_address:
            raise UserError("write api:https://HOST/v1#model=NAME&size=512x512; "
                            "a key into OPENAI_API_KEY")
    return names[known(name, names, what)], argument


def build_teacher(spec, picture_encoder=None):
    """Return the teacher of a spec "NAME[:ARGUMENT]" of TEACHERS; UserError says what is wrong.

    picture_encoder, one of ENCODERS likewise, is for teachers that draw: pixels by default, but
    stable-diffusion's own latent.
    """
    kind, argument = split_spec(spec)
    # A wrong encoder is told before anything is loaded.
    split_spec(picture_encoder or "pixels", ENCODERS, "--picture-encoder")
    arguments = [argument]
    if issubclass(kind, Pictures):
        arguments.append(picture_encoder)
    elif picture_encoder:
        raise UserError(f"--picture-encoder {picture_encoder}: {spec} gives no pictures; "
                        "leave it out")
    try:
        teacher = kind(*arguments)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        packages = "diffusers pillow" if error.name in ("diffusers", "PIL") else error.name
        raise UserError(f"{spec} needs {error.name}: pip install {packages}") from None
    except Exception as error:
        raise UserError(f"{spec} cannot be built: {kind.__name__}({argument!r}) raised "
                        f"{describe_error(error)}") from None
    check_interface(teacher, spec)
    return teacher


def check_interface(teacher, spec):
    """Raise a UserError that says what a teacher lacks of the interface (see Teacher)."""
    who = f"{spec}: {type(teacher).__name__}"
    if not isinstance(teacher, Teacher):
        raise UserError(f"{who} is no subclass of Teacher: make it one")
    name = teacher.name
    dim = teacher.dim
    if not isinstance(name, str) or not name:
        raise UserError(f"{who} has the name {name!r}: let __init__ set self.name to a text with "
                        "every argument that changes a vector")
    if type(dim) is not int or dim < 1:  # a numpy int64 could not be written as json
        raise UserError(f"{who} has dim {dim!r}: set it to the width of a vector, a positive int")
    if not hasattr(teacher, "encode"):
        raise UserError(f"{who} has no encode(texts): let it return a float32 array (N, {dim})")
    if not teacher.costly and not hasattr(teacher, "reader"):
        raise UserError(f"{who} has costly = False and no reader(split, texts): "
                        "write one, or leave costly out")
    if teacher.tokenizer and not teacher.max_tokens:
        raise UserError(f"{who} has a tokenizer and no max_tokens: give it both or neither")


# ---- from a teacher to the vectors of a task ----

class Cache:
    """Vectors and bought pictures on disk.

    The file is sqlite in WAL mode, which survives a kill and takes two writers.
    """

    def __init__(self, folder):
        self.path = Path(folder) / "teachers.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        with FileLock(f"{self.path}.lock"):  # sqlite does not wait in the switch to WAL
            self.sql("PRAGMA journal_mode=WAL")
            self.sql("CREATE TABLE IF NOT EXISTS made (key INTEGER PRIMARY KEY, crc, value BLOB)")

    def sql(self, command, values=()):
        """Return all rows that a command gives."""
        try:
            return self.db.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {error}; if damaged, delete it: "
                            "all is made anew") from None

    @staticmethod
    def key(name, item):
        """Return 64 bits that stand for a teacher's name and an item.

        Among a million entries two share a key with a chance under one in ten million.
        """
        digest = hashlib.sha256(f"{name}\0{item}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def keys(self):
        """Return the keys of all entries, int64 (entries,)."""
        rows = self.sql("SELECT key FROM made")
        return np.array(rows, np.int64).reshape(-1)

    def get(self, key):
        """Return the bytes, or None where there are none. Damaged ones are thrown away."""
        rows = self.sql("SELECT value, crc FROM made WHERE key = ?", (int(key),))
        if not rows:
            return None
        value, crc = rows[0]
        if zlib.crc32(value) == crc:
            return value
        self.sql("DELETE FROM made WHERE key = ?", (int(key),))
        return None

    def put(self, entries):
        """Write all entries {key: bytes} or, after a kill in the middle, none of them."""
        self.sql("BEGIN IMMEDIATE")
        for key, value in entries.items():
            row = (int(key), zlib.crc32(value), value)
            self.sql("INSERT OR REPLACE INTO made VALUES (?, ?, ?)", row)
        self.sql("COMMIT")

    def reader(self, keys, name, dim):
        """Return the function rows -> their vectors, a list of (d_e,); all nan for a lost one.

        A vector that is whole but of another width was made by other code of the teacher `name`:
        starting once more would not mend that, so the UserError asks for a new name.
        """
        lost = np.full(dim, np.nan, np.float32)

        def read(rows):
            vectors = []
            for row in rows:
                content = self.get(keys[row])
                vector = np.frombuffer(content, np.float32) if content else lost
                if len(vector) != dim:
                    raise UserError(f"{self.path} holds vectors of {len(vector)} numbers, not "
                                    f"{dim}, by the name {name!r}: changed code wants a new name")
                vectors.append(vector)
            return vectors

        return read


def open_vectors(teacher, task, examples, cache_dir, limit=None, most=None, eval_limit=None):
    """Return ({split: the function rows -> float32 (n, d_e)}, how many vectors were made now).

    MNLI's vectors are 1.6 GB, so they are read a batch at a time. A costly teacher is not asked for
    texts beyond the first `limit` of train and `eval_limit` of dev, nor for more than `most`
    vectors in all. Raises UserError where a vector cannot be had, now or when a function is called.
    """
    texts = {}
    for split in ("train", "dev"):
        texts[split] = [task.prompt(example) for example in examples[split]]
    train_count = len(texts["train"][:limit])
    if teacher.costly:
        wanted = {"train": texts["train"][:limit], "dev": texts["dev"][:eval_limit]}
        readers, made = make_and_keep(teacher, wanted, cache_dir, most)
        advice = "start once more"  # the entry was lost or damaged since, and will be made again
    else:
        readers = {split: teacher.reader(split, texts[split]) for split in texts}
        made = 0
        advice = None
    # The function below holds name and width, not the teacher: its model would stay on the GPU.
    name = teacher.name
    dim = teacher.dim

    def read(split, rows):
        places = [examples[split][row].where for row in rows]
        return ask(readers[split], rows, places, name, dim, advice)  # (n, d_e)

    # By the training rows' root mean square (of 6,000 at most), not centred: so beta means the same
    # for every teacher.
    sample = read("train", range(0, train_count, 1 + train_count // 6000))
    mean_square = np.einsum("ij,ij->", sample, sample, dtype=float) / sample.size
    scale = np.float32(np.sqrt(mean_square) or 1)  # 1 where all vectors are zero

    def read_scaled(split, rows):
        return read(split, rows) / scale  # (n, d_e)

    return {split: functools.partial(read_scaled, split) for split in texts}, made


def make_and_keep(teacher, texts, cache_dir, most):
    """Return ({split: the function rows -> vectors}, how many were made) of a costly teacher."""
    cache = Cache(cache_dir)
    teacher.cache = cache  # in which a teacher may keep what it buys on the way
    train_items = teacher.items("train", texts["train"])
    dev_items = teacher.items("dev", texts["dev"])
    items = train_items + dev_items
    keys = np.array([Cache.key(teacher.name, item) for item in items], np.int64)
    made = fill(teacher, items, keys, cache, most)
    train_count = len(train_items)
    readers = {
        "train": cache.reader(keys[:train_count], teacher.name, teacher.dim),
        "dev": cache.reader(keys[train_count:], teacher.name, teacher.dim),
    }
    return readers, made


def fill(teacher, items, keys, cache, most=None):
    """Ask a costly teacher for what the cache lacks, and return how many vectors were made.

    Each different item is asked for once, `most` at most; keys[i] is the key of items[i]. Of two
    processes that ask the same teacher the second waits, so that nothing is bought twice.
    """
    # The name without fields and picture encoder: all encoders look at the same bought pictures.
    family = re.split("[ #]", teacher.name)[0]
    with FileLock(f"{cache.path}.{Cache.key(family, '')}.lock"):
        drop_damaged(cache, keys)
        missing = find_missing(cache, keys)
        wanted = missing[:most]
        tell_cut_texts(teacher, [items[row] for row in wanted])
        make_missing(teacher, items, keys, cache, wanted)
    if len(wanted) < len(missing):
        left = len(missing) - len(wanted)
        raise UserError(f"--max-pictures {most} are made, {left} to go: type the same again")
    return len(wanted)


def drop_damaged(cache, keys):
    """Throw damaged entries away. Of MNLI's 400,000 not all are read: that would take 20 s."""
    step = 1 + len(keys) // 10_000
    for key in keys[::step]:
        cache.get(key)  # throws a damaged one away


def find_missing(cache, keys):
    """Return the rows whose keys the cache lacks, one row for each different key."""
    rows_by_key = {}
    for row in np.flatnonzero(~np.isin(keys, cache.keys())):
        rows_by_key.setdefault(keys[row], row)
    return list(rows_by_key.values())


def tell_cut_texts(teacher, texts):
    """Say on stderr how many texts are longer than what the teacher reads of them."""
    if not teacher.tokenizer:
        return
    lengths = [len(teacher.tokenizer(text)["input_ids"]) for text in texts]
    cut = sum(length > teacher.max_tokens for length in lengths)
    if cut:
        print(f"{teacher.name}: {cut} of {len(texts)} texts are too long for it and cut",
              file=sys.stderr)


def make_missing(teacher, items, keys, cache, rows):
    """Make the vectors of some rows, a piece at a time, and store each piece once it is whole."""
    step = teacher.at_once
    starts = range(0, len(rows), step)
    for start in tqdm(starts, desc=teacher.name, unit_scale=step, disable=None):
        piece = rows[start:start + step]
        asked = [items[row] for row in piece]
        vectors = ask(teacher.encode, asked, asked, teacher.name, teacher.dim)  # (n, d_e)
        entries = {}
        for row, vector in zip(piece, vectors):
            entries[keys[row]] = vector.tobytes()
        cache.put(entries)


# ---- every vector is checked ----

def ask(function, inputs, labels, name, dim, advice=None):
    """Return function(inputs), an encode or reader of the teacher `name`, as float32 (n, d_e).

    Where it raises, or returns anything but n finite vectors, a UserError names the teacher and the
    label of the first input that is concerned. `advice` takes the place of what was returned.
    """

    def call(some):
        returned = function(some)
        if returned is None:
            raise TypeError(f"it returned None; required is float32 of shape ({len(some)}, {dim})")
        return [np.asarray(vector) for vector in returned]

    try:
        vectors = call(inputs)
    except UserError:
        raise
    except Exception as error:
        culprit = find_culprit(call, inputs, labels)
        raise UserError(f"{name} failed on {culprit}: {describe_error(error)}") from None
    if len(vectors) != len(labels):
        raise UserError(f"{name} returned {len(vectors)} vectors for {len(labels)} texts: "
                        f"required is float32 of shape ({len(labels)}, {dim})")
    return check_vectors(vectors, name, dim, labels, advice)


def find_culprit(call, inputs, labels):
    """Return, in words, on which of its inputs a call failed.

    Each is given once more, alone, until one fails. A teacher that draws or buys is never asked
    twice: it is given one text at a time.
    """
    if len(labels) == 1:
        return repr(labels[0][:80])
    for one, label in zip(inputs, labels):
        try:
            call([one])
        except Exception:
            return repr(label[:80])
    return f"{labels[0][:80]!r} and the {len(labels) - 1} after it together, on none of them alone"


def check_vectors(vectors, name, dim, labels, advice=None):
    """Return n vectors as float32 (n, d_e) if each is whole; else a UserError names the first label
    whose vector is not, and says what was returned or, in its place, the advice."""
    # DEVIATION: in the authors' code a missing vector becomes zeros, a picture that nobody made.
    for vector, label in zip(vectors, labels):
        fault = find_fault(vector, dim)
        if fault:
            raise UserError(f"{name} has no finite vector of {dim} for {label[:80]!r}: "
                            f"{advice or fault}")
    return np.array(vectors, np.float32)


def find_fault(vector, dim):
    """Return, in words, why these are not `dim` finite numbers that float32 can hold; else None."""
    required = f"required is float32 of shape ({dim},)"
    if vector.shape != (dim,) or vector.dtype.kind not in "fiu":
        return f"it returned {vector.dtype} of shape {vector.shape}; {required}"
    if not float(np.abs(vector).max()) < 3e38:  # nan is not under it either
        return f"it returned nan, inf or a number out of range; {required}, all of it finite"
    return None


def describe_error(error):
    """Return an exception's kind and words on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


# ---- the command line ----

def make_parser():
    """Return the parser of the command line."""
    parser = Parser(prog="teacher.py", allow_abbrev=False,
                    description="Make a teacher's vectors ahead of training, or check the cache.")
    parser.add_argument("--task", metavar="NAME",
                        help="Task whose train and dev texts the teacher gets.")
    parser.add_argument("--teacher", metavar="SPEC", default="clip",
                        help=f"NAME[:ARGUMENT], NAME one of {', '.join(TEACHERS)}; default: clip.")
    parser.add_argument("--picture-encoder", metavar="SPEC",
                        help="What looks at pictures: pixels, clip[:MODEL] or vae[:MODEL].")
    parser.add_argument("--data-dir", metavar="FOLDER",
                        help="Folder with the official files, as in train.py.")
    parser.add_argument("--cache-dir", metavar="FOLDER", default=CACHE,
                        help="Folder for downloads and vectors.")
    parser.add_argument("--limit", metavar="N", type=int,
                        help="Use only the first N training texts; default: all of them.")
    parser.add_argument("--max-pictures", metavar="N", type=int,
                        help="Make at most N vectors, then stop; default: all of them.")
    parser.add_argument("--verify", action="store_true",
                        help="Read every entry of the cache and throw damaged ones away.")
    parser.add_argument("--offline", action="store_true", help="Use no network.")
    return parser


def verify_cache(cache_dir):
    """Read every entry of the cache, throw damaged ones away and say how many there were."""
    cache = Cache(cache_dir)
    damaged = 0
    for key in cache.keys():
        if cache.get(key) is None:
            damaged += 1
    print(f"{cache.path}: {len(cache.keys())} entries are whole; thrown away as damaged: {damaged}")


def make_ahead(args):
    """Make the vectors of a task and say how many there are."""
    task = find_task(args.task)
    examples = load_task(args.task, args.data_dir, args.cache_dir)
    teacher = build_teacher(args.teacher, args.picture_encoder)
    began = time.perf_counter()
    _, made = open_vectors(teacher, task, examples, args.cache_dir, args.limit, args.max_pictures)
    seconds = time.perf_counter() - began
    count = len(examples["train"][:args.limit]) + len(examples["dev"])
    megabytes = 4e-6 * count * teacher.dim
    print(f"{teacher.name}: {count} vectors of {teacher.dim} numbers, {megabytes:.1f} MB; "
          f"{made} made now, in {seconds:.1f} s")


def main(argv=None):
    """Run the command line: status 0, or 2 and one line on stderr."""
    parser = make_parser()
    args = parser.parse_args(argv)
    too_few = args.limit is not None and args.limit < 1
    negative = args.max_pictures is not None and args.max_pictures < 0
    if not (args.task or args.verify) or too_few or negative:
        parser.error("give --task or --verify, --limit at least 1, --max-pictures at least 0")
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        if args.verify:
            verify_cache(args.cache_dir)
        if args.task:
            make_ahead(args)
    except (UserError, OSError, ValueError, KeyboardInterrupt) as error:
        message = str(error) or "stopped; the same command goes on"
        parser.exit(2, f"teacher.py: error: {message}\n")


if __name__ == "__main__":
    main()
