"""--plan: its counts are a real student's, its memory a real training's, measured in a child process."""
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
from tests import plan
from tests.conftest import family_config
from train import Config, main, resolve

MEASURED, ROWS, LENGTH, VOCABULARY = ("bert", "opt", "llama"), 8, 64, 4000
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=3, model_max_length=10**9)

def sized(family, width=256, layers=3):
    """A configuration of some tens of MB, so that a process's memory shows what its tensors take."""
    config = family_config(family, VOCABULARY)
    config.update(dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                       max_position_embeddings=128))
    config.update({"opt": {"ffn_dim": 4 * width, "word_embed_proj_dim": width},
                   "llama": {"intermediate_size": 4 * width, "num_key_value_heads": 4},
                   "bert": {"intermediate_size": 4 * width}}[family])
    return config

def settings(**more):
    return resolve(Config(**dict(task="rte", student="s", teacher="painter", batch_size=ROWS,
                                 max_length=LENGTH, device="cpu") | more))

def train_for(lm_config, checkpointing, steps, rows=ROWS, length=LENGTH, device="cpu", autocast=nullcontext):
    """A real student's steps, as in train.update."""
    student = Student(transformers.AutoModel.from_config(lm_config), TOKENIZER, 2, 1024).to(device).train()
    if checkpointing:
        student.checkpoint_gradients()
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    x = {"input_ids": torch.randint(4, VOCABULARY, (rows, length)),
         "attention_mask": torch.ones(rows, length).long()}
    x["attention_mask"][0, -1] = 0  # without any padding transformers would make no mask
    if lm_config.model_type == "bert":
        x["token_type_ids"] = torch.zeros(rows, length).long()
    x = {key: value.to(device) for key, value in x.items()}
    o, p, y = torch.zeros(rows, 2), torch.zeros(rows, 1024), torch.zeros(rows).long()
    target = Outputs(*(each.to(device) for each in (o, o, p)))
    for _ in range(steps):
        with autocast():
            out = student(**x)
        loss, _ = student_loss(out, target, y.to(device), alpha=0.5, beta=1.0, gamma=1.0, temperature=5.0,
                               kind="manifold")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

def planned(lm_config, checkpointing, amp="off", **more):
    """Bytes that the plan expects of train_for."""
    config = settings(**more)
    student = plan.imagine(config, lm_config, 1024)
    cuda = config.device == "cuda"
    parts = plan.estimate(config, student, amp, checkpointing, config.micro_batch, cuda, aligner=1)
    return sum(parts.values())

def peak_growth(family, checkpointing):
    """Bytes by which the peak resident set of a forked process grows in three steps (in the second, the
    optimizer's moments are there)."""
    def warm_up():
        train_for(sized(family, 32, 1), checkpointing, 1, rows=2, length=8)
        gc.collect()

    warm_up()  # loads the code that a step runs
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: a larger block goes back to the system once it is freed
    read, write = os.pipe()
    if not (child := os.fork()):
        def memory(name):
            return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if name in line)

        warm_up()  # touches its pages, which after a fork may not count until then
        libc.malloc_trim(0)
        before = memory("VmRSS")
        train_for(sized(family), checkpointing, 3)
        os.write(write, str(memory("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(read, 99))

if __name__ == "__main__":  # the child process
    torch.set_num_threads(1)
    print(json.dumps({f"{family} {on}": peak_growth(family, on)
                      for family in MEASURED for on in (False, True)}))
    sys.exit()

@pytest.fixture(scope="module", autouse=True)
def child():
    """Measures while the other tests run."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-m", "tests.test_plan"], cwd=root, stdout=subprocess.PIPE,
                               env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})  # no fork after CUDA began
    yield process
    process.kill()
    process.wait()

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
    main(typed("--student", opt, "--cache-dir", str(tmp_path / "cache")))
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr().out
    assert "steps: 780 of the student" in told  # 10 epochs of 78 batches of RTE's 2,490 examples
    assert "vectors to make of painter: 0" in told
    real = Student(transformers.AutoModel.from_config(sized("opt", 32, 2)), TOKENIZER, 2, 1024)
    count = sum(p.numel() for p in real.parameters())
    assert f"parameters: {count:,}, {count:,} of them trained" in told

@pytest.mark.parametrize("family", MEASURED)
def test_of_a_lora_adapters_and_heads_are_trained_and_its_base_is_rounded(family):
    config = settings(lora=4)
    student = plan.imagine(config, sized(family, 32, 2), 1024)
    real = Student(transformers.AutoModel.from_config(sized(family, 32, 2)), TOKENIZER, 2, 1024, lora=4)
    for counted in (lambda p: True, lambda p: p.requires_grad):
        assert (sum(p.numel() for p in student.parameters() if counted(p))
                == sum(p.numel() for p in real.parameters() if counted(p)))
    off, bf16 = (plan.estimate(config, student, amp, True, ROWS) for amp in ("off", "bf16"))
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert off["moments"] == 2 * trained
    frozen = sum(p.nbytes for p in real.parameters() if not p.requires_grad)
    assert off["weights"] - bf16["weights"] == frozen / 2

def test_the_flags_that_it_suggests_fit_and_depend_on_the_memory():
    config = settings(batch_size=16, device="cuda")
    estimates = plan.Estimates(config, sized("llama", 32, 2), 1024, 1024, None)

    def need(checkpointing, rows):  # GiB
        return sum(estimates(None, 0, "bf16", checkpointing, rows).values()) / 2**30 + plan.CONTEXT

    def told(memory):
        estimates.config = replace(config, memory=memory)
        return estimates.flags("bf16", False)

    assert need(False, 16) > need(True, 16) > need(True, 4) > need(True, 1)
    assert told(need(False, 16)) == ""
    assert told(need(True, 16)) == "--grad-checkpoint on"
    assert told(need(True, 4)) == "--grad-checkpoint on --micro-batch 4"
    assert "--lora 8" in told(need(True, 1) - 1e-6) and told(0.1) is None

def test_answers_to_generate_have_logits_and_keys():
    config = settings(task="reason/arc_e", max_length=32, max_new_tokens=8, lora=0)
    student = plan.imagine(config, sized("llama", 32, 2), 1024)
    parts = plan.estimate(config, student, "off", True, ROWS)
    assert parts["logits"] >= 4 * ROWS * 8 * VOCABULARY  # (N, V) float32
    cached = plan.estimate_answers(config, student, "off", ROWS)["activations"]
    assert cached >= 4 * 2 * 2 * ROWS * 32 * 32  # keys and values, layers, B, L, d

@pytest.mark.parametrize("flags, says", [
    (["--memory", "0"], "--memory 0.0 must be a number above 0"),
    (["--fsdp"], "--plan tells the memory of one process"),
    (["--max-length", "200"], "reads at most 128 tokens"),
    (["--proj-dim", "2000"], "--proj-dim 2000 is over painter's 1024"),
    (["--lora", "99"], "--lora 99"),
    (["--task", "reason/arc_e", "--max-new-tokens", "8"], "reads both ways"),
    (["--student", "."], "holds no config.json")])
def test_what_cannot_be_planned_is_one_line(flags, says, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed("--student", folder("bert"), *flags))
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and says in error and error.count("\n") == 1 and not out

def test_no_such_folder_is_a_user_error():
    with pytest.raises(UserError, match="vectors:nowhere|nowhere"):
        config = replace(settings(student="tiny"), teacher="vectors:nowhere")
        plan.plan(config, [config])

def test_memory_is_that_of_a_real_training(child):
    """Within 15 %; the last test, for the child to have ended."""
    measured = json.loads(child.communicate(timeout=120)[0])
    for name, found in measured.items():
        family, on = name.split()
        assert planned(sized(family), on == "True") == pytest.approx(found, rel=0.15), name
