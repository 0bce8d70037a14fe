"""Black-box teachers and the vectors they leave. Read beside teacher.py.

A teacher of your own goes into OFFLINE below, as it went into teacher.TEACHERS; then
`python -m pytest tests/test_teacher.py -k contract` says whether it keeps what the cache relies on.
"""
import base64
import importlib.util
import inspect
import io
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers

import data
import teacher as teacher_module
from data import OBJECTS, TASKS, UserError, load_task
from student import _tiny
from teacher import (
    ENCODERS,
    TEACHERS,
    Cache,
    Pictures,
    StableDiffusion,
    Teacher,
    build_teacher,
    fill,
    main,
    open_picture,
    open_vectors,
    show_on_white,
    split_spec,
)
from tests.conftest import respond

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    "is a mouse bigger than a piano?",
    "is a piano bigger than a mouse?",
    "the committee adjourned",
    "",
    "a bus, a cat and a pea",
]
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None,
                                  reason="pillow is optional: pip install pillow")


@pytest.fixture(autouse=True)
def teachers_on_the_cpu(monkeypatch):
    """Vectors are compared with a CPU's, to more digits than a GPU's would agree. test_cuda.py has
    what only a GPU shows."""
    monkeypatch.setattr(teacher_module, "device_name", lambda: "cpu")


# ---- the contract: every teacher, and bad ones ----

class Offline(NamedTuple):
    """How to build a teacher of TEACHERS without a network, and what to ask of it."""
    spec: str
    another: str                    # its argument is another one, so it must be another teacher
    texts: list
    tolerance: float = 0            # a model rounds otherwise in a batch than alone
    width_is_assumed: bool = False  # planned_dim tells the usual model's width, not this tiny one's
    second_process: bool = False    # also ask in another process, where that takes under a second


def copy_folder(folder):
    """A second folder with the same files, beside the first."""
    return shutil.copytree(folder, f"{folder}-copy", dirs_exist_ok=True)


def offline_painter(request):
    return Offline("painter", "painter:.5", TEXTS, second_process=True)


def offline_clip(request):
    folder = request.getfixturevalue("clip_folder")
    return Offline(f"clip:{folder}", f"clip:{copy_folder(folder)}", TEXTS, tolerance=1e-5,
                   width_is_assumed=True)


def offline_stable_diffusion(request):
    folder = request.getfixturevalue("diffusion_folder")
    request.getfixturevalue("quick_recipe")
    another = copy_folder(folder)
    return Offline(f"stable-diffusion:{folder}", f"stable-diffusion:{another}", TEXTS[:2])


def offline_api(request):
    api = request.getfixturevalue("api")
    spec = api(answer_at_once)
    return Offline(spec, spec.replace("crayon", "chalk"), ["a", "bb", "ccc"])


def offline_images(request):
    folder = request.getfixturevalue("pictures")
    texts = ["a", "b", "row 2 has a picture of its own"]
    return Offline(f"images:{folder}", f"images:{copy_folder(folder)}", texts, second_process=True)


def offline_vectors(request):
    folder = request.getfixturevalue("tmp_path") / "vectors"
    folder.mkdir()
    np.save(folder / "train.npy", np.eye(5, 7, dtype=np.float32))
    another = copy_folder(folder)
    return Offline(f"vectors:{folder}", f"vectors:{another}", TEXTS, second_process=True)


OFFLINE = {
    "painter": offline_painter,
    "clip": offline_clip,
    "stable-diffusion": offline_stable_diffusion,
    "api": offline_api,
    "images": offline_images,
    "vectors": offline_vectors,
}


def vectors_of(teacher, texts, rows):
    """The vectors of some rows of the training texts, asked for as open_vectors asks."""
    if not teacher.costly:
        return np.array(teacher.reader("train", texts)(rows))
    items = teacher.items("train", texts)
    return teacher.encode([items[row] for row in rows])


def vectors_of_another_process(spec, texts, added=""):
    """The vectors of all texts in a process with another hash().

    `added` is source text that the process runs first, to add a teacher to TEACHERS.
    """
    program = "\n".join([
        "import json, sys",
        "from teacher import *",
        added,
        inspect.getsource(vectors_of),
        "spec, texts = json.loads(sys.argv[1])",
        "vectors = vectors_of(build_teacher(spec), texts, range(len(texts)))",
        "print(json.dumps(vectors.tolist()))",
    ])
    command = [sys.executable, "-c", program, json.dumps([spec, texts])]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return np.array(json.loads(child.stdout), np.float32)


def check_contract(offline, added=""):
    """Assert all that Teacher's docstring asks of a teacher, and say which of it is broken."""
    kind, argument = split_spec(offline.spec)
    texts = offline.texts
    rows = list(range(len(texts)))
    teacher = build_teacher(offline.spec)
    assert teacher.name and isinstance(teacher.name, str), "the name is empty"
    assert teacher.name != build_teacher(offline.another).name, \
        "two arguments, one name: the cache would give the vectors of the one for the other"
    assert type(teacher.dim) is int and teacher.dim > 0, "dim is no positive int"
    planned = kind.planned_dim(argument)
    if not offline.width_is_assumed:
        assert planned in (teacher.dim, None), "planned_dim is not dim"

    together = vectors_of(teacher, texts, rows)
    assert together.dtype == np.float32, "the vectors are not float32"
    assert together.shape == (len(texts), teacher.dim), "the vectors do not have the shape (N, dim)"
    assert np.isfinite(together).all(), "a vector is not finite"

    def same(vectors):
        return np.allclose(vectors, together, rtol=0, atol=offline.tolerance)

    alone = [vectors_of(teacher, texts, [row])[0] for row in rows]
    assert same(alone), "a text has another vector alone than in a list"
    backwards = vectors_of(build_teacher(offline.spec), texts, rows[::-1])
    assert same(backwards[::-1]), "a text has another vector in another order, or of a new teacher"
    if offline.second_process:
        assert same(vectors_of_another_process(offline.spec, texts, added)), \
            "a text has another vector in another process: Python's hash()? a seed of the clock?"


@pytest.mark.parametrize("name", TEACHERS)
def test_every_teacher_keeps_the_contract(name, request):
    """The cache gives a vector again for the same name and text, at any time, in any process."""
    assert name in OFFLINE, f"add a line to OFFLINE in {__file__}: how to build {name!r} offline"
    check_contract(OFFLINE[name](request))


class Sound(Teacher):
    """A teacher as a student might add it. Those below break one rule each."""
    dim = 3

    def __init__(self, argument):
        self.factor = float(argument or 1)
        self.name = f"sound:{self.factor}"

    def encode(self, texts):
        vectors = [[self.factor, len(text), text.count("a")] for text in texts]
        return np.array(vectors, np.float32).reshape(-1, 3)


class Hashed(Sound):
    def encode(self, texts):
        return np.array([[hash(text) % 97, 1, 1] for text in texts], np.float32)


class Centred(Sound):
    def encode(self, texts):
        vectors = super().encode(texts)
        return vectors - vectors.mean(0)


class Drawn(Sound):
    """One generator for all texts: what a text gets depends on how many were drawn before it."""
    generator = np.random.default_rng(0)

    def encode(self, texts):
        return self.generator.random((len(texts), 3), np.float32)


class Forgetful(Sound):
    def __init__(self, argument):
        super().__init__(argument)
        self.name = "forgetful"


class Double(Sound):
    def encode(self, texts):
        return super().encode(texts).astype(float)


class Misplanned(Sound):
    @classmethod
    def planned_dim(cls, argument, picture_encoder=None):
        return 768


def source_of(kind):
    """The source that defines a teacher, with the one it is made from, and adds it as "added"."""
    return "\n".join([inspect.getsource(Sound), inspect.getsource(kind),
                      f"TEACHERS['added'] = {kind.__name__}"])


@pytest.fixture
def add(monkeypatch):
    """add(kind) makes a class the teacher "added" for the length of a test."""
    return lambda kind: monkeypatch.setitem(TEACHERS, "added", kind)


ADDED = Offline("added:1", "added:2", TEXTS, second_process=True)


def test_a_teacher_of_a_students_own_keeps_the_contract(add):
    add(Sound)
    check_contract(ADDED, source_of(Sound))


@pytest.mark.parametrize("kind, says", [
    (Hashed, "in another process"),
    (Centred, "alone than in a list"),
    (Drawn, "alone than in a list"),
    (Forgetful, "two arguments, one name"),
    (Double, "not float32"),
    (Misplanned, "planned_dim is not dim"),
])
def test_a_teacher_that_breaks_the_contract_is_caught(kind, says, add):
    add(kind)
    with pytest.raises(AssertionError, match=says):
        check_contract(ADDED, source_of(kind))


def test_a_teacher_without_a_line_in_the_table_is_asked_for_one(add, request):
    add(Sound)
    with pytest.raises(AssertionError, match="add a line to OFFLINE in .*test_teacher.py"):
        test_every_teacher_keeps_the_contract("added", request)


class Nameless(Sound):
    def __init__(self, argument):
        pass


class Flat(Sound):
    dim = 0


class Unrelated:
    def __init__(self, argument):
        pass


class Counted(Sound):
    dim = np.int64(3)  # as numpy gives it, and json cannot write it


class Mute(Teacher):
    name = "mute"
    dim = 3

    def __init__(self, argument):
        pass


class Readerless(Sound):
    costly = False


class Bounded(Sound):
    tokenizer = staticmethod(str.split)


class Refusing(Sound):
    def __init__(self, argument):
        raise ValueError("no such\nmodel")


class Argumentless(Sound):
    def __init__(self):
        pass


class Packaged(Sound):
    def __init__(self, argument):
        import a_package_that_nobody_has  # noqa: F401


@pytest.mark.parametrize("kind, says", [
    (Nameless, "added:1: Nameless has the name '': let __init__ set self.name"),
    (Unrelated, "is no subclass of Teacher"),
    (Flat, "has dim 0: set it to the width of a vector, a positive int"),
    (Counted, "has dim .*3.*: set it to the width"),
    (Mute, "has no encode"),
    (Readerless, "has costly = False and no reader"),
    (Bounded, "has a tokenizer and no max_tokens"),
    (Refusing, "added:1 cannot be built: Refusing.'1'. raised ValueError: no such model"),
    (Argumentless, "raised TypeError: .*takes 1 positional argument"),
    (Packaged, "needs a_package_that_nobody_has: pip install a_package_that_nobody_has"),
])
def test_a_teacher_that_cannot_work_is_one_line_when_it_is_built(kind, says, add):
    add(kind)
    with pytest.raises(UserError, match=says) as error:
        build_teacher("added:1")
    assert "\n" not in str(error.value)


def raising(error):
    """An encode that raises on the text "bad" alone."""
    def encode(self, texts):
        if "bad" in texts:
            raise error
        return Sound.encode(self, texts)
    return encode


@pytest.mark.parametrize("encode, says", [
    (raising(ValueError("two\nlines")), "sound:1.0 failed on 'bad': ValueError: two lines"),
    (raising(TypeError("odd")), "failed on 'bad': TypeError: odd"),
    (raising(KeyError("odd")), "failed on 'bad': KeyError: 'odd'"),
    (lambda self, texts: None, r"returned None; required is float32 of shape"),
    (lambda self, texts: np.ones(3, np.float32), r"required is float32 of shape"),
    (lambda self, texts: np.ones((1, 3)),
     r"returned 1 vectors for 3 texts: required is float32 of shape \(3, 3\)"),
    (lambda self, texts: np.ones((len(texts), 4)),
     r"no finite vector of 3 for 'good': it returned float64 of shape \(4,\); required .*\(3,\)"),
    (lambda self, texts: [["a"] * 3 for _ in texts], r"it returned <U1 of shape \(3,\)"),
    (lambda self, texts: [[len(text) if text != "bad" else np.nan] * 3 for text in texts],
     "no finite vector of 3 for 'bad': it returned nan, inf or"),
    (lambda self, texts: torch.ones(len(texts), 3, requires_grad=True), "detach"),
])
def test_an_encode_that_fails_is_one_line_that_names_teacher_and_text(encode, says, tmp_path):
    """And never "start once more", which a wrong teacher would answer with the same for ever."""
    teacher = type("Failing", (Sound,), {"encode": encode})("1")
    with pytest.raises(UserError, match=says) as error:
        opened(teacher, tmp_path, ["good", "bad"])
    assert "sound:1.0" in str(error.value)
    assert "\n" not in str(error.value) and "once more" not in str(error.value)


def test_a_teacher_that_fails_on_many_texts_only_says_so(tmp_path):
    def encode(self, texts):
        if len(texts) > 1:
            raise RuntimeError("out of memory")
        return Sound.encode(self, texts)

    teacher = type("Small", (Sound,), {"encode": encode})("1")
    says = "failed on 'good' and the 2 after it together, on none of them alone: RuntimeError: out"
    with pytest.raises(UserError, match=says):
        opened(teacher, tmp_path, ["good", "better"])


def test_a_picture_that_fails_is_not_drawn_a_second_time(tmp_path):
    """Which text of a list fails is found by asking for each alone; here it is alone already."""
    class Broken(Sound):
        at_once = Pictures.at_once
        asked = []

        def encode(self, texts):
            self.asked += texts
            raise RuntimeError("no more paint")

    with pytest.raises(UserError, match="failed on 'good': RuntimeError: no more paint"):
        opened(Broken("1"), tmp_path, ["good", "bad"])
    assert Broken.asked == ["good"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the teacher's own words")])
def test_ctrl_c_and_a_teachers_own_words_pass_through(error, tmp_path):
    teacher = type("Stopped", (Sound,), {"encode": raising(error)})("1")
    with pytest.raises(type(error)) as raised:
        opened(teacher, tmp_path, ["good", "bad"])
    assert raised.value is error


@pytest.mark.parametrize("read, says", [
    (raising(ValueError("odd")), r"sound:1.0 failed on 'train.tsv:2': ValueError: odd"),
    (lambda self, texts: np.ones((len(texts), 4)),
     r"no finite vector of 3 for 'train.tsv:1': it returned float64 of shape \(4,\)"),
])
def test_a_reader_that_fails_is_one_line_that_names_the_example(read, says, tmp_path):
    class Reading(Sound):
        costly = False

        def reader(self, split, texts):
            return lambda rows: read(self, [texts[row] for row in rows])

    with pytest.raises(UserError, match=says) as error:
        opened(Reading("1"), tmp_path, ["good", "bad"])
    assert "once more" not in str(error.value)


def test_the_command_tells_of_a_wrong_teacher_in_one_line(add, tmp_path, capsys):
    add(type("Failing", (Sound,), {"encode": lambda self, texts: texts[0] + 1}))
    with pytest.raises(SystemExit) as stop:
        main(["--task", "objects", "--teacher", "added", "--cache-dir", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]  # below the bar
    assert stop.value.code == 2
    assert error.startswith("teacher.py: error: sound:1.0 failed on 'is a") and "TypeError" in error


# ---- the width, told in advance ----

@pytest.mark.parametrize("spec, encoder, width", [
    ("painter", None, 1024),
    ("clip", None, 768),
    ("stable-diffusion", None, 1024),
    ("stable-diffusion:/nowhere", "pixels", 768),
    ("stable-diffusion", "vae", 1024),
    ("images:/nowhere", None, 768),
    ("images:/nowhere", "clip:/nowhere", 768),
    ("api:https://host/v1", "vae:/nowhere", 1024),
    ("images:/nowhere", "mine:1", None),
    ("added", None, None),
])
def test_the_width_is_told_without_building_the_teacher(spec, encoder, width, add, monkeypatch):
    class Found(Teacher):
        """Finds its width when it is built."""

        def __init__(self, argument):
            pytest.fail("it was built")

    add(Found)
    monkeypatch.setitem(ENCODERS, "mine", lambda argument: pytest.fail("it was built"))
    kind, argument = split_spec(spec)
    assert kind.planned_dim(argument, encoder) == width


def test_the_width_of_ready_made_vectors_is_read_from_their_file(folder):
    kind, argument = split_spec(f"vectors:{folder}")
    assert kind.planned_dim(argument) == 5
    with pytest.raises(UserError, match="train.npy is no readable array"):
        kind.planned_dim("/nowhere")


# ---- the painter ----

def test_no_texts_have_no_pictures():
    assert build_teacher("painter").encode([]).shape == (0, 1024)


def test_the_painter_draws_the_larger_object_larger_on_its_own_side_of_the_canvas():
    picture = build_teacher("painter").encode(TEXTS[:2]).reshape(2, 4, 16, 16)
    left = picture[:, 3, :, :8].sum((1, 2))
    right = picture[:, 3, :, 8:].sum((1, 2))
    assert left[0] < right[0] and left[1] > right[1]


@pytest.mark.parametrize("shape", ["disc", "box", "bar", "cone"])
def test_covered_area_grows_with_size_among_objects_of_one_shape(shape):
    """What the student can learn from the picture and not from 120 sentences."""
    names = [name for name in OBJECTS if OBJECTS[name][2] == shape]
    names.sort(key=lambda name: OBJECTS[name][0])
    pictures = build_teacher("painter").encode(names).reshape(-1, 4, 256)
    area = pictures[:, 3].sum(1)
    assert (np.diff(area) >= 0).all() and area[-1] > 3 * area[0]


@needs_pillow
def test_the_picture_to_look_at_is_the_painting_on_white_paper():
    pixels = np.asarray(build_teacher("painter").picture("sofa"))  # green, in the middle
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [255] * 3
    assert pixels[8, 8].argmax() == 1


def test_any_text_has_a_picture_of_its_own_even_where_the_painter_knows_no_word():
    texts = ["the committee adjourned", "the committee met"]
    first, second = build_teacher("painter").encode(texts)
    assert (first != 0).any() and (first != second).any()


def test_the_dose_mixes_picture_and_noise_of_equal_power():
    texts = [f"a {a} or a {b}" for a in list(OBJECTS)[:8] for b in list(OBJECTS)[-8:]]
    picture = build_teacher("painter:1").encode(texts).astype(float)
    half = build_teacher("painter:0.5").encode(texts).astype(float)
    noise = build_teacher("painter:0").encode(texts).astype(float)
    power = (picture**2).mean()
    assert (half**2).mean() == pytest.approx(power, rel=0.05)
    assert (noise**2).mean() == pytest.approx(power, rel=0.05)

    def slope(vectors):
        """The regression slope on the picture."""
        return (vectors * picture).mean() / power

    assert slope(half) == pytest.approx(0.5, abs=0.03)
    assert slope(noise) == pytest.approx(0, abs=0.03)


# ---- specs ----

@pytest.mark.parametrize("spec, says", [
    ("paintr", "unknown teacher 'paintr': did you mean painter"),
    ("painter:2", "dose RHO from 0"),
    ("painter:x", "dose RHO from 0"),
    ("painter:nan", "dose RHO from 0"),
    ("vectors:", "train.npy is no readable array"),
    ("vectors:/nowhere", "/nowhere/train.npy is no readable"),
    ("clip:/nowhere/at all", "no folder here"),
])
def test_a_teacher_that_cannot_be_had_says_why(spec, says):
    with pytest.raises(UserError, match=says):
        build_teacher(spec)


# ---- ready-made vectors ----

PLAIN = SimpleNamespace(prompt=lambda example: example.text)  # a task whose examples are texts


def opened(teacher, folder, train, dev=("a dev text",), **more):
    """open_vectors on lists of texts, as if row i stood in line i + 1 of a file of the split."""
    examples = {}
    for split, texts in (("train", train), ("dev", dev)):
        examples[split] = [SimpleNamespace(text=text, where=f"{split}.tsv:{number}")
                           for number, text in enumerate(texts, 1)]
    return open_vectors(teacher, PLAIN, examples, folder, **more)


@pytest.fixture
def folder(tmp_path):
    """Vectors of six training texts and three dev texts, 5 numbers each."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.standard_normal((6, 5)).astype(np.float16))
    np.save(tmp_path / "dev.npy", rng.standard_normal((3, 5)))
    return tmp_path


def test_row_i_belongs_to_example_i_and_all_are_divided_by_the_training_root_mean_square(folder):
    teacher = build_teacher(f"vectors:{folder}")
    readers, made = opened(teacher, folder, "abcdef", "abc", limit=4)
    train = np.load(folder / "train.npy").astype(np.float32)
    dev = np.load(folder / "dev.npy").astype(np.float32)
    rms = np.sqrt((train[:4].astype(float) ** 2).mean())  # of the rows that are trained on
    assert teacher.dim == 5 and made == 0
    np.testing.assert_allclose(readers["train"]([3, 0, 3]), train[[3, 0, 3]] / rms, rtol=1e-6)
    np.testing.assert_allclose(readers["dev"](range(3)), dev / rms, rtol=1e-6)
    with pytest.raises(UserError, match="by row, not by text"):
        teacher.encode(["a new text"])


def ones_with(row, value, count):
    """(count, 5) ones, but for one row."""
    array = np.ones((count, 5))
    array[row] = value
    return array


@pytest.mark.parametrize("split, array, says", [
    ("dev", np.zeros((4, 5)), r"dev.npy has shape \(4, 5\), expected \(3, 5\)"),
    ("dev", np.zeros((3, 4)), r"expected \(3, 5\)"),
    ("train", np.zeros((5, 5)), r"expected \(6, 5\)"),
    ("dev", np.zeros((3, 5), int), "expected floats, in C order"),
    ("dev", np.zeros(3), "expected floats"),
    ("dev", np.zeros((5, 3)).T, "expected floats, in C order"),  # stored column by column
    ("dev", ones_with(1, 1e200, 3), "no finite vector of .* for 'b': mend .*dev.npy"),
    ("dev", ones_with(2, np.nan, 3), "no finite vector of .* for 'c'"),
    ("train", ones_with(5, np.inf, 6), "no finite vector of .* for 'f'"),
    ("dev", np.array([[object()] * 5] * 3), "no readable array"),
])
def test_vectors_that_do_not_fit_the_examples_are_refused(folder, split, array, says):
    """In the published scripts a missing vector becomes zeros and trains on."""
    np.save(folder / f"{split}.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        opened(build_teacher(f"vectors:{folder}"), folder, "abcdef", "abc")

def npy(shape, kind="'<f4'", order="False", content=bytes(240)):
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content

NPY_FILES = {
    "empty": b"",
    "one byte": b"\x93",
    "another magic": b"\x93NUMPX" + bytes(90),
    "a zip file": b"PK\3\4" + bytes(90),
    "an empty zip file": b"PK\5\6" + bytes(18),
    "a cut header": npy("(6, 5)")[:40],
    "no content": npy("(6, 5)", content=b""),
    "a formula": npy("(10**12, 5)"),
    "too many rows": npy("(1000000000000, 5)"),
    "more rows than fit 64 bits": npy("(99999999999999999999, 5)"),
    "fewer rows than none": npy("(-6, 5)"),
    "true rows": npy("(True, 5)"),
    "Python 2": npy("(6L, -5L)"),
    "no rows": npy("(0, 5)"),
    "a number": npy("()"),
    "an open bracket": npy("(6, 5", content=b""),
    "deep brackets": npy("(" * 9000),
    "deep signs": npy("-" * 9000 + "1"),
    "code": npy("__import__('os').abort()"),
    "objects": npy("(6, 5)", "'|O'"),
    "fields": npy("(6, 5)", "[('a', '<f4'), ('b\\n', '<f4')]"),
    "99-byte floats": npy("(6, 5)", "'<f99'"),
    "names": npy("(6, 5)", "{'names': 1}"),
    "complex": npy("(6, 5)", "'<c8'"),
    "dates": npy("(6, 5)", "'<M8[s]'"),
    "column by column": npy("(6, 5)", order="True"),
    "no order": npy("(6, 5)", order="2"),
}


@pytest.mark.parametrize("file", NPY_FILES.values(), ids=NPY_FILES)
def test_a_numpy_file_of_any_sort_is_read_or_refused_in_one_line(tmp_path, file, capfd):
    (tmp_path / "train.npy").write_bytes(file)
    says = "train.npy (is no readable array|holds .*: expected floats, in C order)"
    with pytest.raises(UserError, match=says) as error:
        build_teacher(f"vectors:{tmp_path}")
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""

def test_floats_of_any_width_and_byte_order_are_the_same_numbers(folder, monkeypatch):
    """Read row by row, without os.pread, which Windows lacks."""
    monkeypatch.delattr(os, "pread", raising=False)
    numbers = np.arange(1, 31).reshape(6, 5) / 8  # of few bits: exact in each of them
    for kind in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", np.longdouble):
        np.save(folder / "train.npy", numbers.astype(kind))
        read = build_teacher(f"vectors:{folder}").reader("train", "abcdef")
        assert (np.array(read([4, 0, 5]), float) == numbers[[4, 0, 5]]).all()

def test_of_several_bad_rows_in_several_chunks_the_first_is_named(tmp_path):
    array = np.ones((9000, 2), np.float16)
    array[[5001, 8999]] = np.nan
    array[7000] = np.inf
    np.save(tmp_path / "train.npy", array)
    says = r"for 'text 5001': mend .*train.npy, whose row 5001 \(the first is 0\)"
    with pytest.raises(UserError, match=says):
        build_teacher(f"vectors:{tmp_path}").reader("train", [f"text {i}" for i in range(9000)])

@pytest.mark.parametrize("train, dev, where", [
    (1e-44, 1.0, "dev.tsv:2"),   # divided by such a root mean square a 1 is inf
    (1e-30, 1e-5, "dev.tsv:2"),  # and this has squares that are
    (1e30, 1.0, "dev.tsv:2"),    # here its squares are 0
    (None, 1.0, "train.tsv:1")])  # one row of 3e37 lets the other rows vanish
def test_vectors_are_looked_at_after_their_division_too(folder, train, dev, where):
    rows = np.full((6, 5), train or 1e-10, np.float32)
    rows[5] = train or 3e37
    np.save(folder / "train.npy", rows)
    np.save(folder / "dev.npy", np.array([[rows[0, 0]] * 5, [dev] * 5, [0.0] * 5], np.float32))
    says = f"vector for '{where}' whose largest number is .* out of scale"
    with pytest.raises(UserError, match=says):
        opened(build_teacher(f"vectors:{folder}"), folder, "abcdef", "abc")

@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 3e37])
def test_vectors_of_one_size_are_near_one_after_their_division_whatever_the_size(folder, size):
    array = np.full((6, 5), size, np.float32)
    array[3] = 0  # a vector of zeros stays one
    np.save(folder / "train.npy", array)
    np.save(folder / "dev.npy", array[:3])
    found, _ = opened(build_teacher(f"vectors:{folder}"), folder, "abcdef", "abc")
    expected = np.full((6, 5), (6 / 5) ** 0.5)
    expected[3] = 0
    rtol = 0.1 if size < 1e-38 else 1e-6
    np.testing.assert_allclose(found["train"](range(6)), expected, rtol=rtol)


# ---- CLIP ----

@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of the smallest size, text and image side, as a hub checkpoint holds them."""
    folder = tmp_path_factory.mktemp("clip")
    _, tokenizer = _tiny(TEXTS)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text_config = dict(vocab_size=len(tokenizer), max_position_embeddings=12, eos_token_id=3,
                       bos_token_id=2, pad_token_id=0, projection_dim=10, **small)
    vision_config = dict(image_size=8, patch_size=4, projection_dim=10, **small)
    config = transformers.CLIPConfig(
        text_config=text_config, vision_config=vision_config, projection_dim=10)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    if importlib.util.find_spec("PIL"):  # the picture side needs pillow, which is optional
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_clip_gives_the_text_features_of_the_whole_model_whatever_the_neighbours(clip_folder):
    teacher = build_teacher(f"clip:{clip_folder}")
    vectors = teacher.encode(TEXTS)
    assert teacher.dim == 10 and vectors.shape == (5, 10) and vectors.dtype == np.float32
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    for text, vector in zip(TEXTS, vectors):
        batch = teacher.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            features = whole.get_text_features(**batch).pooler_output[0]
        np.testing.assert_allclose(vector, features.numpy(), atol=1e-5)


def test_a_model_whose_weights_are_missing_is_no_teacher(model_folder):
    """transformers would fill them in at random, anew in each process."""
    with pytest.raises(UserError, match="is no CLIPTextModelWithProjection: it lacks"):
        build_teacher(f"clip:{model_folder('bert')}")


def test_clip_says_how_many_texts_it_had_to_cut(clip_folder, capsys, tmp_path):
    texts = ["a mouse", "a mouse " * 9, "a piano " * 20]
    opened(build_teacher(f"clip:{clip_folder}"), tmp_path, texts, ["a pea"])
    assert "2 of 4 texts are too long for it and cut" in capsys.readouterr().err


# ---- pictures become vectors ----

def coloured(seed, size=(48, 32)):
    """A picture with a seam, so that a wrong colour range, channel order or crop shows."""
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :width // 2] = 255, 40 * seed % 256, 0
    return image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures a and b by their text, c by its row."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        coloured(seed).save(folder / f"{name}.png")
    lines = [
        {"text": "a", "file": "a.png"},
        {"text": "b", "file": "b.png"},
        {"split": "train", "index": 2, "file": "c.png"},
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_line(pictures, line):
    with open(pictures / "manifest.jsonl", "a") as file:
        print(line, file=file)


def test_pixels_are_the_colours_from_minus_one_to_one(pictures):
    vector = build_teacher(f"images:{pictures}").encode(["a"]).reshape(16, 16, 3)
    assert vector[8, 2].tolist() == [1, -1, -1]
    assert vector[8, 14].tolist() == [-1, -1, -1]


THREE = ["b", "a", "a third text"]  # the third has a picture by its row alone


def test_pictures_are_found_by_text_or_by_row(pictures, tmp_path):
    teacher = build_teacher(f"images:{pictures}")
    readers, made = opened(teacher, tmp_path, THREE, ["a"])
    assert made == 3  # the two a are one
    rows = readers["train"](range(3))
    np.testing.assert_array_equal(readers["dev"]([0])[0], rows[1])
    assert len({row.tobytes() for row in rows}) == 3
    with pytest.raises(UserError, match="lacks 1 train texts, first row 1, 'unseen'"):
        opened(teacher, tmp_path, ["b", "unseen"], ["a"])


def test_a_rows_own_picture_comes_before_its_texts(pictures, tmp_path):
    add_line(pictures, json.dumps({"split": "train", "index": 0, "file": "c.png"}))
    readers, _ = opened(build_teacher(f"images:{pictures}"), tmp_path, THREE, ["b"])
    train = readers["train"]([0, 2])
    np.testing.assert_array_equal(train[0], train[1])
    assert (readers["dev"]([0])[0] != train[0]).any()  # row 0 of dev is not row 0 of train


def test_a_replaced_picture_is_looked_at_again(pictures, tmp_path):
    before, _ = opened(build_teacher(f"images:{pictures}"), tmp_path, THREE, ["a"])
    coloured(5, (20, 20)).save(pictures / "b.png")
    after, made = opened(build_teacher(f"images:{pictures}"), tmp_path, THREE, ["a"])
    assert made == 1
    assert (after["train"]([0]) != before["train"]([0])).any()


def grey(*shades):
    return [[shade] * 3 for shade in shades]

# mode, the bytes of its pixels, what pillow notes beside them,
# the colours a person sees on white paper
MODES = [
    ("1", b"\x80", {}, grey(255, 0)), ("1", b"\x80", {"transparency": 0}, grey(255, 255)),
    ("L", b"\0\x64", {}, grey(0, 100)), ("L", b"\0\x64", {"transparency": 0}, grey(255, 100)),
    ("LA", bytes([100, 255, 100, 51]), {}, grey(100, 100 * 0.2 + 255 * 0.8)),
    ("La", bytes([100, 255, 20, 51]), {}, grey(100, 100 * 0.2 + 255 * 0.8)),  # 20 is 100 times .2
    ("RGB", bytes([9, 99, 199, 0, 0, 0]), {}, [[9, 99, 199], [0, 0, 0]]),
    ("RGB", bytes([9, 99, 199, 0, 0, 0]), {"transparency": (9, 99, 199)}, grey(255, 0)),
    ("RGBA", bytes([9, 99, 199, 0, 255, 0, 0, 51]), {}, [[255] * 3, [255, 204, 204]]),
    ("RGBa", bytes([9, 99, 199, 255, 51, 0, 0, 51]), {}, [[9, 99, 199], [255, 204, 204]]),
    ("RGBX", bytes([9, 99, 199, 0]), {}, [[9, 99, 199]]),
    ("CMYK", bytes([255, 51, 0, 0, 0, 0, 0, 55]), {}, [[0, 204, 255], [200] * 3]),
    ("YCbCr", bytes([100, 128, 128, 100, 128, 178]), {},
     [[100] * 3, [170, 64, 100]]),  # R - Y = 1.402 * 50
    ("HSV", bytes([0, 255, 255, 85, 255, 100]), {}, [[255, 0, 0], [0, 100, 0]]),
    ("LAB", bytes([255, 0, 0, 0, 0, 0, 136, 0, 0]), {},
     grey(255, 0, 127)),  # L* of 53.4 is mid grey
    ("I;16", struct.pack("<3H", 0, 25700, 65535), {}, grey(0, 100, 255)),
    ("I;16", struct.pack("<2H", 257, 514), {}, grey(1, 2)),  # dark, and not stretched
    ("I;16", struct.pack("<2H", 25700, 0), {"transparency": 0}, grey(100, 255)),
    ("I;16L", struct.pack("<2H", 25700, 65535), {}, grey(100, 255)),
    ("I;16B", struct.pack(">2H", 25700, 65535), {}, grey(100, 255)),
    ("I;16N", struct.pack("=2H", 25700, 65535), {}, grey(100, 255)),
    ("I", struct.pack("=3i", 0, 25700, 65535), {}, grey(0, 100, 255)),
    ("I", struct.pack("=3i", 0, 100, 255), {}, grey(0, 100, 255)),
    ("I", struct.pack("=2i", 0, 2**31 - 1), {}, grey(0, 127)),  # of 32 bits
    ("F", struct.pack("=3f", 0, 0.4, 1), {}, grey(0, 102, 255)),
    ("F", struct.pack("=3f", 0, 100, 255), {}, grey(0, 100, 255)),
    ("F", struct.pack("=3f", -1, 0, 1), {}, grey(0, 127.5, 255)),
]

@pytest.mark.parametrize("mode, content, info, colours", MODES, ids=[mode for mode, *_ in MODES])
def test_a_picture_of_any_mode_is_what_a_person_sees_on_white_paper(mode, content, info, colours):
    """Pillow's own conversion turns all 16-bit grey white and drops the transparency."""
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    picture = image.frombytes(mode, (len(colours), 1), content)
    picture.info.update(info)
    seen = show_on_white(picture)
    assert seen.mode == "RGB" and np.abs(np.asarray(seen)[0] - np.array(colours)).max() <= 1

def test_every_mode_of_pillow_is_in_the_table_above_or_below():
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    assert set(image.MODES) <= {mode for mode, *_ in MODES} | {"P", "PA"}

@pytest.mark.parametrize("transparency", [1, b"\xff\0"], ids=["one colour", "a table"])
def test_a_palette_may_be_transparent_too(transparency):
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    picture = image.frombytes("P", (2, 1), b"\0\1")
    picture.putpalette([9, 99, 199, 0, 0, 0])
    assert np.asarray(show_on_white(picture))[0].tolist() == [[9, 99, 199], [0, 0, 0]]
    picture.info["transparency"] = transparency
    assert np.asarray(show_on_white(picture))[0].tolist() == [[9, 99, 199], [255, 255, 255]]
    both = image.merge("PA", (picture, image.frombytes("L", (2, 1), b"\xff\0")))
    both.putpalette([9, 99, 199, 0, 0, 0])
    assert np.asarray(show_on_white(both))[0].tolist() == [[9, 99, 199], [255, 255, 255]]

def in_file(picture, form="png", **more):
    file = io.BytesIO()
    picture.save(file, form, **more)
    return file.getvalue()

@pytest.mark.parametrize("form", ["png", "tiff"])
def test_a_picture_is_turned_upright_as_its_camera_says(form):
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.swapaxes(0, 1), 6: np.rot90(upright),
              7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        exif = image.Exif()
        exif[0x0112] = orientation
        content = in_file(image.fromarray(np.ascontiguousarray(pixels)), form, exif=exif)
        assert (np.asarray(open_picture(content)) == upright).all()
    damaged = in_file(image.fromarray(upright), exif=b"Exif\0\0no exif")
    assert (np.asarray(open_picture(damaged)) == upright).all()

def test_of_an_animation_the_first_frame_is_seen():
    image = pytest.importorskip("PIL.Image")
    red, blue = (image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    for form in ("gif", "png", "tiff", "webp"):
        more = {"lossless": True} if form == "webp" else {}
        content = in_file(red, form, save_all=True, append_images=[blue], **more)
        assert np.asarray(open_picture(content))[0, 0].tolist() == [255, 0, 0]

def test_different_pictures_are_different_vectors(tmp_path):
    """End to end: grey of 16 bits, transparency, and what an added teacher draws."""
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    image.new("I;16", (20, 20), 51 * 257).save(tmp_path / "grey.png")
    image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    lines = [json.dumps({"text": name, "file": f"{name}.png"}) for name in ("grey", "clear")]
    manifest = "\ufeff" + "\n\n".join(lines) + "\n \n"  # a BOM, empty lines
    (tmp_path / "manifest.jsonl").write_text(manifest, "utf-8")
    vectors = build_teacher(f"images:{tmp_path}").encode(["grey", "clear"])
    np.testing.assert_allclose(vectors, np.array([[-0.6] * 768, [1] * 768]), atol=1e-6)

    class Glass(Pictures):
        def picture(self, text):
            return image.new("LA", (20, 20), (0, 51))

    np.testing.assert_allclose(Glass("glass", None).encode(["a"]), [[0.6] * 768], atol=1e-6)

def test_a_picture_that_is_too_large_is_one_line(pictures, tmp_path, capfd):
    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    # Of the smaller one pillow only warns.
    for side, says in ((60_000, "DecompressionBombError"), (10_000, "is not a whole picture")):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        (pictures / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))
        with pytest.raises(UserError, match=f"a.png is not a whole picture .*{says}|{says}"):
            opened(build_teacher(f"images:{pictures}"), tmp_path, ["a"], ["b"])
    assert "Warning" not in capfd.readouterr().err

@pytest.mark.parametrize("line, says", [
    ('{"text": "d", "file": "../secret.png"}', "4: .*no file inside"), ("[1]", "manifest.jsonl:4"),
    ('{"text": "d", "file": "/etc/passwd"}', "no file inside"),
    ('{"file": "a.png"}', "manifest.jsonl:4"),
    ('{"text": "d"', "manifest.jsonl:4"), ('{"text": "d", "file": "d.png"}', "no file inside"),
    ("[" * 100_000, "manifest.jsonl:4"),
    ('{"text": "d", "file": ' + "9" * 5000 + "}", "manifest.jsonl:4"),
    ('{"text": "d", "file": 5}', "4: 5 is no file inside"),
    ('{"text": "d", "file": ["a.png"]}', "no file inside"),
    ('{"text": "d", "file": ""}', "no file inside"),
    ('{"text": "d", "file": "a\\u0000.png"}', "no file inside"),
    ('{"text": "d", "file": "\\ud800"}', "4: .*no file inside"),
    ('{"text": "d", "file": "' + "a" * 5000 + '"}', "no file inside"),
    ('{"text": 5, "file": "a.png"}', "4 names neither"),
    ('{"text": ["d"], "file": "a.png"}', "4 names neither"),
    ('{"split": "train", "index": 1e400, "file": "a.png"}', "4 names neither"),
    ('{"split": "train", "index": 1.5, "file": "a.png"}', "4 names neither"),
    ('{"split": ["train"], "index": 0, "file": "a.png"}', "4 names neither"),
    ('"a.png"', "manifest.jsonl:4")])
def test_a_manifest_line_that_leads_nowhere_is_named(pictures, line, says):
    coloured(1).save(pictures.parent / "secret.png")
    add_line(pictures, line)
    with pytest.raises(UserError, match=says):
        build_teacher(f"images:{pictures}")

@pytest.mark.parametrize("content", [None, b"\xff\xfe{"], ids=["a folder", "no text"])
def test_a_manifest_that_is_a_folder_or_no_text_is_named(tmp_path, content):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(content) if content else manifest.mkdir()
    says = "manifest.jsonl cannot be read .*: give each picture a line"
    with pytest.raises(UserError, match=says):
        build_teacher(f"images:{tmp_path}")

def test_a_picture_that_is_cut_is_named(pictures, tmp_path):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="a.png is not a whole picture"):
        opened(build_teacher(f"images:{pictures}"), tmp_path, ["a"], ["b"])


def test_the_clip_encoder_gives_the_image_features_of_the_whole_model(clip_folder, pictures):
    teacher = build_teacher(f"images:{pictures}", f"clip:{clip_folder}")
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)
    with torch.no_grad():
        batch = processor(coloured(1), return_tensors="pt")
        features = whole.get_image_features(**batch).pooler_output[0]
    assert teacher.dim == 10
    np.testing.assert_allclose(teacher.encode(["b"])[0], features.numpy(), atol=1e-5)


@needs_pillow
def test_a_local_encoder_is_known_by_where_it_lies_not_by_how_it_was_typed(
        clip_folder, pictures, monkeypatch):
    folder = Path(clip_folder)
    monkeypatch.chdir(folder.parent)
    assert build_teacher(f"clip:{folder.name}").name == build_teacher(f"clip:{folder}").name
    typed = build_teacher(f"images:{pictures}", f"clip:{folder.name}")
    assert typed.name == build_teacher(f"images:{pictures}", f"clip:{folder}").name


# ---- Stable Diffusion ----

@pytest.fixture(scope="module")
def diffusion_folder(tmp_path_factory):
    """A random Stable Diffusion that draws 64 x 64 pictures, as a hub checkpoint holds it."""
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is optional: pip install diffusers pillow")
    folder = tmp_path_factory.mktemp("diffusion")
    _, tokenizer = _tiny(TEXTS)
    tokenizer.model_max_length = 12
    torch.manual_seed(0)
    blocks = dict(norm_num_groups=4, layers_per_block=1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        **blocks,
    )
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, eos_token_id=3, bos_token_id=2,
        pad_token_id=0)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quick_recipe(monkeypatch):
    """Four steps in place of twenty, for what does not depend on their number."""
    recipe = [{**stage, "num_inference_steps": 4} for stage in StableDiffusion.recipe]
    monkeypatch.setattr(StableDiffusion, "recipe", recipe)


def test_stable_diffusion_draws_the_noise_of_a_text_from_the_text_itself(
        diffusion_folder, quick_recipe):
    """To this tokenizer both are the same unknown word: only their seeds tell them apart."""
    first, second = build_teacher(f"stable-diffusion:{diffusion_folder}").encode(["qqq", "www"])
    assert (first != second).any()


def test_a_scheduler_that_was_used_changes_no_vector(diffusion_folder, quick_recipe, monkeypatch):
    """On a GPU image to image moves the scheduler's table of noise levels there, where a picture
    in float16 reads them in float16. Here the table is rounded where it would be moved."""
    diffusers = pytest.importorskip("diffusers")
    add_noise = diffusers.PNDMScheduler.add_noise
    moved = []

    def add_noise_on_a_gpu(scheduler, *args):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.half().float()
        moved.append(scheduler)
        return add_noise(scheduler, *args)

    monkeypatch.setattr(diffusers.PNDMScheduler, "add_noise", add_noise_on_a_gpu)
    teacher = build_teacher(f"stable-diffusion:{diffusion_folder}")
    first = teacher.encode(["a mouse"])
    assert len(moved) == 1
    np.testing.assert_array_equal(teacher.encode(["a piano", "a mouse"])[1], first[0])


def arithmetic():
    """What a program may have chosen, and fixed_arithmetic() sets aside."""
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.deterministic


@pytest.fixture
def fast_arithmetic(monkeypatch):
    """The choices of a program that wants speed, until the test ends."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield arithmetic()
    torch.set_float32_matmul_precision(before)


@needs_pillow
@pytest.mark.parametrize("spec, encoder", [
    ("clip:{clip}", None), ("images:{pictures}", "clip:{clip}"),
    ("stable-diffusion:{diffusion}", None), ("stable-diffusion:{diffusion}", "vae:{diffusion}/vae"),
])
def test_every_model_computes_in_one_way_and_leaves_the_program_its_own(
        spec, encoder, clip_folder, diffusion_folder, pictures, quick_recipe, fast_arithmetic):
    """train.py allows TF32, which would make another vector than teacher.py did for the cache."""
    folders = {"clip": clip_folder, "diffusion": diffusion_folder, "pictures": pictures}
    if encoder:
        encoder = encoder.format(**folders)
    teacher = build_teacher(spec.format(**folders), encoder)
    seen = []

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        """Notes the arithmetic of every matrix product and convolution."""
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(part in str(function) for part in ("mm", "convolution")):
                seen.append(arithmetic())
            return function(*args, **(kwargs or {}))

    with Noting():
        teacher.encode(["a"])
    assert set(seen) == {("highest", False, True)}
    assert arithmetic() == fast_arithmetic


def spy(pipe, calls):
    """Let a pipeline note the keyword arguments of its calls."""
    original = type(pipe)

    class Spied(original):
        def __call__(self, text, **how):
            calls.append(how)
            return super().__call__(text, **how)

    Spied.__name__ = original.__name__
    pipe.__class__ = Spied


def test_stable_diffusion_follows_the_papers_recipe(diffusion_folder):
    """Text to image, 20 steps, guidance 7.5; then image to image, 128 x 128, strength .75."""
    teacher = build_teacher(f"stable-diffusion:{diffusion_folder}")
    calls = []
    for pipe in teacher.pipes:
        spy(pipe, calls)
    vectors = teacher.encode(["a mouse"])
    assert vectors.shape == (1, 1024) and teacher.max_tokens == 12
    for fact in ("20", "7.5", "0.75"):
        assert fact in teacher.name  # another recipe is another teacher
    text_to_image, image_to_image = calls
    for how in calls:
        assert how["num_inference_steps"] == 20 and how["guidance_scale"] == 7.5
    assert "image" not in text_to_image
    assert image_to_image["image"].size == (128, 128) and image_to_image["strength"] == 0.75


def test_a_picture_encoder_takes_the_place_of_the_latent(diffusion_folder, quick_recipe):
    diffusers = pytest.importorskip("diffusers")
    teacher = build_teacher(f"stable-diffusion:{diffusion_folder}", f"vae:{diffusion_folder}/vae")
    picture = teacher.picture("a mouse").resize((128, 128), 1)
    vae = diffusers.AutoencoderKL.from_pretrained(f"{diffusion_folder}/vae")
    image = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, 128, 128)
    with torch.no_grad():
        latent = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
    assert latent.shape == (1, 4, 16, 16) and teacher.dim == 1024
    np.testing.assert_allclose(teacher.encode(["a mouse"])[0], latent.ravel().numpy(), atol=1e-4)
    assert build_teacher(f"stable-diffusion:{diffusion_folder}", "pixels").name != teacher.name


# ---- a paid image API ----

KEY = "sk-very-secret-0123456789"


def drawn(text):
    """The picture file that the API below makes of a text."""
    file = io.BytesIO()
    coloured(len(text)).save(file, "png")
    return file.getvalue()


def in_base64(text, picture=None):
    """An answer of the API that holds the picture itself."""
    content = base64.b64encode(picture or drawn(text)).decode()
    return json.dumps({"data": [{"b64_json": content}]}).encode()


def as_address(url):
    """An answer of the API that tells where the picture lies."""
    return json.dumps({"data": [{"url": url}]}).encode()


def answer_at_once(request, text):
    respond(request, in_base64(text))


@pytest.fixture
def api(loopback, monkeypatch):
    """api(answer) -> spec; answer(request, text) writes the response; api.asked counts requests."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")

    def serve(answer):
        def check(request, body):
            if request.command != "POST":
                assert request.headers["Authorization"] is None  # the key is for the endpoint alone
                respond(request, drawn(request.path))
                return
            fields = json.loads(body)
            assert request.headers["Authorization"] == f"Bearer {KEY}"
            assert fields["n"] == 1
            serve.asked[fields["prompt"]] += 1
            serve.fields = fields
            answer(request, fields["prompt"])

        serve.url = loopback(check)
        return f"api:{serve.url}/v1#model=crayon&size=256x256"

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    serve.asked = Counter()
    serve.waits = []
    monkeypatch.setattr(data.time, "sleep", serve.waits.append)
    return serve


def test_the_api_gets_text_model_and_size_and_answers_in_base64_or_with_an_url(api):
    def answer(request, text):
        if text == "a":
            respond(request, in_base64(text))
        else:
            respond(request, as_address(f"{api.url}/made/{text}"))

    teacher = build_teacher(api(answer))
    vectors = teacher.encode(["a", "bb"])
    assert api.fields == {"model": "crayon", "size": "256x256", "prompt": "bb", "n": 1}
    assert vectors.shape == (2, 768) and (vectors[0] != vectors[1]).any()
    assert "crayon" in teacher.name


def test_fields_are_sent_as_json_values_where_they_are_such(api):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, in_base64(text)))
    fields = ('size=512x512&steps=4&scale=7.5&transparent=true&user=null&seed="4"&style={"a":[1]}'
              "&tag=NaN&top=1e999&quality=high+end&big=" + "9" * 5000)
    build_teacher(f"{spec.partition('#')[0]}#{fields}").encode(["a"])
    assert api.fields == {"n": 1, "prompt": "a", "size": "512x512", "steps": 4, "scale": 7.5,
                          "transparent": True, "user": None, "seed": "4", "style": {"a": [1]},
                          "tag": "NaN", "top": "1e999", "quality": "high end", "big": "9" * 5000}
    assert type(api.fields["steps"]) is int

def test_an_address_keeps_its_query_and_each_request_says_who_asks(loopback, monkeypatch):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen = []

    def answer(request, body):
        seen.append((request.path, request.headers["User-Agent"]))
        picture = {"url": f"{url}/made?sig=1&x"} if body else None
        respond(request, json.dumps({"data": [picture]}).encode() if body else drawn("a"))

    url = loopback(answer)
    for path in ("/v1", "/v1/images/generations", "/v1/"):
        build_teacher(f"api:{url}{path}?version=2024-02-01#model=crayon").encode(["a"])
    assert set(seen) == {("/v1/images/generations?version=2024-02-01", "armada-teacher"),
                         ("/made?sig=1&x", "armada-teacher")} and len(seen) == 6

@pytest.mark.parametrize("field, prefix", [
    ("url", "data:image/png;base64,"),
    ("b64_json", "data:image/png;base64,"),
    ("url", "DATA:;base64,")])
def test_a_data_url_is_the_picture_itself(api, field, prefix):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    encoded = prefix + base64.b64encode(drawn("a")).decode()
    teacher = build_teacher(api(lambda request, text: respond(
        request, json.dumps({"data": [{field: encoded, "revised_prompt": "b"}]}).encode())))
    assert (teacher.encode(["a"])[0] == teacher.see(coloured(1)).astype(np.float32)).all()

NO_PICTURES = {  # what is wrong with an answer: (the answer, what is told of it)
    "an error": (b'{"error": {"message":\n "your credit is used up"}}', "your credit is used up"),
    "no pictures": (b'{"data": []}', "data"),
    "an empty picture": (b'{"data": [{}]}', "data"),
    "a list": (b"[1]", "1"),
    "a number": (b"5", "5"),
    "null": (b"null", "null"),
    "nothing": (b"", "empty"),
    "a number for an address": (b'{"data": [{"url": 5}]}', "5"),
    "null for an address": (b'{"data": [{"url": null}]}', "null"),
    "a list of addresses": (b'{"data": [{"url": ["http://a"]}]}', "http://a"),
    "a number for a picture": (b'{"data": [{"b64_json": 7}]}', "7"),
    "neither": (b'{"data": [{"url": "", "b64_json": null}]}', "null"),
    "a data URL of words": (b'{"data": [{"url": "data:,words"}]}', "words"),
    "words in base64": (b'{"data": [{"b64_json": "bm8gcGljdHVyZQ=="}]}', "bm8g"),
    "an empty data URL": (b'{"data": [{"url": "data:"}]}', "data:"),
    "nested too deeply": (b"[" * 100_000, r"\[\[\["),
    "a page": (b"<h1>be back soon</h1>", "be back soon"),
    "a long number": (b"9" * 5000, "999"),
    "half a picture": (in_base64("", b"\x89PNG\r\n\x1a\n half of one"), "b64_json"),
    "the key, far behind": (f'{{"error": "{"a" * 280} no such key {KEY}"}}'.encode(), "aaa"),
    "the key": (f'{{"error": "{KEY} is no key"}}'.encode(), r"\*\*\* is no key"),
    "what a terminal obeys": (b"\x1b[2J\xff\xfe", "2J"),
}


@pytest.mark.parametrize("answer, says", NO_PICTURES.values(), ids=NO_PICTURES)
def test_a_complete_answer_that_holds_no_picture_is_told_at_once_in_the_servers_words(
        api, answer, says):
    """It was paid for: to ask again would be to pay again."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    teacher = build_teacher(api(lambda request, text: respond(request, answer)))
    with pytest.raises(UserError, match=f"on 'a': the answer holds no picture: .*{says}") as error:
        teacher.encode(["a"])
    told = str(error.value)
    assert api.asked == {"a": 1} and api.waits == []
    assert "\n" not in told and "\x1b" not in told and len(told) < 500 and KEY[:8] not in told

def test_a_url_that_is_no_text_does_not_hide_the_picture_beside_it(api):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    picture = {"url": None, "b64_json": base64.b64encode(drawn("a")).decode()}
    answer = json.dumps({"data": [picture]}).encode()
    teacher = build_teacher(api(lambda request, text: respond(request, answer)))
    assert teacher.encode(["a"]).shape == (1, 768)

def test_the_address_of_a_page_that_is_no_picture_is_told_at_once(api, loopback):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    asked = []

    def expired(request, body):
        asked.append(request.path)
        respond(request, b"<p>expired</p>")

    other = loopback(expired)
    teacher = build_teacher(api(lambda request, text: respond(
        request, json.dumps({"data": [{"url": f"{other}/a.png"}]}).encode())))
    with pytest.raises(UserError, match="the answer holds no picture: <p>expired</p>"):
        teacher.encode(["a"])
    assert asked == ["/a.png"] and api.asked == {"a": 1}

@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_without_a_length_is_asked_again_only_where_it_was_cut(api, chunked):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")

    def answer(request, text):
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        content = in_base64(text)
        if api.asked[text] == 1:
            content = content[:50]
        if chunked:
            request.send_header("Transfer-Encoding", "chunked")
            content = b"%x\r\n" % len(content) + content + b"\r\n"
            if api.asked[text] > 1:
                content += b"0\r\n\r\n"
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(content)

    assert build_teacher(api(answer)).encode(["a"]).shape == (1, 768)
    assert api.asked == {"a": 2} and api.waits == [1]

def test_an_answer_may_neither_be_huge_nor_trickle_for_ever(api, monkeypatch):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    monkeypatch.setattr(teacher_module, "ANSWER_BYTES", 100_000)
    monkeypatch.setattr(teacher_module, "ANSWER_SECONDS", 0.2)
    let_go = threading.Event()

    def answer(request, text):
        if text == "huge":
            return respond(request, b" " * 100_001)
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        while not let_go.wait(0.02):
            request.wfile.write(b" ")

    teacher = build_teacher(api(answer))
    for text, says in (("huge", "is over 0.0953674 MiB long"),
                       ("slow", "was not complete after 0.2 seconds")):
        with pytest.raises(UserError, match=f"on '{text}': the answer {says}"):
            teacher.encode([text])
    let_go.set()
    assert api.asked == {"huge": 1, "slow": 1}  # paid for once each

def test_two_hundred_texts_of_which_some_fail_at_first_are_each_bought_once(api, tmp_path, capfd):
    """429, 500, a cut answer and none are asked again.

    What came is kept before the next is asked.
    """
    failed = Counter()
    rng = np.random.default_rng(0)

    def answer(request, text):
        mode = rng.integers(60)
        whole = in_base64(text)
        failed[text] += mode < 4
        if mode == 0:
            respond(request, b"slow down", 429, Retry_After="3")
        elif mode == 1:
            respond(request, b"oops", 500)
        elif mode == 2:
            respond(request, whole[:90], length=len(whole))
        elif mode == 3:  # the server hangs up without a word
            request.close_connection = True
        else:
            respond(request, whole)

    texts = [f"text number {i}" for i in range(200)]
    readers, made = opened(build_teacher(api(answer)), tmp_path, texts[:150], texts[150:])
    assert made == 200 and sum(failed.values()) >= 5
    assert {text: api.asked[text] - failed[text] for text in texts} == dict.fromkeys(texts, 1)
    assert set(api.waits) <= {1, 2, 3, 4} and 3 in api.waits
    assert np.isfinite(readers["train"](range(150))).all()
    assert readers["dev"](range(50)).shape == (50, 768)
    for size, made in ((256, 0), (512, 2)):  # another size is another picture
        teacher = build_teacher(f"api:{api.url}/v1#model=crayon&size={size}x{size}")
        assert opened(teacher, tmp_path, texts[:2], texts[:1])[1] == made
    assert_no_key_in(tmp_path)
    assert KEY not in "".join(capfd.readouterr())


def assert_no_key_in(folder):
    for path in folder.rglob("*"):
        assert not (path.is_file() and KEY.encode() in path.read_bytes())


def test_another_encoder_looks_at_the_pictures_that_were_bought(api, clip_folder, tmp_path):
    spec = api(answer_at_once)
    opened(build_teacher(spec), tmp_path, ["a", "b"], ["c"])
    _, made = opened(build_teacher(spec, f"clip:{clip_folder}"), tmp_path, ["a", "b"], ["c"])
    assert made == 3 and set(api.asked.values()) == {1}


def test_a_key_with_a_line_break_is_sent_without_and_never_shown(api, monkeypatch, tmp_path):
    """urllib refuses such a header and shows it in its error."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    _, made = opened(build_teacher(api(answer_at_once)), tmp_path, ["a"], ["b"])
    assert made == 2


@pytest.mark.parametrize("status", [401, 400, 404])
def test_a_refusal_stops_at_once_says_why_and_shows_no_key(api, status, tmp_path):
    spec = api(lambda request, text: respond(request, f"bad key {KEY}".encode(), status))
    with pytest.raises(UserError, match=f"(?s)on 'a': {status}.*bad key") as error:
        opened(build_teacher(spec), tmp_path, ["a"], ["b"])
    assert sum(api.asked.values()) == 1 and KEY not in str(error.value)


def test_an_api_that_stays_down_is_given_up_with_what_was_made_kept(api, tmp_path):
    def answer(request, text):
        if text == "a":
            respond(request, in_base64(text))
        else:
            respond(request, b"", 503)

    with pytest.raises(UserError, match="on 'b': 503"):
        opened(build_teacher(api(answer)), tmp_path, ["a", "b"])
    assert api.asked == {"a": 1, "b": 6} and api.waits == [1, 2, 4, 8, 16]
    assert len(Cache(tmp_path).keys()) == 2  # the picture of a and its vector


def test_the_budget_stops_before_more_is_spent(api, tmp_path):
    spec = api(answer_at_once)
    with pytest.raises(UserError, match="--max-pictures 2 are made, 3 to go: type the same again"):
        opened(build_teacher(spec), tmp_path, ["a", "b", "c", "d"], most=2)
    assert sum(api.asked.values()) == 2
    _, made = opened(build_teacher(spec), tmp_path, ["a", "b", "c", "d"], most=3)
    assert made == 3 and set(api.asked.values()) == {1}


@needs_pillow
@pytest.mark.parametrize("spec, says", [
    ("api:", "write api:https"), ("api:example.org/v1", "write api:https"),
    ("api:ftp://host", "api:https"), ("api:https://me:password@host/v1", "OPENAI_API_KEY"),
    ("api:https://host/v1?api_key=1", "OPENAI_API"),
    ("api:https://host/v1#API_KEY=1", "OPENAI_API_KEY"), ("api:https://", "write api:https"),
    ("api:https://password@host/v1", "OPENAI_API_KEY"),
    ("api:https://host?sig=password", "OPENAI_API_KEY"),
    ("api:https://host/v1?a=1&Access_Token=password", "OPENAI_API_KEY"),
    ("api:https://host/v1?client%5Fsecret=password", "OPENAI_API_KEY"),
    (f"api:https://host/{KEY}/v1", "OPENAI_API_KEY"),
    (f"api:https://host/v1#user={KEY}", "OPENAI_API_KEY"),
    ("api:https://host\\@password/v1", "write api:https"),
    ("api:https://ho st/v1", "write api:https"),
    ("api:https://host:x/v1", "write api:https"), ("api:https://host/\x1b[2J", "write api:https"),
    ("api:https://host/\ud800", "write api:https"), ("api:https://h\u00f6st/", "write api:https"),
    ("api:http://example.org/v1", "use https")])
def test_an_address_that_would_give_the_key_away_is_refused(spec, says, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=says) as error:
        build_teacher(spec)
    assert "password" not in str(error.value) and KEY not in str(error.value)

def test_a_key_of_signs_that_no_header_takes_is_refused_unseen(monkeypatch):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    for key in ("sk-\u2019secret", "sk-\x7fsecret", "sk-\udcffsecret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY holds signs") as error:
            build_teacher("api:https://127.0.0.1:9/v1")
        assert "secret" not in str(error.value)


def test_a_key_that_a_long_answer_repeats_is_not_shown_by_halves(api, tmp_path):
    words = b"x" * 190 + f" bad key {KEY}".encode()
    spec = api(lambda request, text: respond(request, words, 401))
    with pytest.raises(UserError) as error:
        opened(build_teacher(spec), tmp_path, ["a"])
    assert "bad key ***" in str(error.value) and KEY[:8] not in str(error.value)


def test_two_encoders_and_fields_in_another_order_buy_no_picture_twice(api, clip_folder, tmp_path):
    """Not even at the same time."""
    spec = api(answer_at_once)
    base, _, _ = spec.partition("#")
    turned = f"{base}#size=256x256&model=crayon"
    three = [(spec, None), (spec, f"clip:{clip_folder}"), (turned, None)]

    def open_one(arguments):
        opened(build_teacher(*arguments), tmp_path, ["a", "b", "c"])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(open_one, three))
    assert set(api.asked.values()) == {1} and len(api.asked) == 4


def test_the_key_does_not_follow_a_redirect_to_another_host(api, loopback):
    seen = []

    def elsewhere(request, body):
        seen.append(request.headers.get("Authorization"))
        respond(request, in_base64("a"))

    other = loopback(elsewhere)
    spec = api(lambda request, text: respond(request, b"", 302, Location=f"{other}/moved"))
    assert build_teacher(spec).encode(["a"]).shape == (1, 768)
    assert seen == [None]


def test_an_answer_that_points_to_a_file_of_ours_is_refused(api, tmp_path):
    coloured(1).save(tmp_path / "mine.png")
    answer = as_address(f"file://{tmp_path}/mine.png")
    spec = api(lambda request, text: respond(request, answer))
    with pytest.raises(UserError, match="is not on the web"):
        build_teacher(spec).encode(["a"])


# ---- the cache ----

class Counting(Teacher):
    """A costly teacher that remembers what it was asked."""
    name = "counting"
    dim = 3

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        return np.array([[len(text), ord(text[0]), 1] for text in texts], np.float32)


def test_each_distinct_text_is_made_once_and_paired_by_content(tmp_path):
    teacher = Counting()
    texts = ["bb", "a", "bb", "ccc"]
    readers, made = opened(teacher, tmp_path, texts, ["a"])
    first = readers["train"](range(4))
    assert sorted(teacher.asked) == ["a", "bb", "ccc"] and made == 3
    np.testing.assert_allclose(first[:, 0] / first[:, 2], [2, 1, 2, 3], rtol=1e-6)
    readers, _ = opened(teacher, tmp_path, [*texts[::-1], "d"], ["a"])
    again = readers["train"](range(5))
    assert teacher.asked[3:] == ["d"]
    np.testing.assert_allclose(again[:, 0] / again[:, 2], [3, 2, 1, 2, 1], rtol=1e-6)


def test_a_teacher_with_another_name_shares_nothing(tmp_path):
    opened(Counting(), tmp_path, ["a"], ["a"])
    other = Counting()
    other.name = "counting, another parameter"
    opened(other, tmp_path, ["a"], ["a"])
    assert other.asked == ["a"]


def test_only_the_limit_is_paid_for(tmp_path):
    teacher = Counting()
    readers, made = opened(teacher, tmp_path, ["a", "b", "c"], ["d", "e"], limit=2, eval_limit=1)
    assert made == 3 and sorted(teacher.asked) == ["a", "b", "d"]
    assert len(readers["train"]([0, 1])) == 2


def damage(folder, text):
    cache = Cache(folder)
    key = cache.key("counting", text)
    cache.db.execute("UPDATE made SET value = zeroblob(12) WHERE key = ?", (key,))


@pytest.mark.parametrize("text", ["bb", "a dev text"])
def test_a_damaged_entry_is_made_again_when_the_cache_is_opened(tmp_path, text):
    teacher = Counting()
    opened(teacher, tmp_path, ["a", "bb"])
    damage(tmp_path, text)
    _, made = opened(teacher, tmp_path, ["a", "bb"])
    assert made == 1 and teacher.asked[3:] == [text]


def test_an_entry_that_is_damaged_since_is_never_used_but_named_and_made_again_by_the_next_start(
        tmp_path):
    teacher = Counting()
    readers, _ = opened(teacher, tmp_path, ["a", "bb"])
    before = readers["train"]([0, 1])
    damage(tmp_path, "bb")
    says = "no finite vector of .* for 'train.tsv:2': start once more"
    with pytest.raises(UserError, match=says):
        readers["train"]([0, 1])
    readers, made = opened(teacher, tmp_path, ["a", "bb"])
    assert made == 1 and teacher.asked[3:] == ["bb"]
    assert (readers["train"]([0, 1]) == before).all()


def test_a_vector_that_is_missing_at_training_time_is_an_error_that_names_the_example(tmp_path):
    readers, _ = opened(Counting(), tmp_path, ["a", "bb", "c"])
    key = Cache.key("counting", "c")
    Cache(tmp_path).db.execute("DELETE FROM made WHERE key = ?", (key,))
    assert readers["train"]([0, 1]).shape == (2, 3)
    with pytest.raises(UserError, match="'train.tsv:3'"):
        readers["train"]([1, 2])


def test_a_vector_that_is_not_finite_is_an_error_that_names_the_text_and_is_not_kept(tmp_path):
    class Infinite(Counting):
        def encode(self, texts):
            vectors = super().encode(texts)
            vectors[texts.index("bad")] = np.inf
            return vectors

    with pytest.raises(UserError, match="no finite vector of .* for 'bad'"):
        opened(Infinite(), tmp_path, ["good", "bad"])
    recovered = Counting()  # the next try asks again
    opened(recovered, tmp_path, ["good", "bad"])
    assert "bad" in recovered.asked


def test_a_vector_of_another_width_than_the_teacher_says_is_refused(tmp_path):
    teacher = Counting()
    teacher.dim = 4
    with pytest.raises(UserError, match="no finite vector of 4 for"):
        opened(teacher, tmp_path, ["a"])


def test_a_changed_teacher_of_the_same_name_is_asked_for_a_new_one(tmp_path):
    """Its old vectors are whole: to start once more would find them again for ever."""
    class Changed(Counting):
        dim = 4

        def encode(self, texts):
            return np.ones((len(texts), 4), np.float32)

    opened(Counting(), tmp_path, ["a"])
    says = "of 3 numbers, not 4, by the name 'counting': changed code wants a new name"
    with pytest.raises(UserError, match=says):
        opened(Changed(), tmp_path, ["a"])


@pytest.mark.parametrize("where", [0, 4096])  # the header, a page
def test_a_damaged_cache_file_is_named(tmp_path, where):
    texts = [f"text {i}" for i in range(200)]
    opened(Counting(), tmp_path, texts)
    Cache(tmp_path).sql("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it into the one file
    with open(tmp_path / "teachers.sqlite", "r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 4096)
    with pytest.raises(UserError, match="teachers.sqlite: .*if damaged, delete it"):
        opened(Counting(), tmp_path, texts)


@pytest.mark.parametrize("value", ["'a text'", "NULL", "5", "1.5", "CAST(x'ff' AS TEXT)", "x''"])
def test_a_cache_value_that_is_no_blob_is_made_again(tmp_path, value, capsys):
    teacher = Counting()
    opened(teacher, tmp_path, ["a", "bb"])
    key = Cache.key("counting", "bb")
    for column in ("value", "crc"):
        Cache(tmp_path).db.execute(f"UPDATE made SET {column} = {value} WHERE key = {key}")
        main(["--verify", "--cache-dir", str(tmp_path)])
        assert "2 entries are whole; thrown away as damaged: 1" in capsys.readouterr().out
        Cache(tmp_path).db.execute(f"INSERT OR REPLACE INTO made VALUES ({key}, 0, x'')")
        Cache(tmp_path).db.execute(f"UPDATE made SET {column} = {value} WHERE key = {key}")
        _, made = opened(teacher, tmp_path, ["a", "bb"])
        assert made == 1
    assert teacher.asked[3:] == ["bb", "bb"]

@pytest.mark.parametrize("spoil, says", [
    (lambda path: path.mkdir(), "unable to open"),
    (lambda path: Path(f"{path}.lock").mkdir(), "Is a directory"),
    (lambda path: path.write_bytes(b"no database " * 999), "file is not a database"),
    (lambda path: sqlite3.connect(path).execute(
        "CREATE TABLE made (key INTEGER PRIMARY KEY, vector BLOB)"),
     "of another program"),
    (lambda path: sqlite3.connect(path).execute("CREATE TABLE made (key TEXT, crc, value BLOB)"),
     "of another program"),
    (lambda path: sqlite3.connect(path).execute(
        "CREATE VIEW made AS SELECT 1 AS key, 2 AS crc, 3 AS value"),
     "of another program")])
def test_a_cache_file_that_is_none_is_one_line(tmp_path, capsys, spoil, says):
    spoil(tmp_path / "teachers.sqlite")
    with pytest.raises(SystemExit) as stop:
        main(["--verify", "--cache-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{tmp_path}/teachers.sqlite" in error and says in error
    assert error.count("\n") == 1

def test_what_is_printed_is_one_line_even_of_a_folder_with_a_line_break(tmp_path, capsys):
    main(["--verify", "--cache-dir", f"{tmp_path}/a\nb\x1b[2J"])
    out = capsys.readouterr().out
    assert r"/a\nb\x1b[2J/teachers.sqlite: 0 entries are whole" in out
    assert out.count("\n") == 1 and "\x1b" not in out

def test_a_put_that_fails_in_the_middle_leaves_nothing_open(tmp_path):
    """Neither half of its entries nor a transaction, which would keep all others out."""
    cache = Cache(tmp_path)
    with pytest.raises(TypeError):
        cache.put({1: b"whole", 2: "no bytes"})
    cache.sql("PRAGMA max_page_count = 10")  # as on a full disk
    with pytest.raises(UserError, match="teachers.sqlite: database or disk is full"):
        cache.put({3: b"whole", 4: bytes(10**6)})
    assert cache.keys().tolist() == []
    Cache(tmp_path).put({5: b"another's"})
    cache.put({6: b"whole"})
    assert cache.keys().tolist() == [5, 6]

@pytest.mark.parametrize("call, text, says", [
    (lambda text: Cache.key("a teacher", text), "\ud800", "a teacher: "),
    (lambda text: Cache.key(text, "a"), "\ud800", ""),
    (lambda text: build_teacher("painter").encode([text]), "a \udcff", "the text 'a "),
    (lambda text: build_teacher("painter").encode([text]), "a \ud800 cat", "the text 'a ")])
def test_a_lone_surrogate_is_named_before_it_reaches_a_key_or_a_seed(call, text, says):
    """Such a text cannot be encoded as UTF-8."""
    with pytest.raises(UserError, match=f"{says}.*half of a character"):
        call(text)

def test_clip_names_a_text_with_a_lone_surrogate(clip_folder):
    with pytest.raises(UserError, match="the text .a .*half of a character"):
        build_teacher(f"clip:{clip_folder}").encode(["a cat", "a \ud800"])

def fails(*_):
    raise sqlite3.OperationalError("a bug\nof mine")

@pytest.mark.parametrize("broken, says", [
    (dict(items=fails), r"items\('train', texts\) raised OperationalError: a bug of mine"),
    (dict(items=lambda split, texts: None), "items.* raised TypeError"),
    (dict(items=lambda split, texts: texts[1:]),
     "returned 1 items for 2 texts: let it return one for each"),
    (dict(tokenizer=fails, max_tokens=5), "tokenizer raised OperationalError: a bug of mine"),
    (dict(tokenizer=lambda text: {}, max_tokens=5), "tokenizer raised KeyError"),
    (dict(costly=False, reader=fails), r"reader\('train', texts\) raised OperationalError"),
    (dict(costly=False, reader=lambda split, texts: None), "failed on 'train.tsv:1': TypeError")])
def test_an_error_in_an_added_teacher_is_one_line_that_names_it(tmp_path, broken, says):
    teacher = Counting()
    vars(teacher).update(broken)
    with pytest.raises(UserError, match=f"^counting.*{says}") as error:
        opened(teacher, tmp_path, ["a", "bb"])
    assert "\n" not in str(error.value)

def test_items_of_any_sort_of_sequence_are_taken(tmp_path):
    teacher = Counting()
    teacher.items = lambda split, texts: (text for text in texts)
    assert opened(teacher, tmp_path, ["a", "bb"], ["ccc"])[1] == 3

def test_verify_finds_what_is_damaged(tmp_path, capsys):
    opened(Counting(), tmp_path, ["a", "bb"])
    damage(tmp_path, "a")
    for damaged in (1, 0):
        main(["--verify", "--cache-dir", str(tmp_path)])
        out = capsys.readouterr().out
        assert "2 entries are whole" in out and f"thrown away as damaged: {damaged}" in out


def test_two_processes_may_fill_one_cache_and_ask_for_nothing_twice(tmp_path):
    class Slow(Counting):
        at_once = 1

        def encode(self, texts):
            time.sleep(0.01)
            return super().encode(texts)

    teachers = [Slow() for _ in range(4)]
    texts = [f"{i}" for i in range(30)]
    keys = np.array([Cache.key("counting", text) for text in texts])

    def fill_one(teacher):
        return fill(teacher, texts, keys, Cache(tmp_path))

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(fill_one, teachers))
    asked = sum((teacher.asked for teacher in teachers), [])
    assert sum(made) == 30 and sorted(asked) == sorted(texts)


@needs_pillow
def test_a_filling_that_is_killed_asks_only_for_what_is_missing_when_started_again(
        loopback, tmp_path):
    """The command, a real SIGKILL in the middle, the command again."""
    asked = Counter()
    enough = threading.Event()

    def answer(request, body):
        text = json.loads(body)["prompt"]
        asked[text] += 1
        if len(asked) == 40:
            enough.set()
        respond(request, in_base64(text))

    command = [sys.executable, "teacher.py", "--task", "objects", "--limit", "60",
               "--teacher", f"api:{loopback(answer)}", "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    assert enough.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "560 vectors of 768 numbers" in again.stdout
    assert len(asked) == 560
    assert sum(asked.values()) <= 561  # one may have been on its way when the kill came
    assert_no_key_in(tmp_path)


# ---- the command line ----

def test_vectors_are_made_ahead_and_found_in_training(clip_folder, tmp_path, capsys):
    command = ["--task", "objects", "--limit", "20", "--teacher", f"clip:{clip_folder}",
               "--cache-dir", str(tmp_path)]
    for made in (520, 0):
        main(command)
        expected = f"520 vectors of 10 numbers, 0.0 MB; {made} made now"
        assert expected in capsys.readouterr().out
    teacher = build_teacher(f"clip:{clip_folder}")
    readers, made = open_vectors(
        teacher, TASKS["objects"], load_task("objects"), tmp_path, limit=20)
    assert made == 0 and readers["train"](range(20)).shape == (20, 10)


@needs_pillow
@pytest.mark.parametrize("flags, says", [
    ("", "give --task or --verify"),
    ("--task cb --max-pictures -1", "at least 0"),
    ("--task cb --limit 0", "--limit at least 1"),
    ("--task objcts", "did you mean objects"),
    ("--task objects --teacher clipp", "did you mean clip"),
    ("--max-picture 3", "did you mean --max-pictures"),
    ("--task objects --teacher images:/nowhere", "manifest.jsonl"),
    ("--task objects --teacher images:/nowhere --picture-encoder pixel", "mean pixels"),
    ("--task objects --teacher painter --picture-encoder pixels", "gives no pictures"),
    ("--verify --cache-dir /dev/null/here", "/dev/null"),
    ("--limit few", "invalid int"),
])
def test_a_wrong_command_is_one_line_and_status_2(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1

def test_a_name_that_the_console_cannot_show_is_one_line_all_the_same():
    """An ASCII locale, as under cron."""
    told = subprocess.run([sys.executable, "teacher.py", "--task", "caf\u00e9"], cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
                          capture_output=True)
    assert told.returncode == 2 and told.stderr.count(b"\n") == 1 and b"unknown task" in told.stderr


def test_the_noise_of_a_dose_is_each_texts_own():
    """One noise for all texts would be a constant, which a student can subtract."""
    texts = [f"a {name}" for name in list(OBJECTS)[:20]]
    noise = build_teacher("painter:0").encode(texts).astype(float)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosines = noise @ noise.T - np.eye(20)
    assert abs(cosines).max() < 0.2


def test_a_dose_keeps_the_contract_too():
    """The whole picture, which the table above builds, holds no noise."""
    check_contract(Offline("painter:0.5", "painter:0.25", TEXTS, second_process=True))
