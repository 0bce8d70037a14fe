"""--plan: its counts are a real student's, and its formula comes close to what was measured.

Measured means two things. The peak memory of four real students was read on a GPU; those numbers
stand in MEASURED_ON_A_GPU. That of three small students is measured on this machine's CPU, in a
child process, while the other tests run.
"""
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from align import Outputs
from data import UserError
from losses import student_loss
from student import Student
from tests.conftest import family_config
from train import (
    CUDA_CONTEXT, GIB, Config, count_parameters, count_trained, flags_that_fit, generating_memory,
    imagine_student, layer_activations, main, peak_memory, resolve, total_bytes, training_memory)

FAMILIES_MEASURED = ("bert", "opt", "llama")
ROWS = 8
LENGTH = 64
VOCABULARY = 4000
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=3, model_max_length=10**9)


def sized(family, width=256, layers=3):
    """A configuration of some tens of MB: a process's memory then shows what its tensors take."""
    config = family_config(family, VOCABULARY)
    config.update({"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
                   "max_position_embeddings": 128})
    if family == "opt":
        config.update({"ffn_dim": 4 * width, "word_embed_proj_dim": width})
    else:
        config.update({"intermediate_size": 4 * width})
    if family == "llama":
        config.update({"num_key_value_heads": 4})
    return config


def settings(**more):
    """A resolved Config without any "auto": float32 on the CPU and no checkpointing by default."""
    flags = {"task": "rte", "student": "s", "teacher": "painter", "batch_size": ROWS,
             "max_length": LENGTH, "device": "cpu", "amp": "off", "grad_checkpoint": "off"}
    return resolve(Config(**flags | more))


def planned(lm_config, checkpointing, amp="off", **more):
    """Bytes that the plan expects of train_for."""
    config = settings(amp=amp, grad_checkpoint="on" if checkpointing else "off", **more)
    return total_bytes(training_memory(config, imagine_student(config, lm_config, 1024)))


# ---- real trainings, measured ------------------------------------------------------------------


def train_for(lm_config, checkpointing, steps, rows=ROWS, length=LENGTH, device="cpu",
              autocast=nullcontext):
    """A real student's steps, as in train.update."""
    lm = transformers.AutoModel.from_config(lm_config)
    student = Student(lm, TOKENIZER, 2, 1024).to(device).train()
    if checkpointing:
        student.checkpoint_gradients()
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    x = {"input_ids": torch.randint(4, VOCABULARY, (rows, length)),
         "attention_mask": torch.ones(rows, length).long()}
    x["attention_mask"][0, -1] = 0  # without any padding transformers would make no mask
    if lm_config.model_type == "bert":
        x["token_type_ids"] = torch.zeros(rows, length).long()
    x = {key: value.to(device) for key, value in x.items()}
    labels = torch.zeros(rows).long().to(device)
    logits = torch.zeros(rows, 2, device=device)
    target = Outputs(logits, logits, torch.zeros(rows, 1024, device=device))
    for _ in range(steps):
        with autocast():
            out = student(**x)
        loss, _ = student_loss(out, target, labels, alpha=0.5, beta=1.0, gamma=1.0, temperature=5.0,
                               kind="manifold")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident(name):
    """This process's memory in bytes: VmRSS as it is now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return 1024 * int(line.split()[1])


def peak_growth(family, checkpointing):
    """Bytes by which the peak resident set of a forked process grows in three steps (in the second,
    the optimizer's moments are there)."""
    def warm_up():
        train_for(sized(family, 32, 1), checkpointing, 1, rows=2, length=8)
        gc.collect()

    warm_up()  # loads the code that a step runs
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: a larger block returns to the system once freed
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        warm_up()  # touches its pages, which after a fork may not count until then
        libc.malloc_trim(0)
        before = resident("VmRSS")
        train_for(sized(family), checkpointing, 3)
        os.write(write, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(read, 99))


if __name__ == "__main__":  # the child process
    torch.set_num_threads(1)
    growth = {}
    for measured_family in FAMILIES_MEASURED:
        for checkpointing_on in (False, True):
            name = f"{measured_family} {checkpointing_on}"
            growth[name] = peak_growth(measured_family, checkpointing_on)
    print(json.dumps(growth))
    sys.exit()


@pytest.fixture(scope="module", autouse=True)
def child():
    """Measures while the other tests run."""
    root = Path(__file__).parent.parent
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # no fork after CUDA began
    process = subprocess.Popen([sys.executable, "-m", "tests.test_plan"], cwd=root, env=no_gpu,
                               stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


# ---- the formula -------------------------------------------------------------------------------

# The real shapes, with the tokenizer's 50,272 tokens that the measurement used.
REAL_SHAPES = {
    "bert-base": transformers.BertConfig(vocab_size=50272),
    "opt-1.3b": transformers.OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=24, ffn_dim=8192,
        num_attention_heads=32, word_embed_proj_dim=2048),
    "deberta-v2-xxlarge": transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24,
        intermediate_size=6144, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=256, position_biased_input=False, norm_rel_ebd="layer_norm",
        share_att_key=True, conv_kernel_size=3, conv_act="gelu", max_relative_positions=-1),
    "llama-7b": transformers.LlamaConfig(
        vocab_size=50272, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=11008, max_position_embeddings=2048),
}

# torch.cuda.max_memory_allocated() of training steps (train.update) on one NVIDIA H200, bf16, with
# torch 2.11.0+cu130 and transformers 5.23.0 at commit f542413: random weights of the real shapes,
# batches of 32, no CUDA context counted. RTE's longest batch has 128 tokens a text. ARC-Easy's
# (384 texts, 103 tokens on average) has one of 288, and 7 tokens an answer. The last two lines are
# 32 made-up texts. LLaMA has LoRAs of rank 8.
MEASURED_ON_A_GPU = [
    # student, checkpointing, tokens a text, of them an answer's, micro-batch, GiB
    ("bert-base", "off", 128, None, 32, 3355 / 1024),
    ("opt-1.3b", "off", 128, None, 32, 24270 / 1024),
    ("opt-1.3b", "on", 128, None, 32, 20265 / 1024),
    ("deberta-v2-xxlarge", "off", 128, None, 32, 51.5),
    ("llama-7b", "on", 288, 7, 32, 17.4),
    ("llama-7b", "on", 288, 7, 8, 14.1),
    ("llama-7b", "on", 512, 128, 32, 23.4),
    ("llama-7b", "on", 512, 128, 8, 15.7),
]


@pytest.mark.parametrize("line", MEASURED_ON_A_GPU, ids=str)
def test_memory_on_a_gpu_is_within_15_percent(line):
    name, checkpoint, length, answer, micro_batch, measured = line
    task = {"task": "rte"}
    if answer:
        task = {"task": "reason/arc_e", "lora": 8, "max_new_tokens": answer}
    config = settings(**task, max_length=length, batch_size=32, micro_batch=micro_batch,
                      device="cuda", amp="bf16", grad_checkpoint=checkpoint)
    student = imagine_student(config, REAL_SHAPES[name], 1024)
    parts = training_memory(config, student)
    assert total_bytes(parts) / GIB == pytest.approx(measured, rel=0.15)


def test_a_layer_keeps_what_its_docstring_adds_up():
    """Of one token: 34 h of OPT and 42 h of BERT in half precision, 50 h and 66 h in float32, since
    both have f = 4 h."""
    for family, half, full in (("opt", 34, 50), ("bert", 42, 66)):
        config = settings()
        lm = imagine_student(config, sized(family, width=256), 1024).lm
        assert layer_activations(lm, 1, 1, half=True, cuda=True) == half * 256
        assert layer_activations(lm, 1, 1, half=False, cuda=True) == full * 256


def test_attention_that_is_not_fused_grows_with_the_square_of_the_length():
    """BERT's on the CPU, which drops out; a GPU's kernel does that as it goes."""
    lm = imagine_student(settings(), sized("bert"), 1024).lm
    for cuda, grows in ((True, 0), (False, 2 * 64 * 64 * 4 * (4 + 4 + 4))):  # rows L L heads bytes
        short, long = (layer_activations(lm, 2, length, False, cuda) for length in (64, 128))
        assert long - 2 * short == 2 * grows


def test_the_peak_is_at_one_end_of_the_backward_pass():
    """Many tokens: at its start, where all activations live. Few: at its end, where all gradients
    do. Only the gradients of earlier micro-batches are there from the start."""
    many = settings(max_length=128, batch_size=256)
    student = imagine_student(many, sized("opt"), 1024)
    assert training_memory(many, student)["gradients"] == 0
    few = settings(max_length=4, batch_size=1)
    gradients = 4 * count_parameters(student)
    assert training_memory(few, student)["gradients"] == gradients
    several = replace(many, micro_batch=128)
    assert training_memory(several, student)["gradients"] == gradients


def test_answers_to_generate_have_logits_and_keys():
    config = settings(task="reason/arc_e", max_length=32, max_new_tokens=8, lora=0,
                      batch_size=64, grad_checkpoint="on")
    student = imagine_student(config, sized("llama", 32, 2), 1024)
    parts = training_memory(config, student)
    assert parts["logits"] >= 4 * 64 * 8 * VOCABULARY  # (N, V) float32
    keys_and_values = 4 * 2 * 2 * 64 * 32 * 32  # bytes, both, layers, texts, tokens, width
    assert generating_memory(config, student)["activations"] == keys_and_values
    assert generating_memory(config, student)["copies"] == 0
    adapted = imagine_student(replace(config, lora=2), sized("llama", 32, 2), 1024)
    merged = 2 * 2 * 32 * 64  # layers, maps to queries and values, width in and out
    for amp, number in (("off", 4), ("bf16", 2)):  # bytes
        parts = generating_memory(replace(config, lora=2, amp=amp), adapted)
        assert parts["copies"] == number * merged


@pytest.mark.parametrize("family", FAMILIES_MEASURED)
def test_of_a_lora_adapters_and_heads_are_trained_and_its_base_is_rounded(family):
    config = settings(lora=4, grad_checkpoint="on", device="cuda")
    student = imagine_student(config, sized(family, 32, 2), 1024)
    real_lm = transformers.AutoModel.from_config(sized(family, 32, 2))
    real = Student(real_lm, TOKENIZER, 2, 1024, lora=4)
    trained = count_trained(real)
    assert count_parameters(student) == count_parameters(real)
    assert count_trained(student) == trained
    float32 = training_memory(config, student)
    bf16 = training_memory(replace(config, amp="bf16"), student)
    assert float32["moments"] == 2 * 4 * trained
    frozen = count_parameters(real) - trained
    assert float32["weights"] - bf16["weights"] == 2 * frozen


def test_a_family_without_a_formula_is_a_user_error():
    """A Swin transformer has a number of heads for each stage."""
    config = settings()
    student = imagine_student(config, transformers.Swinv2Config(), 1024)
    with pytest.raises(UserError, match="no formula for the model type swinv2"):
        peak_memory(config, student)


def test_a_model_that_transformers_cannot_make_is_a_user_error(monkeypatch):
    """Its errors are of many kinds: a missing package, a wrong number in config.json."""
    def refuse(*_, **__):
        raise TypeError("unsupported\noperand")

    monkeypatch.setattr(transformers.AutoModel, "from_config", refuse)
    with pytest.raises(UserError, match="makes no AutoModel .*: unsupported operand"):
        imagine_student(settings(), sized("bert"), 1024)


# ---- the advice, the text, and what cannot be planned ------------------------------------------


def test_the_flags_that_it_suggests_fit_and_depend_on_the_memory():
    asked = settings(batch_size=16, device="cuda", amp="bf16")
    lm_config = sized("llama", 32, 2)
    student = imagine_student(asked, lm_config, 1024)

    def needed(checkpoint, rows):
        config = replace(asked, grad_checkpoint=checkpoint, micro_batch=rows)
        return (total_bytes(peak_memory(config, student)) + CUDA_CONTEXT) / GIB

    def told(memory):
        return flags_that_fit(replace(asked, memory=memory), lm_config, 1024, 0)

    assert needed("off", 16) > needed("on", 16) > needed("on", 4) > needed("on", 1)
    assert told(needed("off", 16)) == ""
    assert told(needed("on", 16)) == "--grad-checkpoint on"
    assert told(needed("on", 4)) == "--grad-checkpoint on --micro-batch 4"
    assert "--lora 8" in told(needed("on", 1) - 1e-6)
    assert told(0.1) is None


def test_a_smaller_student_is_the_last_resort():
    config = settings(batch_size=1, device="cuda", amp="bf16", plan=True, memory=8)
    shapes = transformers.OPTConfig(hidden_size=4096, num_hidden_layers=32, ffn_dim=16384,
                                    num_attention_heads=32, word_embed_proj_dim=4096)
    assert flags_that_fit(config, shapes, 1024, 0) == "--student opt-1.3b --lora 8"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """family -> a folder with a config.json alone; the network is forbidden."""
    def refuse(*_):
        raise AssertionError("a plan needs no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)

    def make(family):
        sized(family, 32, 2).save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return make


def typed(*flags):
    return ["--plan", "--task", "rte", "--teacher", "painter", "--max-length", "96", *flags]


def test_a_config_json_is_enough_and_nothing_is_written(folder, tmp_path, capsys):
    opt = folder("opt")
    before = sorted(tmp_path.rglob("*"))
    main(typed("--student", opt, "--cache-dir", str(tmp_path / "cache"), "--memory", "24"))
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr().out
    assert "steps: 780 of the student" in told  # 10 epochs of 78 batches of RTE's 2,490 examples
    assert "vectors to make of painter: 0" in told
    assert "a card of 24 GiB (amp bf16, checkpointing off): fits as it is" in told
    real_lm = transformers.AutoModel.from_config(sized("opt", 32, 2))
    count = count_parameters(Student(real_lm, TOKENIZER, 2, 1024))
    assert f"parameters: {count:,}, {count:,} of them trained" in told


def test_each_column_adds_up(folder, capsys):
    main(typed("--student", folder("bert")))
    lines = capsys.readouterr().out.splitlines()
    title, *table = [line for line in lines if line.startswith("  ")]
    assert title.split() == ["off", "off", "ckpt", "bf16", "bf16", "ckpt"]
    columns = [[float(value) for value in line[38:].split()] for line in table]
    assert len(columns) > 4
    for *parts, total in zip(*columns):
        assert sum(parts) == pytest.approx(total, abs=0.004)


def test_a_costly_teacher_is_asked_for_at_most_every_text(folder, capsys):
    main(typed("--student", folder("bert"), "--teacher", "clip", "--limit", "100"))
    assert "vectors to make of clip: at most 377\n" in capsys.readouterr().out  # 100 and dev's 277


def test_the_demonstration_can_be_planned(folder, capsys):
    main(["--plan"])
    told = capsys.readouterr().out
    assert "plan: objects, student tiny, teacher painter" in told
    assert "120 examples by its data" in told


def test_a_teacher_that_does_not_tell_its_width_is_taken_for_1024_wide(folder, monkeypatch, capsys):
    from teacher import TEACHERS, Teacher

    class Oracle(Teacher):
        """One of a reader's own, whose width only its first vector tells."""

        @classmethod
        def planned_dim(cls, argument, picture_encoder=None):
            return None

    monkeypatch.setitem(TEACHERS, "oracle", Oracle)
    main(typed("--student", folder("bert"), "--teacher", "oracle"))
    assert "(projection to 1024 dimensions, width assumed)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    (["--memory", "0"], "--memory 0.0 must be a number above 0"),
    (["--fsdp"], "--plan tells the memory of one process"),
    (["--max-length", "200"], "reads at most 128 tokens"),
    (["--proj-dim", "2000"], "--proj-dim 2000 is over painter's 1024"),
    (["--lora", "99"], "--lora 99"),
    (["--task", "reason/arc_e", "--max-new-tokens", "8"], "reads both ways"),
    (["--student", "."], "holds no config.json"),
    (["--teacher", "vectors:nowhere"], "nowhere"),
])
def test_what_cannot_be_planned_is_one_line(flags, says, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed("--student", folder("bert"), *flags))
    out, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not out


def test_memory_on_the_cpu_is_within_20_percent_of_a_real_training(child):
    """The last test, for the child to have ended."""
    measured = json.loads(child.communicate(timeout=600)[0])
    assert len(measured) == 2 * len(FAMILIES_MEASURED)
    for name, growth in measured.items():
        family, checkpointing = name.split()
        expected = planned(sized(family), checkpointing == "True")
        assert expected == pytest.approx(growth, rel=0.2), name
