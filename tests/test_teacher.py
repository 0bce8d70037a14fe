"""Black-box teachers and the vectors they leave. Read beside teacher.py."""
import base64
import importlib.util
import io
import json
import os
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

import numpy as np
import pytest
import torch
import transformers

import data
import teacher as teacher_module
from data import OBJECTS, TASKS, UserError, load_task
from student import _tiny
from teacher import (Cache, Pictures, Teacher, build_teacher, fill, main, open_picture, open_vectors,
                     show_on_white)
from tests.conftest import respond

ROOT = Path(__file__).resolve().parent.parent

TEXTS = ["is a mouse bigger than a piano?", "is a piano bigger than a mouse?", "the committee adjourned", "",
         "a bus, a cat and a pea"]

# ---- the painter -------------------------------------------------------------------------------------------
def test_a_text_gives_the_same_picture_alone_in_a_list_and_in_another_order():
    teacher = build_teacher("painter:.5")
    together = teacher.encode(TEXTS)
    assert together.shape == (5, teacher.dim) and together.dtype == np.float32
    assert (together == np.concatenate([build_teacher("painter:.5").encode([text]) for text in TEXTS])).all()
    assert (together[::-1] == teacher.encode(TEXTS[::-1])).all()
    assert teacher.encode([]).shape == (0, 1024)

def test_the_painter_draws_the_larger_object_larger_on_its_own_side_of_the_canvas():
    picture = build_teacher("painter").encode([TEXTS[0], TEXTS[1]]).reshape(2, 4, 16, 16)
    left, right = picture[:, 3, :, :8].sum((1, 2)), picture[:, 3, :, 8:].sum((1, 2))
    assert left[0] < right[0] and left[1] > right[1]

def test_covered_area_grows_with_size_among_objects_of_one_shape():
    """What the student can learn from the picture and not from 120 sentences."""
    for shape in ("disc", "box", "bar", "cone"):
        names = sorted((n for n in OBJECTS if OBJECTS[n][2] == shape), key=lambda n: OBJECTS[n][0])
        area = build_teacher("painter").encode(names).reshape(-1, 4, 256)[:, 3].sum(1)
        assert (np.diff(area) >= 0).all() and area[-1] > 3 * area[0]

def test_the_picture_to_look_at_is_the_painting_on_white_paper():
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    pixels = np.asarray(build_teacher("painter").picture("sofa"))  # green, in the middle
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[8, 8].argmax() == 1

def test_any_text_has_a_picture_of_its_own_even_where_the_painter_knows_no_word():
    a, b = build_teacher("painter").encode(["the committee adjourned", "the committee met"])
    assert (a != 0).any() and (a != b).any()

def test_the_dose_mixes_picture_and_noise_of_equal_power():
    texts = [f"a {a} or a {b}" for a in list(OBJECTS)[:8] for b in list(OBJECTS)[-8:]]
    picture, half, none = (build_teacher(f"painter:{rho}").encode(texts) for rho in (1, 0.5, 0))

    def power(x):
        return (x.astype(float) ** 2).mean()

    assert (power(half) == pytest.approx(power(picture), rel=0.05)
            and power(none) == pytest.approx(power(picture), rel=0.05))

    def share(x):  # regression slope on the picture
        return (x.astype(float) * picture).mean() / power(picture)

    assert share(half) == pytest.approx(0.5, abs=0.03) and share(none) == pytest.approx(0, abs=0.03)

# ---- specs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec, says", [
    ("paintr", "unknown teacher 'paintr': did you mean painter"), ("painter:2", "dose RHO from 0"),
    ("painter:x", "dose RHO from 0"), ("painter:nan", "dose RHO from 0"),
    ("vectors:", "train.npy is no readable array"), ("vectors:/nowhere", "/nowhere/train.npy is no readable"),
    ("clip:/nowhere/at all", "no folder here")])
def test_a_teacher_that_cannot_be_had_says_why(spec, says):
    with pytest.raises(UserError, match=says):
        build_teacher(spec)

# ---- ready-made vectors ------------------------------------------------------------------------------------
PLAIN = SimpleNamespace(prompt=lambda example: example.text)  # a task whose examples are texts

def opened(teacher, folder, train, dev=("a dev text",), **more):
    """open_vectors on lists of texts; each row stands in a line of its own of a file named as the split."""
    examples = {split: [SimpleNamespace(text=text, where=f"{split}.tsv:{i + 1}")
                        for i, text in enumerate(texts)] for split, texts in (("train", train), ("dev", dev))}
    return open_vectors(teacher, PLAIN, examples, folder, **more)

@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.standard_normal((6, 5)).astype(np.float16))
    np.save(tmp_path / "dev.npy", rng.standard_normal((3, 5)))
    return tmp_path

def test_row_i_belongs_to_example_i_and_all_are_divided_by_the_training_root_mean_square(folder):
    teacher = build_teacher(f"vectors:{folder}")
    found, made = opened(teacher, folder, "abcdef", "abc", limit=4)
    train, dev = (np.load(folder / f"{split}.npy").astype(np.float32) for split in ("train", "dev"))
    rms = np.sqrt((train[:4].astype(float) ** 2).mean())  # of the rows that are trained on
    assert teacher.dim == 5 and made == 0
    np.testing.assert_allclose(found["train"]([3, 0, 3]), train[[3, 0, 3]] / rms, rtol=1e-6)
    np.testing.assert_allclose(found["dev"](range(3)), dev / rms, rtol=1e-6)
    with pytest.raises(UserError, match="by row, not by text"):
        teacher.encode(["a new text"])

@pytest.mark.parametrize("split, array, says", [
    ("dev", np.zeros((4, 5)), r"dev.npy has shape \(4, 5\), expected \(3, 5\)"),
    ("dev", np.zeros((3, 4)), r"expected \(3, 5\)"), ("train", np.zeros((5, 5)), r"expected \(6, 5\)"),
    ("dev", np.zeros((3, 5), int), "expected floats, in C order"), ("dev", np.zeros(3), "expected floats"),
    ("dev", np.zeros((5, 3)).T, "expected floats, in C order"),  # stored column by column
    ("dev", np.array([[1.0] * 5, [1e200] * 5, [1.0] * 5]), "no finite vector of .* for 'b'"),
    ("dev", np.array([[1.0] * 5, [1.0] * 5, [np.nan] * 5]), "no finite vector of .* for 'c'"),
    ("train", np.array([[1.0] * 5] * 5 + [[np.inf] * 5]), "no finite vector of .* for 'f'"),
    ("dev", np.array([[object()] * 5] * 3), "no readable array")])
def test_vectors_that_do_not_fit_the_examples_are_refused(folder, split, array, says):
    """In the published scripts a missing vector becomes zeros and trains on."""
    np.save(folder / f"{split}.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        opened(build_teacher(f"vectors:{folder}"), folder, "abcdef", "abc")

def npy(shape, kind="'<f4'", order="False", content=bytes(240)):
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content

@pytest.mark.parametrize("file", [
    b"", b"\x93", b"\x93NUMPX" + bytes(90), b"PK\3\4" + bytes(90), b"PK\5\6" + bytes(18), npy("(6, 5)")[:40],
    npy("(6, 5)", content=b""), npy("(10**12, 5)"), npy("(1000000000000, 5)"),
    npy("(99999999999999999999, 5)"), npy("(-6, 5)"), npy("(True, 5)"), npy("(6L, -5L)"),
    npy("(0, 5)"), npy("()"), npy("(6, 5", content=b""),
    npy("(" * 9000), npy("-" * 9000 + "1"), npy("__import__('os').abort()"), npy("(6, 5)", "'|O'"),
    npy("(6, 5)", "[('a', '<f4'), ('b\\n', '<f4')]"), npy("(6, 5)", "'<f99'"), npy("(6, 5)", "{'names': 1}"),
    npy("(6, 5)", "'<c8'"), npy("(6, 5)", "'<M8[s]'"), npy("(6, 5)", order="True"), npy("(6, 5)", order="2")])
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
    with pytest.raises(UserError, match=f"vector for '{where}' whose largest number is .* out of scale"):
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
    np.testing.assert_allclose(found["train"](range(6)), expected, rtol=0.1 if size < 1e-38 else 1e-6)

# ---- CLIP --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of the smallest size, text and image side, as a hub checkpoint holds them."""
    folder = tmp_path_factory.mktemp("clip")
    _, tokenizer = _tiny(TEXTS)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(vocab_size=len(tokenizer), max_position_embeddings=12, eos_token_id=3,
                         bos_token_id=2, pad_token_id=0, projection_dim=10, **small),
        vision_config=dict(image_size=8, patch_size=4, projection_dim=10, **small), projection_dim=10)
        ).save_pretrained(folder)
    if importlib.util.find_spec("PIL"):  # the picture side needs pillow, which is optional
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
                                           ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

def test_clip_gives_the_text_features_of_the_whole_model_whatever_the_neighbours(clip_folder):
    teacher = build_teacher(f"clip:{clip_folder}")
    vectors = teacher.encode(TEXTS)
    assert teacher.dim == 10 and vectors.shape == (5, 10) and vectors.dtype == np.float32
    tokenizer, whole = teacher.tokenizer, transformers.CLIPModel.from_pretrained(clip_folder).eval()
    for text, vector in zip(TEXTS, vectors):
        with torch.no_grad():
            features = whole.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
        np.testing.assert_allclose(vector, features.numpy(), atol=1e-5)

def test_a_model_whose_weights_are_missing_is_no_teacher(model_folder):
    """transformers would fill them in at random, anew in each process."""
    with pytest.raises(UserError, match="is no CLIPTextModelWithProjection: it lacks"):
        build_teacher(f"clip:{model_folder('bert')}")

def test_clip_says_how_many_texts_it_had_to_cut(clip_folder, capsys, tmp_path):
    texts = ["a mouse", "a mouse " * 9, "a piano " * 20]
    opened(build_teacher(f"clip:{clip_folder}"), tmp_path, texts, ["a pea"])
    assert "2 of 4 texts are too long for it and cut" in capsys.readouterr().err

# ---- pictures become vectors -------------------------------------------------------------------------------
def coloured(seed, size=(48, 32)):
    """A picture with a seam, so that a wrong colour range, channel order or crop shows."""
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[:, :size[0] // 2] = 255, 40 * seed % 256, 0
    return image.fromarray(pixels)

def save(image, path):
    image.save(path)
    return path.name

@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures a and b by their text, c by its row."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = [{"text": text, "file": save(coloured(i), folder / f"{text}.png")} for i, text in enumerate("ab")]
    lines.append({"split": "train", "index": 2, "file": save(coloured(2), folder / "c.png")})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

def test_pixels_are_the_colours_from_minus_one_to_one(pictures):
    vector = build_teacher(f"images:{pictures}").encode(["a"]).reshape(16, 16, 3)
    assert vector[8, 2].tolist() == [1, -1, -1] and vector[8, 14].tolist() == [-1, -1, -1]

def test_pictures_are_found_by_text_or_by_row_and_a_replaced_one_is_looked_at_again(pictures, tmp_path):
    teacher = build_teacher(f"images:{pictures}")
    found, made = opened(teacher, tmp_path, ["b", "a", "a third text"], ["a"])
    assert made == 3  # the two a are one
    rows = found["train"](range(3))
    np.testing.assert_array_equal(found["dev"]([0])[0], rows[1])
    assert len({row.tobytes() for row in rows}) == 3
    row = json.dumps({"split": "train", "index": 0, "file": "c.png"})
    with open(pictures / "manifest.jsonl", "a") as file:  # a row's own picture comes before its text's
        print(row, file=file)
    by_row, _ = opened(build_teacher(f"images:{pictures}"), tmp_path, ["b", "a", "a third text"], ["b"])
    np.testing.assert_array_equal(by_row["train"]([0]), by_row["train"]([2]))
    assert (by_row["dev"]([0]) != by_row["train"]([0])).any()  # row 0 of dev is not row 0 of train
    manifest = pictures / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(row, "").rstrip())
    coloured(5, (20, 20)).save(pictures / "b.png")
    again, made = opened(build_teacher(f"images:{pictures}"), tmp_path, ["b", "a", "a third text"], ["a"])
    assert made == 1 and (again["train"]([0]) != rows[0]).any()
    with pytest.raises(UserError, match="lacks 1 train texts, first row 1, 'unseen'"):
        opened(teacher, tmp_path, ["b", "unseen"], ["a"])

def grey(*shades):
    return [[shade] * 3 for shade in shades]

# mode, the bytes of its pixels, what pillow notes beside them, the colours a person sees on white paper
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
    ("YCbCr", bytes([100, 128, 128, 100, 128, 178]), {}, [[100] * 3, [170, 64, 100]]),  # R - Y = 1.402 * 50
    ("HSV", bytes([0, 255, 255, 85, 255, 100]), {}, [[255, 0, 0], [0, 100, 0]]),
    ("LAB", bytes([255, 0, 0, 0, 0, 0, 136, 0, 0]), {}, grey(255, 0, 127)),  # L* of 53.4 is mid grey
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

@pytest.mark.parametrize("mode, content, info, colours", MODES)
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

@pytest.mark.parametrize("transparency", [1, b"\xff\0"])
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
              5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
              8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        exif = image.Exif()
        exif[0x0112] = orientation
        content = in_file(image.fromarray(np.ascontiguousarray(pixels)), form, exif=exif)
        assert (np.asarray(open_picture(content)) == upright).all()
    damaged = in_file(image.fromarray(upright), exif=b"Exif\0\0no exif")
    assert (np.asarray(open_picture(damaged)) == upright).all()

def test_of_an_animation_the_first_frame_is_seen():
    red, blue = (pytest.importorskip("PIL.Image").new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    for form in ("gif", "png", "tiff", "webp"):
        more = {"lossless": True} if form == "webp" else {}
        content = in_file(red, form, save_all=True, append_images=[blue], **more)
        assert np.asarray(open_picture(content))[0, 0].tolist() == [255, 0, 0]

def test_different_pictures_are_different_vectors(tmp_path):
    """End to end: grey of 16 bits, transparency, and what an added teacher draws."""
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    image.new("I;16", (20, 20), 51 * 257).save(tmp_path / "grey.png")
    image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "manifest.jsonl").write_text("\ufeff" + "\n\n".join(
        json.dumps({"text": name, "file": f"{name}.png"}) for name in ("grey", "clear")) + "\n \n", "utf-8")
    vectors = build_teacher(f"images:{tmp_path}").encode(["grey", "clear"])  # a BOM, empty lines
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
    ('{"text": "d", "file": "/etc/passwd"}', "no file inside"), ('{"file": "a.png"}', "manifest.jsonl:4"),
    ('{"text": "d"', "manifest.jsonl:4"), ('{"text": "d", "file": "d.png"}', "no file inside"),
    ("[" * 100_000, "manifest.jsonl:4"), ('{"text": "d", "file": ' + "9" * 5000 + "}", "manifest.jsonl:4"),
    ('{"text": "d", "file": 5}', "4: 5 is no file inside"),
    ('{"text": "d", "file": ["a.png"]}', "no file inside"), ('{"text": "d", "file": ""}', "no file inside"),
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
    with open(pictures / "manifest.jsonl", "a") as file:
        print(line, file=file)
    with pytest.raises(UserError, match=says):
        build_teacher(f"images:{pictures}")

@pytest.mark.parametrize("content", [None, b"\xff\xfe{"])
def test_a_manifest_that_is_a_folder_or_no_text_is_named(tmp_path, content):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(content) if content else manifest.mkdir()
    with pytest.raises(UserError, match="manifest.jsonl cannot be read .*: give each picture a line"):
        build_teacher(f"images:{tmp_path}")

def test_a_picture_that_is_cut_is_named(pictures, tmp_path):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="a.png is not a whole picture"):
        opened(build_teacher(f"images:{pictures}"), tmp_path, ["a"], ["b"])

def test_the_clip_encoder_gives_the_image_features_of_the_whole_model(clip_folder, pictures):
    teacher = build_teacher(f"images:{pictures}", f"clip:{clip_folder}")
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)(coloured(1), return_tensors="pt")
    with torch.no_grad():
        features = whole.get_image_features(**pixels).pooler_output[0]
    assert teacher.dim == 10
    np.testing.assert_allclose(teacher.encode(["b"])[0], features.numpy(), atol=1e-5)

@pytest.fixture(scope="module")
def diffusion_folder(tmp_path_factory):
    """A random Stable Diffusion of the smallest size, which draws 64 x 64, as a hub checkpoint holds it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is optional: pip install diffusers pillow")
    folder = tmp_path_factory.mktemp("diffusion")
    _, tokenizer = _tiny(TEXTS)
    tokenizer.model_max_length = 12
    torch.manual_seed(0)
    blocks = dict(norm_num_groups=4, layers_per_block=1)
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=[4] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
                                    up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, **blocks),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(8, 8), sample_size=8, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **blocks),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2,
            num_hidden_layers=1, max_position_embeddings=12, eos_token_id=3, bos_token_id=2, pad_token_id=0)),
        tokenizer=tokenizer, scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)

def test_stable_diffusion_gives_a_text_one_vector_alone_in_a_batch_and_in_another_order(diffusion_folder):
    teacher, texts = build_teacher(f"stable-diffusion:{diffusion_folder}"), TEXTS[:3]
    together = teacher.encode(texts)
    assert together.shape == (3, teacher.dim) == (3, 1024) and together.dtype == np.float32
    assert (together == np.concatenate([teacher.encode([text]) for text in texts])).all()
    assert (together == teacher.encode(texts[::-1])[::-1]).all()
    assert (together == build_teacher(f"stable-diffusion:{diffusion_folder}").encode(texts)).all()
    assert len({row.tobytes() for row in together}) == 3
    assert teacher.max_tokens == 12

def test_stable_diffusion_draws_the_noise_of_a_text_from_the_text_itself(diffusion_folder):
    """To this tokenizer both are the same unknown word: only their seeds tell them apart."""
    a, b = build_teacher(f"stable-diffusion:{diffusion_folder}").encode(["qqq", "www"])
    assert (a != b).any()

def test_stable_diffusion_follows_the_papers_recipe(diffusion_folder):
    """Text to image, 20 steps, guidance 7.5; then image to image at 128 x 128, strength .75, to a latent."""
    teacher, asked = build_teacher(f"stable-diffusion:{diffusion_folder}"), []
    for pipe in teacher.pipes:
        pipe.__class__ = type(pipe.__class__.__name__, (pipe.__class__,), {
            "__call__": lambda self, text, _call=pipe.__class__.__call__, **how: (
                asked.append(how), _call(self, text, **how))[1]})
    teacher.encode(["a mouse"])
    assert all(fact in teacher.name for fact in ("20", "7.5", "0.75"))  # another recipe is another teacher
    assert [(how["num_inference_steps"], how["guidance_scale"]) for how in asked] == [(20, 7.5)] * 2
    assert asked[1]["image"].size == (128, 128) and asked[1]["strength"] == 0.75

def test_a_picture_encoder_takes_the_place_of_the_latent(diffusion_folder):
    diffusers = pytest.importorskip("diffusers")
    teacher = build_teacher(f"stable-diffusion:{diffusion_folder}", f"vae:{diffusion_folder}/vae")
    picture = teacher.picture("a mouse")
    vae = diffusers.AutoencoderKL.from_pretrained(f"{diffusion_folder}/vae")
    x = torch.tensor(np.asarray(picture.resize((128, 128), 1))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    assert latent.shape == (1, 4, 16, 16) and teacher.dim == 1024
    np.testing.assert_allclose(teacher.encode(["a mouse"])[0], latent.ravel().numpy(), atol=1e-4)
    assert build_teacher(f"stable-diffusion:{diffusion_folder}", "pixels").name != teacher.name

# ---- a paid image API --------------------------------------------------------------------------------------
KEY = "sk-very-secret-0123456789"

def drawn(text):
    """The picture file that the API below makes of a text."""
    file = io.BytesIO()
    coloured(len(text)).save(file, "png")
    return file.getvalue()

def in_base64(text, picture=None):
    return json.dumps({"data": [{"b64_json": base64.b64encode(picture or drawn(text)).decode()}]}).encode()

@pytest.fixture
def api(loopback, monkeypatch):
    """api(answer) -> spec; answer(request, text) writes the response. Requests are counted in api.asked."""
    def serve(answer):
        def check(request, body):
            if request.command == "POST":
                fields = json.loads(body)
                assert request.headers["Authorization"] == f"Bearer {KEY}" and fields["n"] == 1
                serve.asked[fields["prompt"]] += 1
                serve.fields = fields
                answer(request, fields["prompt"])
            else:
                assert request.headers["Authorization"] is None  # the key is for the endpoint alone
                respond(request, drawn(request.path))

        serve.url = loopback(check)
        return f"api:{serve.url}/v1#model=crayon&size=256x256"

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    serve.asked, serve.waits = Counter(), []
    monkeypatch.setattr(data.time, "sleep", serve.waits.append)
    return serve

def test_the_api_gets_text_model_and_size_and_answers_in_base64_or_with_an_url(api):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, in_base64(text) if text == "a" else json.dumps(
        {"data": [{"url": f"{api.url}/made/{text}"}]}).encode()))
    teacher = build_teacher(spec)
    vectors = teacher.encode(["a", "bb"])
    assert api.fields == {"model": "crayon", "size": "256x256", "prompt": "bb", "n": 1}
    assert vectors.shape == (2, 768) and (vectors[0] != vectors[1]).any() and "crayon" in teacher.name

def test_fields_are_sent_as_json_values_where_they_are_such(api):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, in_base64(text)))
    fields = ('size=512x512&steps=4&scale=7.5&transparent=true&user=null&seed="4"&style={"a":[1]}&tag=NaN'
              "&top=1e999&quality=high+end&big=" + "9" * 5000)
    build_teacher(f"{spec.partition('#')[0]}#{fields}").encode(["a"])
    assert api.fields == {"n": 1, "prompt": "a", "size": "512x512", "steps": 4, "scale": 7.5,
                          "transparent": True, "user": None, "seed": "4", "style": {"a": [1]}, "tag": "NaN",
                          "top": "1e999", "quality": "high end", "big": "9" * 5000}
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
    ("url", "data:image/png;base64,"), ("b64_json", "data:image/png;base64,"), ("url", "DATA:;base64,")])
def test_a_data_url_is_the_picture_itself(api, field, prefix):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    encoded = prefix + base64.b64encode(drawn("a")).decode()
    teacher = build_teacher(api(lambda request, text: respond(
        request, json.dumps({"data": [{field: encoded, "revised_prompt": "b"}]}).encode())))
    assert (teacher.encode(["a"])[0] == teacher.see(coloured(1)).astype(np.float32)).all()

@pytest.mark.parametrize("answer, says", [
    (b'{"error": {"message":\n "your credit is used up"}}', "your credit is used up"),
    (b'{"data": []}', "data"), (b'{"data": [{}]}', "data"), (b"[1]", "1"), (b"5", "5"), (b"null", "null"),
    (b"", "empty"), (b'{"data": [{"url": 5}]}', "5"), (b'{"data": [{"url": null}]}', "null"),
    (b'{"data": [{"url": ["http://a"]}]}', "http://a"), (b'{"data": [{"b64_json": 7}]}', "7"),
    (b'{"data": [{"url": "", "b64_json": null}]}', "null"), (b'{"data": [{"url": "data:,words"}]}', "words"),
    (b'{"data": [{"b64_json": "bm8gcGljdHVyZQ=="}]}', "bm8g"),
    (b'{"data": [{"url": "data:"}]}', "data:"), (b"[" * 100_000, r"\[\[\["),
    (b"<h1>be back soon</h1>", "be back soon"),
    (b"9" * 5000, "999"), (in_base64("", b"\x89PNG\r\n\x1a\n half of one"), "b64_json"),
    (f'{{"error": "{"a" * 280} no such key {KEY}"}}'.encode(), "aaa"),
    (f'{{"error": "{KEY} is no key"}}'.encode(), r"\*\*\* is no key"),
    (b"\x1b[2J\xff\xfe", "2J")])
def test_a_complete_answer_that_holds_no_picture_is_told_at_once_in_the_servers_words(api, answer, says):
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
    answer = {"data": [{"url": None, "b64_json": base64.b64encode(drawn("a")).decode()}]}
    teacher = build_teacher(api(lambda request, text: respond(request, json.dumps(answer).encode())))
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
    """429, 500, a cut answer and none are asked again; what came is in the cache before the next is asked."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    failed, rng = Counter(), np.random.default_rng(0)

    def answer(request, text):
        mode = rng.integers(60)
        failed[text] += mode < 4
        if mode == 0:
            respond(request, b"slow down", 429, Retry_After="3")
        elif mode == 1:
            respond(request, b"oops", 500)
        elif mode == 2:
            respond(request, in_base64(text)[:90], length=len(in_base64(text)))
        elif mode == 3:  # the server hangs up without a word
            request.close_connection = True
        else:
            respond(request, in_base64(text))

    texts = [f"text number {i}" for i in range(200)]
    found, made = opened(build_teacher(api(answer)), tmp_path, texts[:150], texts[150:])
    assert made == 200 and sum(failed.values()) >= 5
    assert {text: api.asked[text] - failed[text] for text in texts} == dict.fromkeys(texts, 1)
    assert set(api.waits) <= {1, 2, 3, 4} and 3 in api.waits
    assert np.isfinite(found["train"](range(150))).all() and found["dev"](range(50)).shape == (50, 768)
    for size, made in ((256, 0), (512, 2)):  # another size is another picture
        teacher = build_teacher(f"api:{api.url}/v1#model=crayon&size={size}x{size}")
        assert opened(teacher, tmp_path, texts[:2], texts[:1])[1] == made
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in "".join(capfd.readouterr())

def test_another_encoder_looks_at_the_pictures_that_were_bought(api, clip_folder, tmp_path):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, in_base64(text)))
    opened(build_teacher(spec), tmp_path, ["a", "b"], ["c"])
    _, made = opened(build_teacher(spec, f"clip:{clip_folder}"), tmp_path, ["a", "b"], ["c"])
    assert made == 3 and set(api.asked.values()) == {1}

def test_a_key_with_a_line_break_is_sent_without_and_never_shown(api, monkeypatch, tmp_path):
    """urllib refuses such a header and shows it in its error."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    spec = api(lambda request, text: respond(request, in_base64(text)))
    assert opened(build_teacher(spec), tmp_path, ["a"], ["b"])[1] == 2

@pytest.mark.parametrize("status, says", [(401, "401"), (400, "400"), (404, "404")])
def test_a_refusal_stops_at_once_says_why_and_shows_no_key(api, status, says, tmp_path):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, f"bad key {KEY}".encode(), status))
    with pytest.raises(UserError, match=f"(?s)on 'a': {says}.*bad key") as error:
        opened(build_teacher(spec), tmp_path, ["a"], ["b"])
    assert sum(api.asked.values()) == 1 and KEY not in str(error.value)

def test_an_api_that_stays_down_is_given_up_with_what_was_made_kept(api, tmp_path):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, *((in_base64(text),) if text == "a" else (b"", 503))))
    with pytest.raises(UserError, match="on 'b': 503"):
        opened(build_teacher(spec), tmp_path, ["a", "b"])
    assert api.asked == {"a": 1, "b": 6} and api.waits == [1, 2, 4, 8, 16]
    spec_again = api(lambda request, text: respond(request, in_base64(text)))
    assert spec_again != spec  # another port, so another teacher; the first one's picture is still there:
    assert len(Cache(tmp_path).db.execute("SELECT key FROM made").fetchall()) == 2  # picture and vector

def test_the_budget_stops_before_more_is_spent(api, tmp_path):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, in_base64(text)))
    with pytest.raises(UserError, match="--max-pictures 2 are made, 3 to go: type the same again"):
        opened(build_teacher(spec), tmp_path, ["a", "b", "c", "d"], most=2)
    assert sum(api.asked.values()) == 2
    _, made = opened(build_teacher(spec), tmp_path, ["a", "b", "c", "d"], most=3)
    assert made == 3 and set(api.asked.values()) == {1}

@pytest.mark.parametrize("spec, says", [
    ("api:", "write api:https"), ("api:example.org/v1", "write api:https"), ("api:ftp://host", "api:https"),
    ("api:https://me:password@host/v1", "OPENAI_API_KEY"), ("api:https://host/v1?api_key=1", "OPENAI_API"),
    ("api:https://host/v1#API_KEY=1", "OPENAI_API_KEY"), ("api:https://", "write api:https"),
    ("api:https://password@host/v1", "OPENAI_API_KEY"), ("api:https://host?sig=password", "OPENAI_API_KEY"),
    ("api:https://host/v1?a=1&Access_Token=password", "OPENAI_API_KEY"),
    ("api:https://host/v1?client%5Fsecret=password", "OPENAI_API_KEY"),
    (f"api:https://host/{KEY}/v1", "OPENAI_API_KEY"), (f"api:https://host/v1#user={KEY}", "OPENAI_API_KEY"),
    ("api:https://host\\@password/v1", "write api:https"), ("api:https://ho st/v1", "write api:https"),
    ("api:https://host:x/v1", "write api:https"), ("api:https://host/\x1b[2J", "write api:https"),
    ("api:https://host/\ud800", "write api:https"), ("api:https://h\u00f6st/", "write api:https"),
    ("api:http://example.org/v1", "use https")])
def test_an_address_that_would_give_the_key_away_is_refused(spec, says, monkeypatch):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
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
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, b"x" * 190 + f" bad key {KEY}".encode(), 401))
    with pytest.raises(UserError) as error:
        opened(build_teacher(spec), tmp_path, ["a"])
    assert "bad key ***" in str(error.value) and KEY[:8] not in str(error.value)

def test_two_encoders_and_fields_in_another_order_buy_no_picture_twice(api, clip_folder, tmp_path):
    """Not even at the same time."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    spec = api(lambda request, text: respond(request, in_base64(text)))
    base, _, _ = spec.partition("#")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda args: opened(build_teacher(*args), tmp_path, ["a", "b", "c"]), [
            (spec, None), (spec, f"clip:{clip_folder}"), (f"{base}#size=256x256&model=crayon", None)]))
    assert set(api.asked.values()) == {1} and len(api.asked) == 4

def test_a_local_encoder_is_known_by_where_it_lies_not_by_how_it_was_typed(clip_folder, monkeypatch):
    monkeypatch.chdir(Path(clip_folder).parent)
    assert build_teacher(f"clip:{Path(clip_folder).name}").name == build_teacher(f"clip:{clip_folder}").name

def test_the_key_does_not_follow_a_redirect_to_another_host(api, loopback):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    seen = []
    other = loopback(lambda request, body: (seen.append(request.headers.get("Authorization")),
                                            respond(request, in_base64("a"))))
    spec = api(lambda request, text: respond(request, b"", 302, Location=f"{other}/moved"))
    assert build_teacher(spec).encode(["a"]).shape == (1, 768) and seen == [None]

def test_an_answer_that_points_to_a_file_of_ours_is_refused(api, tmp_path):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    coloured(1).save(tmp_path / "mine.png")
    spec = api(lambda request, text: respond(request, json.dumps(
        {"data": [{"url": f"file://{tmp_path}/mine.png"}]}).encode()))
    with pytest.raises(UserError, match="is not on the web"):
        build_teacher(spec).encode(["a"])

# ---- the cache ---------------------------------------------------------------------------------------------
class Counting(Teacher):
    """A costly teacher that remembers what it was asked."""

    name, dim = "counting", 3

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        return np.array([[len(text), ord(text[0]), 1] for text in texts], np.float32)

def test_each_distinct_text_is_made_once_and_paired_by_content(tmp_path):
    teacher, texts = Counting(), ["bb", "a", "bb", "ccc"]
    found, made = opened(teacher, tmp_path, texts, ["a"])
    first = found["train"](range(4))
    assert sorted(teacher.asked) == ["a", "bb", "ccc"] and made == 3
    np.testing.assert_allclose(first[:, 0] / first[:, 2], [2, 1, 2, 3], rtol=1e-6)
    found, _ = opened(teacher, tmp_path, [*texts[::-1], "d"], ["a"])
    again = found["train"](range(5))
    assert teacher.asked[3:] == ["d"]
    np.testing.assert_allclose(again[:, 0] / again[:, 2], [3, 2, 1, 2, 1], rtol=1e-6)
    other = Counting()
    other.name = "counting, another parameter"
    opened(other, tmp_path, ["a"], ["a"])
    assert other.asked == ["a"]  # a teacher with another name shares nothing

def test_only_the_limit_is_paid_for(tmp_path):
    teacher = Counting()
    found, made = opened(teacher, tmp_path, ["a", "b", "c"], ["d"], limit=2)
    assert made == 3 and sorted(teacher.asked) == ["a", "b", "d"] and len(found["train"]([0, 1])) == 2

def damage(folder, text):
    cache = Cache(folder)
    cache.db.execute("UPDATE made SET value = zeroblob(12) WHERE key = ?", (cache.key("counting", text),))

@pytest.mark.parametrize("text", ["bb", "a dev text"])
def test_a_damaged_entry_is_made_again_when_the_cache_is_opened(tmp_path, text):
    teacher = Counting()
    opened(teacher, tmp_path, ["a", "bb"])
    damage(tmp_path, text)
    _, made = opened(teacher, tmp_path, ["a", "bb"])
    assert made == 1 and teacher.asked[3:] == [text]

def test_an_entry_that_is_damaged_since_is_never_used_but_named_and_made_again_by_the_next_start(tmp_path):
    teacher = Counting()
    found, _ = opened(teacher, tmp_path, ["a", "bb"])
    before = found["train"]([0, 1])
    damage(tmp_path, "bb")
    with pytest.raises(UserError, match="no finite vector of .* for 'train.tsv:2': start once more"):
        found["train"]([0, 1])
    found, made = opened(teacher, tmp_path, ["a", "bb"])
    assert made == 1 and teacher.asked[3:] == ["bb"] and (found["train"]([0, 1]) == before).all()

def test_a_vector_that_is_missing_at_training_time_is_an_error_that_names_the_example(tmp_path):
    found, _ = opened(Counting(), tmp_path, ["a", "bb", "c"])
    Cache(tmp_path).db.execute("DELETE FROM made WHERE key = ?", (Cache.key("counting", "c"),))
    assert found["train"]([0, 1]).shape == (2, 3)
    with pytest.raises(UserError, match="'train.tsv:3'"):
        found["train"]([1, 2])

def test_a_vector_that_is_not_finite_is_an_error_that_names_the_text_and_is_not_kept(tmp_path):
    teacher = Counting()
    teacher.encode = lambda texts: np.array(
        [[np.inf if text == "bad" else 1.0] * 3 for text in texts], np.float32)
    with pytest.raises(UserError, match="no finite vector of .* for 'bad'"):
        opened(teacher, tmp_path, ["good", "bad"])
    recovered = Counting()  # the next try asks again
    opened(recovered, tmp_path, ["good", "bad"])
    assert "bad" in recovered.asked

def test_a_vector_of_another_width_than_the_teacher_says_is_refused(tmp_path):
    teacher = Counting()
    teacher.dim = 4
    with pytest.raises(UserError, match="no finite vector of 4 for"):
        opened(teacher, tmp_path, ["a"])

@pytest.mark.parametrize("where", [0, 4096])  # the header, a page
def test_a_damaged_cache_file_is_named(tmp_path, where):
    opened(Counting(), tmp_path, [f"text {i}" for i in range(200)])
    Cache(tmp_path).sql("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it into the one file
    with open(tmp_path / "teachers.sqlite", "r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 4096)
    with pytest.raises(UserError, match="teachers.sqlite: .*if damaged, delete it"):
        opened(Counting(), tmp_path, [f"text {i}" for i in range(200)])

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
    (lambda path: sqlite3.connect(path).execute("CREATE TABLE made (key INTEGER PRIMARY KEY, vector BLOB)"),
     "of another program"),
    (lambda path: sqlite3.connect(path).execute("CREATE TABLE made (key TEXT, crc, value BLOB)"),
     "of another program"),
    (lambda path: sqlite3.connect(path).execute("CREATE VIEW made AS SELECT 1 AS key, 2 AS crc, 3 AS value"),
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
    (dict(items=lambda split, texts: texts[1:]), "returned 1 items for 2 texts: let it return one for each"),
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
    for line in ("2 entries are whole", "thrown away as damaged: 1"), ("2 entries", "damaged: 0"):
        main(["--verify", "--cache-dir", str(tmp_path)])
        out = capsys.readouterr().out
        assert all(part in out for part in line)

def test_two_processes_may_fill_one_cache_and_ask_for_nothing_twice(tmp_path):
    class Slow(Counting):
        at_once = 1

        def encode(self, texts):
            time.sleep(0.01)
            return super().encode(texts)

    teachers, texts = [Slow() for _ in range(4)], [f"{i}" for i in range(30)]
    keys = np.array([Cache.key("counting", text) for text in texts])
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda teacher: fill(teacher, texts, keys, Cache(tmp_path)), teachers))
    assert sum(made) == 30 and sorted(sum((teacher.asked for teacher in teachers), [])) == sorted(texts)

def test_a_filling_that_is_killed_asks_only_for_what_is_missing_when_started_again(loopback, tmp_path):
    """The command, a real SIGKILL in the middle, the command again."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    asked, enough = Counter(), threading.Event()

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
    assert len(asked) == 560 and sum(asked.values()) <= 561  # one may have been on its way when the kill came
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*"))

# ---- the command line --------------------------------------------------------------------------------------
def test_vectors_are_made_ahead_and_found_in_training(clip_folder, tmp_path, capsys):
    command = ["--task", "objects", "--limit", "20", "--teacher", f"clip:{clip_folder}",
               "--cache-dir", str(tmp_path)]
    for made in (520, 0):
        main(command)
        assert f"520 vectors of 10 numbers, 0.0 MB; {made} made now" in capsys.readouterr().out
    found, made = open_vectors(build_teacher(f"clip:{clip_folder}"), TASKS["objects"], load_task("objects"),
                               tmp_path, limit=20)
    assert made == 0 and found["train"](range(20)).shape == (20, 10)

@pytest.mark.parametrize("flags, says", [
    ([], "give --task or --verify"), (["--task", "cb", "--max-pictures", "-1"], "at least 0"),
    (["--task", "objcts"], "did you mean objects"),
    (["--task", "objects", "--teacher", "clipp"], "did you mean clip"),
    (["--max-picture", "3"], "did you mean --max-pictures"),
    (["--task", "objects", "--teacher", "images:/nowhere"], "manifest.jsonl"),
    (["--task", "objects", "--teacher", "images:/nowhere", "--picture-encoder", "pixel"], "mean pixels"),
    (["--verify", "--cache-dir", "/dev/null/here"], "/dev/null"), (["--limit", "few"], "invalid int")])
def test_a_wrong_command_is_one_line_and_status_2(flags, says, capsys):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    with pytest.raises(SystemExit) as stop:
        main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1

def test_a_name_that_the_console_cannot_show_is_one_line_all_the_same():
    """An ASCII locale, as under cron."""
    told = subprocess.run([sys.executable, "teacher.py", "--task", "caf\u00e9"], cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}, capture_output=True)
    assert told.returncode == 2 and told.stderr.count(b"\n") == 1 and b"unknown task" in told.stderr
