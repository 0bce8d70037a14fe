"""Black-box teachers and the vectors they leave. Read beside teacher.py."""
import numpy as np
import pytest
import torch
import transformers

from data import OBJECTS, UserError
from student import _tiny
from teacher import Cache, Teacher, build_teacher, main, teacher_vectors

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

def test_the_picture_to_look_at_is_the_painting_on_white_paper(tmp_path, capsys):
    pixels = build_teacher("painter").picture("sofa")  # green, in the middle
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[8, 8].argmax() == 1
    image = pytest.importorskip("PIL.Image", reason="pillow is optional: pip install pillow")
    main(["--show", "sofa", "--out", str(tmp_path / "sofa.png")])
    large = np.asarray(image.open(tmp_path / "sofa.png"))
    assert large.shape == (512, 512, 3) and (large[16::32, 16::32] == pixels).all()
    assert str(tmp_path / "sofa.png") in capsys.readouterr().out

@pytest.mark.parametrize("flags, says", [
    (["--teacher", "paintr"], "did you mean painter"),
    (["--teacher", "vectors:{folder}"], "no picture to show"),
    (["--out", "{folder}/missing/a.png"], "missing"), (["--out", "{folder}/a.xyz"], "xyz")])
def test_what_cannot_be_shown_is_one_line(flags, says, tmp_path, capsys):
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    np.save(tmp_path / "train.npy", np.ones((2, 3)))
    with pytest.raises(SystemExit) as stop:
        main(["--show", "a sofa", *(flag.format(folder=tmp_path) for flag in flags)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1

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
    ("painter:x", "dose RHO from 0"), ("vectors:", "has no train.npy"),
    ("vectors:/nowhere", "has no train.npy"), ("clip:/nowhere/at all", "no folder here")])
def test_a_teacher_that_cannot_be_had_says_why(spec, says):
    with pytest.raises(UserError, match=says):
        build_teacher(spec)

# ---- ready-made vectors ------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.standard_normal((6, 5)).astype(np.float16))
    np.save(tmp_path / "dev.npy", rng.standard_normal((3, 5)))
    return tmp_path

def test_row_i_belongs_to_example_i_and_limit_keeps_the_first(folder):
    teacher = build_teacher(f"vectors:{folder}")
    vectors = teacher_vectors(teacher, "train", list("abcdef"), folder, limit=4)
    assert teacher.dim == 5 and vectors.dtype == np.float32
    assert (vectors == np.load(folder / "train.npy")[:4].astype(np.float32)).all()
    with pytest.raises(UserError, match="by row, not by text"):
        teacher.encode(["a new text"])

@pytest.mark.parametrize("split, array, says", [
    ("dev", np.zeros((4, 5)), r"dev.npy has shape \(4, 5\), expected \(3, 5\)"),
    ("dev", np.zeros((3, 4)), r"expected \(3, 5\)"),
    ("dev", np.zeros((3, 5), int), "expected floats"), ("dev", np.zeros(3), "expected floats"),
    ("dev", np.array([[1.0] * 5, [1.0] * 5, [np.nan] * 5]), "no finite vector for a text of dev: 'c'"),
    ("dev", np.array([[object()] * 5] * 3), "not a readable array")])
def test_vectors_that_do_not_fit_the_examples_are_refused(folder, split, array, says):
    """In the published scripts a missing vector becomes zeros and trains on."""
    np.save(folder / f"{split}.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        teacher_vectors(build_teacher(f"vectors:{folder}"), split, list("abc"), folder)

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
        vision_config=dict(image_size=8, patch_size=4, **small), projection_dim=10)).save_pretrained(folder)
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

def test_clip_says_how_many_texts_it_had_to_cut(clip_folder, capsys, tmp_path):
    texts = ["a mouse", "a mouse " * 9, "a piano " * 20]
    teacher_vectors(build_teacher(f"clip:{clip_folder}"), "train", texts, tmp_path)
    assert "2 of 3 train texts are too long for it and were cut" in capsys.readouterr().err

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
    first = teacher_vectors(teacher, "train", texts, tmp_path)
    assert teacher.asked == ["bb", "a", "ccc"] and first[:, 0].tolist() == [2, 1, 2, 3]
    again = teacher_vectors(teacher, "train", texts[::-1] + ["d"], tmp_path)
    assert teacher.asked == ["bb", "a", "ccc", "d"] and again[:, 0].tolist() == [3, 2, 1, 2, 1]
    other = Counting()
    other.name = "counting, another parameter"
    teacher_vectors(other, "dev", ["a"], tmp_path, limit=None)
    assert other.asked == ["a"]  # a teacher with another name shares nothing

def test_only_the_limit_is_paid_for(tmp_path):
    teacher = Counting()
    assert (len(teacher_vectors(teacher, "train", ["a", "b", "c"], tmp_path, limit=2)) == 2
            and teacher.asked == ["a", "b"])

def test_a_damaged_entry_is_made_again_and_never_used(tmp_path):
    teacher = Counting()
    teacher_vectors(teacher, "train", ["a", "bb"], tmp_path)
    cache = Cache(tmp_path)
    cache.db.execute("UPDATE vectors SET value = zeroblob(12) WHERE key = ?", (cache.key(teacher, "a"),))
    assert cache.get(teacher, "a") is None and cache.get(teacher, "bb") is not None
    assert teacher_vectors(teacher, "train", ["a", "bb"], tmp_path)[0].tolist() == [1, 97, 1]
    assert teacher.asked == ["a", "bb", "a"]

def test_a_vector_that_is_not_finite_is_an_error_that_names_the_example(tmp_path):
    teacher = Counting()
    teacher.encode = lambda texts: np.array(
        [[np.inf if text == "bad" else 1.0] * 3 for text in texts], np.float32)
    with pytest.raises(UserError, match="no finite vector for a text of train: 'bad'"):
        teacher_vectors(teacher, "train", ["good", "bad"], tmp_path)
    recovered = Counting()  # and it was not kept: the next try asks again
    assert (np.isfinite(teacher_vectors(recovered, "train", ["good", "bad"], tmp_path)).all()
            and recovered.asked == ["good", "bad"])
