"""Bad input: one line on stderr that names the thing and says what to type, exit status 2.

Nothing is loaded or fetched before, nothing is left behind. Read beside train.py's configuration
and data.py's readers.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import data
import eval as evaluation
import student
import teacher
import train as training
from data import UserError
from train import Cell, Config, main, resolve


@pytest.fixture
def folder(tmp_path, official):
    """tmp_path with small official files in data/ and fitting vectors in vectors/."""
    for name in ("RTE", "SST-2", "STS-B", "WSC", "CoLA", "COPA"):
        shutil.copytree(Path(official) / name, tmp_path / "data" / name)
    (tmp_path / "vectors").mkdir()
    for split, n in (("train", 12), ("dev", 6)):
        vectors = np.random.default_rng(0).standard_normal((n, 8))
        np.save(tmp_path / f"vectors/{split}.npy", vectors)
    return tmp_path


def completed(flags, folder):
    """The flags as a list, with those that every run here needs: data, and a folder to write."""
    flags = flags.format(folder=folder).split()
    if "--resume" not in flags and "--out" not in flags:
        flags += ["--out", str(folder / "run")]
    if "--data-dir" not in flags:
        flags += ["--data-dir", str(folder / "data")]
    return flags


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """refused(flags) -> the one line; fails if a student was loaded, the network asked or anything
    left."""
    def forbid(owner, name, what):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail(what))

    forbid(training, "build_student", "a student was loaded")
    forbid(data.urllib.request, "urlopen", "the network was asked")

    def run(flags):
        before = sorted(folder.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(completed(flags, folder))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        assert sorted(folder.rglob("*")) == before
        return error

    return run


# ---- flags and environment ----
@pytest.mark.parametrize("flags, says", [
    ("--task rtee", "unknown task 'rtee': did you mean rte?"),
    ("--task reason/arce", "did you mean reason/arc_e?"),
    ("--task instruct/dolly --student opt-125m --max-new-tokens 512",
     "--max-length 512 is for both"),
    ("--task instruct/dolly --student tiny", "--student tiny is random"),
    ("--lora 8", "--student tiny is random: for --lora"),
    ("--task rte --lora -1", "--lora -1 must be a number at least 0"),
    ("--tusk rte", "did you mean --task?"),
    ("--teacher paintr", "unknown teacher 'paintr': did you mean painter?"),
    ("--loss cosin", "unknown --loss 'cosin': did you mean cosine?"),
    ("--arms armda", "unknown arm 'armda': did you mean armada?"),
    ("--arms armada,armada", "name each once"),
    ("--arms armada,", "unknown arm ''"),
    ("--pairing own,noise", "unknown --pairing 'own,noise'"),
    ("--picture-encoder pixel", "did you mean pixels?"),
    ("--picture-encoder pixels", "painter gives no pictures; leave it out"),
    ("--task rte --student tiny --teacher api:https://me:secret@host/v1",
     "write api:https://HOST/v1"),
    ("--task rte --student tiny --data-dir /dev/null", "/dev/null"),
    ("--amp fp32", "known: auto, off, bf16, fp16"),
    ("--amp fp16 --device cpu", "--amp fp16 needs a CUDA device: try --amp bf16 or off"),
    ("--grad-checkpoint yes", "known: auto, on, off"),
    (f"--epochs 1{400 * '0'}", "is too large: give 1e+12 at most"),
    (f"--epochs {5000 * '9'}", "argument --epochs: invalid int value"),
    (f"--seeds {5000 * '9'}", "give whole numbers: 0,1,2"),
    ("--seeds ²", "give whole numbers: 0,1,2"),
    ("--temperature 1e300", "--temperature is too large"),
    ("--lr 1e30", "--lr is too large"),
    ("--memory 1e400 --plan", "--memory inf must be a number above 0"),
    ("--device cuda:99999999999999999999", "choose auto, cpu, cuda, cuda:N or mps"),
    ("--device cuda:-1", "choose auto, cpu, cuda, cuda:N or mps"),
    ("--device cuda:²", "choose auto, cpu, cuda, cuda:N or mps"),
    ("--device gpu", "choose auto, cpu, cuda, cuda:N or mps"),
    ("--device cuda:77", "--device cuda:77: torch sees no such device here; try --device c"),
    ("--alpha 1.5", "--alpha 1.5 must be a number at least 0 and at most 1"),
    ("--beta nan", "--beta nan must be a number at least 0"),
    ("--beta -1", "--beta -1.0 must be a number at least 0"),
    ("--gamma inf", "--gamma inf must be a number at least 0"),
    ("--temperature 0", "--temperature 0.0 must be a number above 0"),
    ("--lr 0", "--lr 0.0 must be a number above 0"),
    ("--aligner-lr x", "invalid float value: 'x'"),
    ("--epochs 0", "--epochs 0 must be a number at least 1"),
    ("--epochs two", "invalid int value: 'two'"),
    ("--batch-size 64 --micro-batch 12", "--micro-batch 12 must divide --batch-size 64: try 8"),
    ("--batch-size 8 --micro-batch 16", "--micro-batch 16 must divide --batch-size 8: try 8"),
    ("--limit 1", "--limit 1 must be a number at least 2"),
    ("--max-length 3", "--max-length 3 must be a number at least 4"),
    ("--proj-dim 2000", "--proj-dim 2000 is over painter's 1024: give that or less"),
    ("--seeds 0,x", "give whole numbers: 0,1,2"),
    ("--seeds 0,0", "name each once"),
    ("--seeds -1", "seeds from 0"),
    ("--max-pictures -1", "--max-pictures -1 must be a number at least 0"),
    ("--teacher painter:7", "painter:7: write painter:RHO with a dose RHO from 0"),
    ("--task rte --student tiny --teacher vectors:/nowhere",
     "/nowhere/train.npy is no readable array"),
    ("--task rte --student tiny --teacher images:/nowhere", "/nowhere/manifest.jsonl"),
    ("--task rte --student tiny --teacher clip:/nowhere/x", "no folder here"),
    ("--task rte --student /nowhere/model", "could not fetch /nowhere/model: no folder here"),
    ("--task rte --student tiny --data-dir /nowhere",
     "/nowhere/RTE/train.tsv is missing: give --data-dir"),
    ("--resume /nowhere", "--resume /nowhere: no run there"),
    ("--resume {folder}/data", "no run there"),
    ("--out /dev/null/run --seeds 0", "/dev/null"),
])
def test_a_wrong_flag_is_one_line_before_any_load_or_fetch(refused, flags, says):
    assert says in refused(flags)


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("WORLD_SIZE", "-1"), ("RANK", "x"),
    ("MASTER_PORT", "9" * 30)])
def test_an_environment_that_torchrun_did_not_make_is_one_line(refused, monkeypatch, name, value):
    from_torchrun = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0",
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for variable, usual in from_torchrun.items():
        monkeypatch.setenv(variable, usual)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)  # as other processes do
    assert f"the environment has {name}={value}" in refused("--task rte --student tiny")


# ---- files of data and vectors ----
def spoil(path, change):
    """Write a file anew: change(text) is its new text, or its new bytes."""
    new = change(path.read_text(encoding="utf-8"))
    if isinstance(new, str):
        new = new.encode()
    path.write_bytes(new)


def edit(old, new, count=1):
    """A change of the first places that read `old`."""
    return lambda text: text.replace(old, new, count)


@pytest.mark.parametrize("task, file, change, says", [
    ("rte", "RTE/train.jsonl", lambda text: "", "RTE/train.jsonl has no rows"),
    ("rte", "RTE/train.jsonl", lambda text: text[:-20], "RTE/train.jsonl:12 is not JSON"),
    ("rte", "RTE/val.jsonl", lambda text: text.encode("utf-16"), "RTE/val.jsonl is not UTF-8"),
    ("rte", "RTE/val.jsonl", lambda text: "3\n" + text, "RTE/val.jsonl:1 is not a JSON object"),
    ("rte", "RTE/train.jsonl", edit("not_entailment", "perhaps"),
     "RTE/train.jsonl:2 has the label 'perhaps' in column label: "
     "expected one of entailment, not_entailment"),
    ("rte", "RTE/train.jsonl", edit('"premise"', '"prem"'),
     "RTE/train.jsonl:1 has no text 'premise'"),
    ("sst2", "SST-2/dev.tsv", edit("\t", " ", 2), "SST-2/dev.tsv:"),
    ("sst2", "SST-2/train.tsv", edit("\t1\n", "\t1\t1\n"),
     "SST-2/train.tsv:3 has 3 columns, not 2: sentence, label"),
    ("stsb", "STS-B/train.tsv", edit("0.900", "nan"),
     "STS-B/train.tsv:3 has the label 'nan' in column score: expected a number from 0 to 5"),
    ("cola", "CoLA/train.tsv", edit("\t1\t", "\tyes\t"), "expected one of 0, 1"),
    ("wsc", "WSC/train.jsonl", edit('"span1_index": 0', '"span1_index": 70'),
     "WSC/train.jsonl:1 has no text with two spans"),
    ("wsc", "WSC/train.jsonl", edit('"span2_index": 4', '"span2_index": -4'),
     "WSC/train.jsonl:1 has no text with two spans"),
    ("rte", "RTE/val.jsonl", lambda text: "[" * 10**5,
     "val.jsonl:1 is not JSON (it is nested too deeply)"),
    ("stsb", "STS-B/train.tsv", edit("0.900", "1" + "0" * 400),
     "expected a number from 0 to 5"),
    ("rte", "RTE/val.jsonl", edit("stands", "\\ud800"),
     "val.jsonl:1 holds half of a character"),
])
def test_a_damaged_data_file_is_named_with_its_line(refused, folder, task, file, change, says):
    spoil(folder / "data" / file, change)
    assert says in refused(f"--task {task} --student tiny --teacher painter")


@pytest.mark.parametrize("split, array, says", [
    ("train", np.zeros((11, 8)),
     "train.npy has shape (11, 8), expected (12, 8): one row an example"),
    ("dev", np.zeros((6, 9)), "dev.npy has shape (6, 9), expected (6, 8)"),
    ("dev", np.zeros((6, 8), int),
     "dev.npy holds int64 of shape (6, 8): expected floats, in C order"),
    ("train", np.full((12, 8), np.nan), "train.npy, whose row 0 (the first is 0)"),
    ("dev", np.full((6, 8), 1e30), "out of scale beside the root mean square"),
    ("train", np.array([["a"] * 8] * 12, object), "train.npy is no readable array"),
])
def test_vectors_that_do_not_fit_are_refused(refused, folder, split, array, says):
    np.save(folder / f"vectors/{split}.npy", array, allow_pickle=True)
    assert says in refused("--task rte --student tiny --teacher vectors:{folder}/vectors")


def test_half_of_a_vectors_file_is_refused(refused, folder):
    whole = (folder / "vectors/train.npy").read_bytes()
    (folder / "vectors/train.npy").write_bytes(whole[:len(whole) // 2])
    error = refused("--task rte --student tiny --teacher vectors:{folder}/vectors")
    assert "train.npy is no readable array" in error


# ---- what comes to light later ----
@pytest.mark.parametrize("student_name, length, says", [
    ("opt", 90, "reads at most 80 tokens"),
    ("tiny", 600, "tiny reads at most 512 tokens"),
    ("tiny", 9, "--max-length 9 is too small for"),
])
def test_what_only_the_loaded_student_can_tell_is_one_line_too(
        folder, model_folder, capsys, student_name, length, says):
    if student_name != "tiny":
        student_name = model_folder(student_name)
    flags = f"--task copa --teacher painter --device cpu --student {student_name}"
    with pytest.raises(SystemExit) as stop:
        main(completed(f"{flags} --max-length {length}", folder))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (folder / "run").exists()


def test_an_output_folder_that_holds_another_run_and_a_resume_with_other_flags(refused, folder):
    cell = folder / "run/armada/0"
    cell.mkdir(parents=True)
    (cell / "log.jsonl").write_text("")
    config = resolve(Config(task="rte", student="tiny", teacher="painter",
                            data_dir=str(folder / "data")))
    (folder / "run/config.json").write_text(json.dumps(vars(config)))
    assert f"run holds a run already: go on with --resume {folder}/run" in refused("--task rte")
    error = refused("--resume {folder}/run --lr 1e-3 --beta 2")
    assert "--lr is 2e-05, not 0.001; --beta is 1.0, not 2.0: leave it out" in error
    # What a resumed run may spend and ask is said anew.
    saved = training.resume_config(folder / "run", {"max_pictures": 5, "offline": True})
    assert saved.max_pictures == 5
    assert saved.offline
    (folder / "run/config.json").write_text('{"tsk": "rte"}')
    assert "not one of this version" in refused("--resume {folder}/run")


def test_what_others_keep_in_the_output_folder_is_never_cleared_away(folder, monkeypatch, capsys):
    flags = completed("--task rte --student tiny --device cpu --teacher clip:{folder}", folder)
    run = folder / "run"
    with pytest.raises(SystemExit):
        main(flags)  # no such model: nothing was begun
    assert not run.exists()

    def keep_a_file_and_fail(_):
        (run / "paid.sqlite").touch()  # as if --cache-dir lay in --out
        raise OSError("no room")

    monkeypatch.setattr(training, "Data", keep_a_file_and_fail)
    with pytest.raises(SystemExit):
        main(flags)
    assert (run / "paid.sqlite").exists()
    (run / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit):
        main(flags)
    assert (run / "config.json").read_text() == '{"model_type": "bert"}'
    assert "holds a run already" in capsys.readouterr().err


def test_near_names_are_suggested_for_a_student_that_neither_folder_nor_hub_has(monkeypatch):
    def unreachable(url, timeout):
        raise OSError("no network")

    student.check_available.cache_clear()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(UserError, match="did you mean opt-1.3b?"):
        student.check_available("opt-1.3")


@pytest.mark.parametrize("program, work, flags", [
    (evaluation, "evaluate", ["runs/mine"]),
    (teacher, "make_ahead", ["--task", "rte"]),
])
def test_ctrl_c_is_one_line_and_the_status_that_shells_know(
        monkeypatch, capsys, program, work, flags):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, work, interrupted)
    with pytest.raises(SystemExit) as stop:
        program.main(flags)
    assert stop.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("stopped; the same command") and error.count("\n") == 1


def test_no_key_is_in_what_a_run_writes(folder, monkeypatch, capsys):
    """The spec of an image API is stored with the run, its key never is."""
    pytest.importorskip("PIL", reason="pillow is optional: pip install pillow")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that what --offline sets is undone
    (folder / "run").mkdir()  # so that it is not cleared away
    with pytest.raises(SystemExit):
        main(completed("--task rte --student tiny --device cpu --offline "
                       "--teacher api:http://127.0.0.1:9/v1 --cache-dir {folder}/cache", folder))
    assert "--offline" in capsys.readouterr().err
    assert (folder / "run/config.json").exists()
    for path in folder.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small tmpfs")
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, capsys):
    """On a file system of 14 MB what the end writes finds no room beside the first checkpoint. With
    room, it goes on from that one and ends as a run that never stopped."""
    monkeypatch.setattr(Cell, "checkpoint_is_due", lambda cell: cell.done < cell.total_steps)
    flags = ["--seeds", "0", "--arms", "armada", "--epochs", "2", "--eval-every", "1",
             "--device", "cpu"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(SystemExit) as stop:
            main([*flags, "--out", str(disk / "run")])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "No space left" in error
        assert error.count("\n") == 1
        assert f"--resume {disk}/run" in error
        last = disk / "run/armada/0/last"
        student.load_student(last)
        saved = json.loads((last / "training.json").read_text())
        assert saved["done"] == 8  # the steps of both roles in epoch 1
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        main(["--resume", str(disk / "run")])
        main([*flags, "--out", str(tmp_path / "run")])
        cell = "run/armada/0/last/model.safetensors"
        assert (disk / cell).read_bytes() == (tmp_path / cell).read_bytes()
    finally:
        subprocess.run(["umount", disk])
