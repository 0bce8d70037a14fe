"""Black-box teachers: text in, vector out; nothing of a teacher is trained or opened.

    teacher = build_teacher("painter")                   # "NAME[:ARGUMENT]" of TEACHERS
    teacher.encode(["is a mouse bigger than a piano?"])  # float32 array (N, teacher.dim)
    python teacher.py --task rte --teacher stable-diffusion   # make vectors ahead of training

Shapes: N texts; d_e = teacher.dim, the width of one vector e = E(x), where x is all the text of an
example. A vector depends on its text alone, so each is made once and kept in a cache.

To add a teacher, write a subclass of Teacher and give it a line in TEACHERS, then one in OFFLINE of
tests/test_teacher.py, which tests that it keeps the contract below.
"""
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import sqlite3
import sys
import threading
import time
import urllib.parse
import urllib.request
import warnings
import zlib
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data import (
    CACHE,
    OBJECTS,
    STOPPED,
    Parser,
    UserError,
    check_available,
    check_text,
    exit_with_message,
    explain_loading,
    find_task,
    known,
    load_task,
    load_tokenizer,
    one_line,
    parse_json,
    prepare_console,
    retry,
    shorten_text,
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
    text = "\0".join(parts)
    check_text(text, f"the text {parts[-1]!r:.80}")
    digest = hashlib.sha256(text.encode()).digest()
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
        for text in texts:
            check_text(text, f"the text {text!r:.80}")
        vectors = np.zeros((len(texts), self.dim), np.float32)  # (N, d_e)
        for start in range(0, len(texts), 64):
            part = slice(start, start + 64)
            batch = self.tokenizer(texts[part], padding=True, truncation=True,
                                   max_length=self.max_tokens, return_tensors="pt")
            with fixed_arithmetic():
                output = self.model(**batch.to(self.model.device))
            vectors[part] = output.text_embeds.cpu().numpy()  # (n, d_e)
        return vectors


# ---- the method ends here; below is bookkeeping ----


# ---- models that see or draw ----

def device_name():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def fixed_arithmetic():
    """Within, a GPU computes in one way, whatever the program around it has chosen.

    train.py allows TF32, in which a vector would differ by a thousandth from the one that
    teacher.py makes ahead, and a program may let cuDNN take whichever kernel was fastest just now.
    Two kinds of GPU, or two versions of PyTorch, still round differently: the cache keeps what came
    first.
    """
    import torch
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.deterministic
    torch.set_float32_matmul_precision("highest")
    cudnn.benchmark = False
    cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.benchmark = before[1]
        cudnn.deterministic = before[2]


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
        with fixed_arithmetic():
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
        with fixed_arithmetic():
            latent = model.encode(image).latent_dist.mode()    # (1, 4, 16, 16)
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
    sets name and dim, and has picture(text), which returns a PIL image of any mode.
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
        vectors = [self.see(show_on_white(self.picture(text))) for text in texts]
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
        # Each picture gets a scheduler as it was loaded. On a GPU the first text of a process had
        # another vector than ever after. Very likely, though nobody has seen it happen, since image
        # to image puts the scheduler's table of noise levels on the GPU (add_noise of diffusers),
        # and a number from there is rounded to the picture's float16 before they are multiplied,
        # while a number from the CPU is not.
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
        with fixed_arithmetic():
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


# ---- a picture of any mode, as a person would see it ----

# What turns a picture upright, by its EXIF orientation: a camera stores how it was held.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def open_picture(file):
    """Return the picture of a path or of bytes: RGB, upright, on white; of several its first frame.

    Any error where it is not whole, or so large that pillow takes it for an attack.
    """
    from PIL import Image
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    # Pillow warns of what it shows all the same: a large picture, damaged EXIF data.
    with warnings.catch_warnings(action="ignore"), Image.open(file) as picture:
        picture.load()  # first, for it turns a TIFF upright and takes its orientation away
        turn = None
        with contextlib.suppress(Exception):  # damaged EXIF data are no reason to refuse a picture
            turn = TURNS.get(picture.getexif().get(0x0112))
        if turn:
            picture = picture.transpose(Image.Transpose[turn])
        return show_on_white(picture)


def show_on_white(picture):
    """Return a PIL image of any mode as RGB: white paper shows where it is transparent."""
    from PIL import Image
    if picture.mode.startswith(("I", "F")):
        picture = shade_numbers(picture)
    if picture.mode == "La":  # grey with premultiplied transparency: pillow knows one way only
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB")


def shade_numbers(picture):
    """Return a picture of 16-bit or 32-bit numbers or floats in 256 shades of grey.

    Pillow itself would turn all above 255 white. White is 65535 where a pixel has 16 bits; else the
    first of 1, 255, 65535, 2^32 - 1 that no pixel exceeds. Black is 0, or minus white where a pixel
    is negative.
    """
    from PIL import Image
    numbers = np.asarray(picture).astype(float)  # (height, width)
    if not np.isfinite(numbers).all():
        raise ValueError("it has pixels of nan or inf")
    highest = np.abs(numbers).max()
    whites = [1, 255, 65535, 2**32 - 1, highest]
    if picture.mode.startswith("I;16"):
        whites = [65535]
    white = next(limit for limit in whites if highest <= limit)
    black = 0
    if numbers.min() < 0:
        black = -white
    shades = 255 * (numbers - black) / (white - black)
    shades[numbers == picture.info.get("transparency")] = 255  # a PNG's one transparent number
    return Image.fromarray(np.rint(shades).astype(np.uint8))


# ---- pictures that others make ----

ANSWER_BYTES = 64 * 2**20  # the largest answer of a web server that is read
ANSWER_SECONDS = 600       # how long one answer may take, which trickles in
USER_AGENT = "armada-teacher"  # some providers refuse Python's own


class Api(Pictures):
    """An OpenAI-compatible images endpoint, api:https://HOST/v1#model=NAME&size=512x512.

    What follows # are fields of each request, sent as JSON values where they are such: steps=4 is a
    number, seed="4" a text. An address may have a query, https://HOST/v1?version=2#model=NAME. The
    key stands in OPENAI_API_KEY, goes to that host alone and is written nowhere.
    """

    def __init__(self, url, encoder):
        self.cache = None  # where bought pictures are kept: another encoder sees the same ones
        address, _, fields = url.partition("#")
        base, mark, query = address.partition("?")
        base = base.removesuffix("/").removesuffix("/images/generations")
        self.url = base + "/images/generations" + mark + query
        self.fields = {}
        for name, text in urllib.parse.parse_qsl(fields):
            self.fields[name] = value_of_field(text)
        # White space is taken out, for urllib shows a header that holds a line break in its error.
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        if not re.fullmatch("[!-~]*", self.key):
            raise UserError("OPENAI_API_KEY holds signs that stand in no key: copy it once more")
        is_private = re.match(r"https:|http://(localhost|127\.0\.0\.1|\[::1\])[:/]", self.url)
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
        answer = self.fetch(request, what, json.loads)
        with self.explain_answer(answer, what):
            address = find_address(json.loads(answer))
            if re.match("(?i)data:", address):
                content = urllib.request.urlopen(address).read()  # no network: it is all there
                open_picture(content)
                return content
        if not re.fullmatch("(?i)https?://[!-~]+", address):  # urllib would open files of ours, too
            raise UserError(f"{what}: the answer's url {address[:80]!r} is not on the web")
        content = self.fetch(urllib.request.Request(address), what, open_picture)
        with self.explain_answer(content, what):
            open_picture(content)
        return content

    def fetch(self, request, what, parse):
        """Return a complete answer, bytes, asked for again only where that may help."""
        request.add_header("User-Agent", USER_AGENT)
        content, fault = retry(lambda: read_answer(request, parse), what, self.key)
        if fault:
            raise UserError(f"{what}: the answer {fault}")
        return content

    @contextlib.contextmanager
    def explain_answer(self, content, what):
        """Turn any error into a UserError: the server's own words, which hold no picture.

        The answer is complete and paid for: to ask again would be to pay again.
        """
        try:
            yield
        except Exception:  # of many kinds, from json, urllib and pillow
            words = content.decode(errors="replace")
            if self.key:
                words = words.replace(self.key, "***")  # before the cut, which could leave half
            words = shorten_text(words, 300) or "it is empty"
            raise UserError(f"{what}: the answer holds no picture: {words}") from None


def value_of_field(text):
    """Return what JSON means by a text (4, true, "4"), or the text itself where it is no JSON."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)  # ValueError: json.loads reads NaN, which is no JSON
        return value
    except (ValueError, RecursionError):
        return text


def find_address(answer):
    """Return the http(s): or data: address of the picture in an endpoint's answer, or raise."""
    picture = answer["data"][0]
    url = picture.get("url")
    if isinstance(url, str) and url:
        return url
    encoded = picture["b64_json"]
    if encoded.startswith("data:"):
        return encoded
    return f"data:;base64,{encoded}"


def read_answer(request, parse):
    """Return (bytes of a web server's answer, None), or (None, why to ask again would not help).

    Raises an error, after which one may ask again, where the answer was cut on its way. Where its
    length was not announced that shows only in parse(bytes), which raises what it likes.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    content = bytearray()
    with urllib.request.urlopen(request, timeout=120) as response:
        # read() would wait for whole blocks, and each byte of a trickling answer starts the
        # timeout anew.
        while block := response.read1(1 << 16):
            content += block
            if len(content) > ANSWER_BYTES:
                return None, f"is over {ANSWER_BYTES / 2**20:g} MiB long"
            if time.monotonic() > deadline:
                return None, f"was not complete after {ANSWER_SECONDS} seconds"
        if response.length:
            raise OSError(f"the answer was cut: {response.length} bytes did not come")
        if response.length is None and not response.chunked:
            parse(bytes(content))
    return bytes(content), None


class ImageFolder(Pictures):
    """Pictures that anyone made, found by text or by row.

    FOLDER/manifest.jsonl has a line {"text": ..., "file": ...} for each of them, or
    {"split": "train", "index": 0, "file": ...} for row 0 of train.
    """
    form = ('give each picture a line {"text": ..., "file": ...} or '
            '{"split": "train", "index": 0, "file": ...}')

    def __init__(self, folder, encoder):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.jsonl"
        self.files = {}  # by text, or by (split, row)
        try:
            lines = self.manifest.read_text("utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.manifest} cannot be read ({error}): {self.form}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                self.read_line(line, f"{self.manifest}:{number}")
        super().__init__(f"images:{folder}", encoder)

    def read_line(self, line, where):
        """Note the file of one line of the manifest; UserError where it leads to no such file."""
        row = parse_json(line, where, hint=self.form)
        try:
            file = (self.folder / row["file"]).resolve()
            is_inside = file.is_relative_to(self.folder.resolve()) and file.is_file()
        except Exception:  # "file" may be missing, a number, a text that no file can be called
            is_inside = False
        if not is_inside:
            raise UserError(f"{where}: {row.get('file')!r:.80} is no file inside the folder: "
                            f"{self.form}")
        text = row.get("text")
        split = row.get("split")
        index = row.get("index")
        if isinstance(text, str):
            self.files[text] = file
        elif "text" not in row and isinstance(split, str) and type(index) is int:
            self.files[split, index] = file
        else:
            raise UserError(f"{where} names neither a text nor a split and an index: {self.form}")

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
            raise UserError(f"{file} is not a whole picture ({describe_error(error)})") from None


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
            with warnings.catch_warnings(action="ignore"):  # of a header that Python 2 wrote
                # allow_pickle stays off: unpickling runs a stranger's code.
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            is_float_matrix = array.ndim == 2 and array.dtype.kind == "f" and array.size > 0
            fits = is_float_matrix and array.flags.c_contiguous
        except Exception as error:  # numpy parses the header as Python and raises a dozen kinds
            raise UserError(f"{path} is no readable array ({describe_error(error)}): "
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
        self.check_rows(array, texts)
        # Read, not mapped: the pages of a map count as this process's memory, after an epoch all.
        file = open(array.filename, "rb")
        begin = array.offset
        dtype = array.dtype
        row_bytes = self.dim * dtype.itemsize
        lock = threading.Lock()  # held from seek to read; os.pread needs none, but Windows lacks it

        def read(rows):
            vectors = []
            for row in rows:
                with lock:
                    file.seek(begin + row * row_bytes)
                    content = file.read(row_bytes)
                vectors.append(np.frombuffer(content, dtype))  # (d_e,)
            return vectors

        return read

    def check_rows(self, array, texts):
        """Raise a UserError that names the first row of an array that float32 cannot hold."""
        for start in range(0, len(texts), 4096):
            part = array[start:start + 4096]  # (n, d_e)
            with np.errstate(over="ignore"):  # of a long double
                largest = np.abs(part).max(1).astype(float)  # (n,)
            bad = np.flatnonzero(~(largest < LARGEST))  # nan is not under it either
            if len(bad):
                row = start + bad[0]
                raise UserError(f"{self.name} has no finite vector of {self.dim} for "
                                f"{texts[row][:80]!r}: mend {array.filename}, whose row {row} "
                                "(the first is 0) holds nan, inf or a number out of range")


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
    if name == "api" and not is_api_address(argument):
        raise UserError("write api:https://HOST/v1#model=NAME&size=512x512; "
                        "a key into OPENAI_API_KEY")
    return names[known(name, names, what)], argument


def is_api_address(text):
    """Return whether this is http(s)://HOST[:PORT][/PATH][?QUERY][#FIELDS] without a secret."""
    address, _, _ = text.partition("#")
    host = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?"  # a name and password@ are none
    if not re.fullmatch(rf"https?://{host}([/?][!-~]*)?", address):
        return False
    spelled = urllib.parse.unquote(text)
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
    holds_key = len(key) >= 8 and key in spelled  # a local server's key may be "none"
    secret = r"(key|token|secret|passw(or)?d|pwd|auth(orization)?|credentials?|sig(nature)?)\s*="
    return not holds_key and not re.search(rf"(?i){secret}", spelled)


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
        with self.explain_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        with self.explain_errors(), FileLock(f"{self.path}.lock"):
            # sqlite itself does not wait in the switch to WAL.
            self.sql("PRAGMA journal_mode=WAL")
            self.sql("CREATE TABLE IF NOT EXISTS made (key INTEGER PRIMARY KEY, crc, value BLOB)")
        columns = self.sql("SELECT name, type, pk FROM pragma_table_info('made')")
        if columns != [("key", "INTEGER", 1), ("crc", "", 0), ("value", "BLOB", 0)]:
            raise UserError(f"{self.path} is of another program, for its table 'made' has other "
                            "columns: give another --cache-dir")

    @contextlib.contextmanager
    def explain_errors(self):
        """Turn the errors of sqlite and of the folder into a UserError that names the file."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{self.path}: {error}; if damaged, delete it: all is made anew; "
                            "or give another --cache-dir") from None

    def sql(self, command, values=()):
        """Return all rows that a command gives."""
        with self.explain_errors():
            return self.db.execute(command, values).fetchall()

    @staticmethod
    def key(name, item):
        """Return 64 bits that stand for a teacher's name and an item.

        Among a million entries two share a key with a chance under one in ten million.
        """
        text = f"{name}\0{item}"
        check_text(text, f"{name}: {item!r:.80}")
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def keys(self):
        """Return the keys of all entries, int64 (entries,)."""
        rows = self.sql("SELECT key FROM made")
        return np.array(rows, np.int64).reshape(-1)

    def get(self, key):
        """Return the bytes, or None where there are none. Damaged ones are thrown away."""
        # sqlite keeps a text or a number in any column: the casts make bytes and ints of them.
        command = "SELECT CAST(value AS BLOB), CAST(crc AS INTEGER) FROM made WHERE key = ?"
        rows = self.sql(command, (int(key),))
        if not rows:
            return None
        value, crc = rows[0]
        if value and zlib.crc32(value) == crc:  # of nothing at all the sum would be right, too
            return value
        self.sql("DELETE FROM made WHERE key = ?", (int(key),))
        return None

    def put(self, entries):
        """Write all entries {key: bytes} or, after a kill or an error in the middle, none."""
        with self.db:  # rolls back what an error leaves open
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
    wanted = {"train": texts["train"][:limit], "dev": texts["dev"][:eval_limit]}
    if teacher.costly:
        readers, made = make_and_keep(teacher, wanted, cache_dir, most)
        advice = "start once more"  # the entry was lost or damaged since, and will be made again
    else:
        readers = {}
        for split in texts:
            with explain_teacher(teacher, f"reader({split!r}, texts)"):
                readers[split] = teacher.reader(split, texts[split])
        made = 0
        advice = None
    # The function below holds name and width, not the teacher: its model would stay on the GPU.
    name = teacher.name
    dim = teacher.dim

    def places(split, rows):
        return [examples[split][row].where for row in rows]

    def read(split, rows):
        return ask(readers[split], rows, places(split, rows), name, dim, advice)  # (n, d_e)

    # By the training rows' root mean square (of 6,000 at most), not centred: so beta means the same
    # for every teacher.
    sample_rows = spread_rows(wanted["train"])
    sample = read("train", sample_rows)
    mean_square = np.einsum("ij,ij->", sample, sample, dtype=float) / sample.size
    scale = np.float32(np.sqrt(mean_square) or 1)  # 1 where all vectors are zero

    def read_scaled(split, rows):
        return divide(read(split, rows), scale, name, places(split, rows))  # (n, d_e)

    # Vectors out of scale are told here, before hours of training, if these rows show them.
    divide(sample, scale, name, places("train", sample_rows))
    read_scaled("dev", spread_rows(wanted["dev"]))
    return {split: functools.partial(read_scaled, split) for split in texts}, made


def spread_rows(texts):
    """Return at most 6,000 rows of a split, evenly spread."""
    return range(0, len(texts), 1 + len(texts) // 6000)


def divide(vectors, scale, name, labels):
    """Return vectors / scale, float32 (n, d_e), each of them finite and, unless it was 0, not 0.

    A UserError names the first label whose vector is so far out of scale (18 orders of magnitude)
    that its squares, which the losses take, would be inf or 0.
    """
    with np.errstate(all="ignore"):
        scaled = vectors / scale             # (n, d_e)
    largest = np.abs(scaled).max(1)          # (n,)
    is_zero = ~vectors.any(1)                # (n,)
    fits = (largest < 1e18) & ((largest > 1e-18) | is_zero)
    if not fits.all():
        worst = np.argmin(fits)  # the first that does not fit
        raise UserError(f"{name} has a vector for {labels[worst][:80]!r} whose largest number is "
                        f"{np.abs(vectors[worst]).max():.3g}, out of scale beside the root mean "
                        f"square of the training vectors, {scale:.3g}: mend it or them")
    return scaled


@contextlib.contextmanager
def explain_teacher(teacher, call):
    """Turn whatever a method of a teacher raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{teacher.name}: its {call} raised {describe_error(error)}") from None


def make_and_keep(teacher, texts, cache_dir, most):
    """Return ({split: the function rows -> vectors}, how many were made) of a costly teacher."""
    cache = Cache(cache_dir)
    teacher.cache = cache  # in which a teacher may keep what it buys on the way
    train_items = items_of(teacher, "train", texts["train"])
    dev_items = items_of(teacher, "dev", texts["dev"])
    items = train_items + dev_items
    keys = np.array([Cache.key(teacher.name, item) for item in items], np.int64)
    made = fill(teacher, items, keys, cache, most)
    train_count = len(train_items)
    readers = {
        "train": cache.reader(keys[:train_count], teacher.name, teacher.dim),
        "dev": cache.reader(keys[train_count:], teacher.name, teacher.dim),
    }
    return readers, made


def items_of(teacher, split, texts):
    """Return teacher.items() as a list; UserError where there is not one for each text."""
    with explain_teacher(teacher, f"items({split!r}, texts)"):
        items = list(teacher.items(split, texts))
    if len(items) != len(texts):
        raise UserError(f"{teacher.name}: its items({split!r}, texts) returned {len(items)} items "
                        f"for {len(texts)} texts: let it return one for each")
    return items


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
    with explain_teacher(teacher, "tokenizer"):
        lengths = [len(teacher.tokenizer(text)["input_ids"]) for text in texts]
    cut = sum(length > teacher.max_tokens for length in lengths)
    if cut:
        print(one_line(f"{teacher.name}: {cut} of {len(texts)} texts are too long for it and cut"),
              file=sys.stderr)


def make_missing(teacher, items, keys, cache, rows):
    """Make the vectors of some rows, a piece at a time, and store each piece once it is whole."""
    step = teacher.at_once
    starts = range(0, len(rows), step)
    for start in tqdm(starts, desc=one_line(teacher.name), unit_scale=step, disable=None):
        piece = rows[start:start + step]
        asked = [items[row] for row in piece]
        vectors = ask(teacher.encode, asked, asked, teacher.name, teacher.dim)  # (n, d_e)
        entries = {}
        for row, vector in zip(piece, vectors):
            entries[keys[row]] = vector.tobytes()
        cache.put(entries)


# ---- every vector is checked ----

LARGEST = 3e38  # a little under the largest float32


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
    return np.array(vectors, np.float32).reshape(-1, dim)  # also for n = 0


def find_fault(vector, dim):
    """Return, in words, why these are not `dim` finite numbers that float32 can hold; else None."""
    required = f"required is float32 of shape ({dim},)"
    if vector.shape != (dim,) or vector.dtype.kind not in "fiu":
        return f"it returned {vector.dtype} of shape {vector.shape}; {required}"
    if not float(np.abs(vector).max()) < LARGEST:  # nan is not under it either
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
                        help="Use only the first N training texts, with a label or without; "
                             "default: as many as train.py.")
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
    print(one_line(f"{cache.path}: {len(cache.keys())} entries are whole; "
                   f"thrown away as damaged: {damaged}"))


def make_ahead(args):
    """Make the vectors of a task and say how many there are."""
    task = find_task(args.task)
    examples = load_task(args.task, args.data_dir, args.cache_dir)
    teacher = build_teacher(args.teacher, args.picture_encoder)
    began = time.perf_counter()
    limit = args.limit or task.defaults.get("limit")
    _, made = open_vectors(teacher, task, examples, args.cache_dir, limit, args.max_pictures)
    seconds = time.perf_counter() - began
    count = len(examples["train"][:limit]) + len(examples["dev"])
    megabytes = 4e-6 * count * teacher.dim
    print(one_line(f"{teacher.name}: {count} vectors of {teacher.dim} numbers, {megabytes:.1f} MB; "
                   f"{made} made now, in {seconds:.1f} s"))


def main(argv=None):
    """Run the command line: status 0, or 2 and one line on stderr."""
    prepare_console()
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
    except (UserError, OSError, ValueError) as error:
        exit_with_message(2, f"teacher.py: error: {error}")
    except KeyboardInterrupt:
        exit_with_message(STOPPED, "stopped; the same command goes on")


if __name__ == "__main__":
    main()
