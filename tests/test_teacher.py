"""Black-box teachers and the vectors they leave. Read beside teacher.py."""
import base64
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import data
from data import OBJECTS, TASKS, UserError, load_task
from student import _tiny
from teacher import Cache, Teacher, build_teacher, fill, main, open_vectors
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

@pytest.mark.parametrize("line, says", [
    ('{"text": "d", "file": "../secret.png"}', "4: .*no file inside"), ("[1]", "manifest.jsonl:4"),
    ('{"text": "d", "file": "/etc/passwd"}', "no file inside"), ('{"file": "a.png"}', "manifest.jsonl:4"),
    ('{"text": "d"', "manifest.jsonl:4"), ('{"text": "d", "file": "d.png"}', "no file inside")])
def test_a_manifest_line_that_leads_nowhere_is_named(pictures, line, says):
    coloured(1).save(pictures.parent / "secret.png")
    with open(pictures / "manifest.jsonl", "a") as file:
        print(line, file=file)
    with pytest.raises(UserError, match=says):
        build_teacher(f"images:{pictures}")

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

def test_two_hundred_texts_of_which_some_fail_at_first_are_each_bought_once(api, tmp_path, capfd):
    """429, 500 and a cut answer are asked again; what came is in the cache before the next is asked."""
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
        elif mode == 3:  # the answer is whole, the picture in it is not
            respond(request, in_base64(text, drawn(text)[:60]))
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
    ("api:http://example.org/v1", "use https")])
def test_an_address_that_would_give_the_key_away_is_refused(spec, says, monkeypatch):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=says) as error:
        build_teacher(spec)
    assert "password" not in str(error.value)

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
