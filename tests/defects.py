"""A zoo of defects: small changes of the seven modules, each of which breaks something.

    python -m tests.defects --list            # numbers and symptoms
    python -m tests.defects --write 7 FOLDER  # a copy of the project with defect 7: find the line
    python -m tests.defects --check [7 ...]   # which tests catch each of them; minutes for all
    python -m tests.defects --check --handful 3   # every sixth one, as CI does with another number

A defect is one place in one file. Nothing crashes: training goes on, numbers come out, and a person
who looks sees only the symptom. Who wants to be surprised reads no further than this line.

The table is also the proof that the tests verify the mathematics: each defect is caught by the
tests that it names, which pass without it. To add one, write an entry with the next number; where
no test catches it, one is missing.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data import Parser, UserError, exit_with_message, prepare_console

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("*.py", "tests", "README.md", "LICENSE", "requirements.txt", ".gitignore")
# What would give the answer away, and what is made anew.
LEFT_OUT = ("defects.py", "test_defects.py", "__pycache__")
HANDFULS = 6   # into so many the table is dealt out, for CI
AT_ONCE = 2    # processes of pytest
PATIENCE = 1800  # seconds, after which a test has not caught a defect but hangs

COMMON = "A common slip."
TRAP = "Seen in a real code base."
AUTHORS = "Seen in the code of the paper's authors."


@dataclass(frozen=True)
class Defect:
    """One place that is changed, what a person then notices, and the tests that notice it too."""
    number: int
    symptom: str   # what is seen from outside; never the cause
    file: str
    old: str       # occurs in the file exactly once
    new: str
    seen: str      # where the fault was really made
    tests: tuple   # "tests/FILE.py::NAME", as few and as fast as will do


DEFECTS = (
    # ---- losses.py ----
    Defect(
        number=1,
        symptom="The higher --temperature, the less the soft labels matter: at 50 the `output` of "
                "log.jsonl is next to nothing, and armada hardly differs from no-output.",
        file="losses.py",
        old="return temperature**2 * _mse(soft_t, soft_s)",
        new="return _mse(soft_t, soft_s)",
        seen=COMMON,
        tests=("tests/test_losses.py::test_T_squared_keeps_the_size_of_the_gradient",)),
    Defect(
        number=2,
        symptom="Of two tasks to generate, the one whose answers have more different words takes "
                "less notice of --alpha, for its `output` in log.jsonl is smaller.",
        file="losses.py",
        old='reduction="batchmean"',
        new='reduction="mean"',
        seen="Seen in annotated implementations of papers.",
        tests=("tests/test_generate.py::"
               "test_output_kl_against_a_loop_and_zero_where_both_agree",)),
    Defect(
        number=3,
        symptom="On a task to generate the aligner finds several answers likely; its student's "
                "auxiliary head is sure of one, and never pays for leaving the others out.",
        file="losses.py",
        old="F.kl_div(log_s, log_t,",
        new="F.kl_div(log_t, log_s,",
        seen=COMMON,
        tests=("tests/test_generate.py::"
               "test_output_kl_against_a_loop_and_zero_where_both_agree",)),
    Defect(
        number=4,
        symptom="The arms armada and euclidean end alike, to the last digit of log.jsonl.",
        file="losses.py",
        old="return _mse(p_t, p_s)",
        new="return _mse(p_t.mean(0), p_s.mean(0))",
        seen=TRAP,
        tests=("tests/test_losses.py::test_every_manifold_loss_against_a_loop[manifold]",)),
    Defect(
        number=5,
        symptom="undistilled stays at chance, and its grad_norm is 0 in every line of log.jsonl. "
                "armada is as good as ever.",
        file="losses.py",
        old="(1 - alpha) * task + alpha * output_factor * output",
        new="alpha * task + (1 - alpha) * output_factor * output",
        seen="Seen in a real code base, in which the test had swapped the weights as well.",
        tests=("tests/test_losses.py::"
               "test_student_loss_is_the_weighted_sum_of_its_parts_which_are_reported_before_"
               "their_weights",)),
    Defect(
        number=6,
        symptom="Who calls student_loss in a loop of their own, and asks the aligner without "
                "no_grad, sees it drift towards the student, step by step.",
        file="losses.py",
        old="p_t = aligner_out.proj.detach()",
        new="p_t = aligner_out.proj",
        seen=COMMON,
        tests=("tests/test_losses.py::test_no_gradient_reaches_the_teachers_side",)),

    # ---- align.py ----
    Defect(
        number=7,
        symptom="Two pictures that lie far apart may be close after the aligner's projection, "
                "which should keep every distance.",
        file="align.py",
        old="v = F.normalize(self.v, dim=-1)",
        new="v = F.normalize(self.v, dim=0)",
        seen=COMMON,
        tests=("tests/test_align.py::"
               "test_at_full_width_the_projection_keeps_every_length_and_angle_of_the_teachers_"
               "vectors",)),

    # ---- student.py ----
    Defect(
        number=8,
        symptom="Each decoder is refused: it \"gives a text another vector when longer texts "
                "stand beside it\".",
        file="student.py",
        old="return out.last_hidden_state[torch.arange(len(last), device=last.device), last]",
        new="return out.last_hidden_state[:, -1]",
        seen="Seen in the code of the paper's authors, and in a book's, where nothing refuses it.",
        tests=("tests/test_student.py::test_padding_changes_nothing",)),
    Defect(
        number=9,
        symptom="Each decoder that is to classify is refused: it \"pools a state that has not read "
                "the last word of a text\".",
        file="student.py",
        old="mask.cumsum(-1).argmax(-1)",
        new="mask.argmax(-1)",
        seen=AUTHORS,
        tests=("tests/test_student.py::test_every_word_reaches_the_pooled_vector",)),
    Defect(
        number=10,
        symptom="Each student that is to generate is refused: it \"has read the later tokens that "
                "it should write\".",
        file="student.py",
        old="states[text, position] ",
        new="states[text, position + 1] ",
        seen=COMMON,
        tests=("tests/test_generate.py::"
               "test_answer_losses_and_bags_against_a_loop_over_positions",)),
    Defect(
        number=11,
        symptom="Asked twice about the same texts, predict() changes its mind about some.",
        file="student.py",
        old="            self.eval()\n",
        new="            self.train()\n",
        seen=COMMON,
        tests=("tests/test_student.py::"
               "test_answers_come_without_dropout_in_order_and_leave_the_mode_alone",)),
    Defect(
        number=12,
        symptom="predict() gives some texts of a list other answers than it gives each alone, "
                "although padding changes no vector.",
        file="student.py",
        old="for i, value, p in zip(indices,",
        new="for i, value, p in zip(sorted(indices),",
        seen=COMMON,
        tests=("tests/test_student.py::"
               "test_answers_come_without_dropout_in_order_and_leave_the_mode_alone",)),
    Defect(
        number=13,
        symptom="With --lora the heads learn, but at the end of the run every number in "
                "last/adapter_model.safetensors is 0.",
        file="student.py",
        old="nn.init.zeros_(self.lora_B.weight)",
        new="nn.init.zeros_(self.lora_B.weight)\n        nn.init.zeros_(self.lora_A.weight)",
        seen=COMMON,
        tests=("tests/test_generate.py::"
               "test_a_new_adapter_can_learn",)),
    Defect(
        number=14,
        symptom="However long undistilled trains on `objects`, its `task` in log.jsonl never falls "
                "below 0.31.",
        file="student.py",
        old='o = self.heads["classifier"](self.drop(h)) ',
        new='o = self.heads["classifier"](self.drop(h)).softmax(-1) ',
        seen=COMMON,
        tests=("tests/test_student.py::"
               "test_outputs_have_the_shapes_and_formulas_of_the_method",)),

    # ---- train.py ----
    Defect(
        number=15,
        symptom="armada stays at chance, below undistilled, although its aligner is right about "
                "nearly every dev picture.",
        file="train.py",
        old="            e = send(cell.teacher_vectors(rows),",
        new="            e = send(cell.teacher_vectors(sorted(rows)),",
        seen=TRAP,
        tests=("tests/test_train.py::"
               "test_the_aligner_sees_the_vector_that_the_pairing_names",)),
    Defect(
        number=16,
        symptom="With the dropout taken out of the code, two runs of undistilled that differ in "
                "--micro-batch alone should end alike. On the 120 texts of `objects` they do at "
                "--batch-size 24, and at 32 they do not.",
        file="train.py",
        old="share = len(micro_rows) / len(rows)",
        new="share = config.micro_batch / config.batch_size",
        seen=TRAP,
        tests=("tests/test_train.py::"
               "test_micro_batches_are_logged_as_the_mean_over_the_batch",)),
    Defect(
        number=17,
        symptom="With --micro-batch 8 in place of 32 the `lr` of log.jsonl becomes negative.",
        file="train.py",
        old="lr = peak_rates[role] * lr_factor(epoch * steps + step, config.epochs * steps)",
        new="passes = config.batch_size // config.micro_batch\n            "
            "done = (epoch * steps + step) * passes\n            "
            "lr = peak_rates[role] * lr_factor(done, config.epochs * steps)",
        seen=TRAP,
        tests=("tests/test_train.py::"
               "test_micro_batches_give_the_update_of_the_whole_batch",)),
    Defect(
        number=18,
        symptom="A weight that no text uses, such as tiny's position 511, is next to 0 after a "
                "short run.",
        file="train.py",
        old="role: torch.optim.AdamW(",
        new="role: torch.optim.Adam(",
        seen=COMMON,
        tests=("tests/test_train.py::"
               "test_a_weight_without_a_gradient_decays_by_a_hundredth_of_the_rate",)),
    Defect(
        number=19,
        symptom="The first step of a run agrees with one that is computed by hand. From the second "
                "on its grad_norm is not that of its batch.",
        file="train.py",
        old="    optimizer.zero_grad()\n",
        new="",
        seen=COMMON,
        tests=("tests/test_train.py::"
               "test_three_steps_of_each_role_are_adamw_with_clipped_gradients_and_the_scheduled_"
               "rate",)),
    Defect(
        number=20,
        symptom="The numbers that the aligner draws for its dropout in a step are, one by one, "
                "those that the student draws in its own.",
        file="train.py",
        old="seed_of(cell.seed, role, epoch, step, first)",
        new="seed_of(cell.seed, epoch, step, first)",
        seen=COMMON,
        tests=("tests/test_train.py::"
               "test_no_two_steps_of_a_run_draw_the_same_dropout_and_no_two_epochs_the_same_"
               "order",)),
    Defect(
        number=21,
        symptom="In the arm shuffled a text or two of most seeds get the right picture.",
        file="train.py",
        old="source[order] = np.roll(order, 1)",
        new="source = order",
        seen=COMMON,
        tests=("tests/test_train.py::"
               "test_shuffling_leaves_no_text_its_own_vector_whatever_the_seed",)),
    Defect(
        number=22,
        symptom="Asked twice about one batch in the student's step, the aligner gives two answers.",
        file="train.py",
        old="cell.aligner.eval()(e)",
        new="cell.aligner(e)",
        seen=COMMON,
        tests=("tests/test_train.py::"
               "test_in_the_students_step_the_aligner_answers_without_dropout",)),
    Defect(
        number=23,
        symptom="The dev score in metrics.json is never below that of any epoch in log.jsonl, and "
                "eval.py --rescore may lower it.",
        file="train.py",
        old='metrics["dev"] = cell.lines[-1]["dev"]',
        new='metrics["dev"] = cell.best["dev"]',
        seen="Seen in a collection of distillation methods, there on test.",
        tests=("tests/test_train.py::"
               "test_the_dev_score_in_metrics_json_is_the_last_epochs_and_not_the_best_ones",)),

    # ---- data.py ----
    Defect(
        number=24,
        symptom="On copa two questions that differ in nothing but their second choice have the "
                "same answer, whatever the student.",
        file="data.py",
        old='"1: {choice1} 2: {choice2}"',
        new='"1: {choice1}"',
        seen=AUTHORS,
        tests=("tests/test_data.py::"
               "test_every_field_reaches_student_and_teacher_and_the_label_reaches_neither"
               "[copa]",)),
    Defect(
        number=25,
        symptom="On a task to generate all texts that begin with the same word have one and the "
                "same p_s while the student trains.",
        file="data.py",
        old="labels = [-100] * len(prompt) + learnt",
        new="labels = prompt + learnt",
        seen=COMMON,
        tests=("tests/test_generate.py::"
               "test_the_loss_is_on_the_answers_tokens_token_by_token",)),
    Defect(
        number=26,
        symptom="A text is read differently when a longer one stands in its batch.",
        file="data.py",
        old='masks = [padded([1] * len(row["input_ids"]), 0) for row in rows]',
        new='masks = [padded([0] * len(row["input_ids"]), 1) for row in rows]',
        seen=COMMON,
        tests=("tests/test_data.py::"
               "test_collate_pads_to_the_longest_row_of_the_batch_and_masks_the_padding",)),
    Defect(
        number=27,
        symptom="On reason/ and instruct/ dev scores rise epoch by epoch, high above those on "
                "test.",
        file="data.py",
        old='        else:\n            splits["train"].append(example)\n',
        new='        splits["train"].append(example)\n',
        seen=COMMON,
        tests=("tests/test_generate.py::"
               "test_train_and_dev_share_no_row_and_each_task_is_scored_on_its_own_file",)),
    Defect(
        number=28,
        symptom="The same command, typed twice, ends with two different students.",
        file="data.py",
        old="    digest = hashlib.sha256(repr(parts).encode()).digest()\n"
            '    return int.from_bytes(digest[:8], "little")\n',
        new="    return hash(parts) % 2**64\n",
        seen=COMMON,
        tests=("tests/test_data.py::test_a_seed_is_the_same_in_every_process",)),

    # ---- teacher.py ----
    Defect(
        number=29,
        symptom="painter is as ever. painter:0.5 draws the same text otherwise each time it is "
                "built.",
        file="teacher.py",
        old='noise = seeded_generator("noise", text).standard_normal(picture.shape)',
        new="noise = np.random.standard_normal(picture.shape)",
        seen=TRAP,
        tests=("tests/test_teacher.py::test_a_dose_keeps_the_contract_too",)),
    Defect(
        number=30,
        symptom="A new line at the top of the training file, and armada falls to the level of "
                "shuffled; with an empty --cache-dir it is good again. painter never does this.",
        file="teacher.py",
        old="[Cache.key(teacher.name, item) for item in items]",
        new="[Cache.key(teacher.name, i) for i in range(len(items))]",
        seen=TRAP,
        tests=("tests/test_teacher.py::"
               "test_each_distinct_text_is_made_once_and_paired_by_content",)),
    Defect(
        number=31,
        symptom="An entry is deleted from the cache during a run, and nobody is told.",
        file="teacher.py",
        old="lost = np.full(dim, np.nan, np.float32)",
        new="lost = np.zeros(dim, np.float32)",
        seen=AUTHORS,
        tests=("tests/test_teacher.py::"
               "test_a_vector_that_is_missing_at_training_time_is_an_error_that_names_the_"
               "example",)),

    # ---- eval.py ----
    Defect(
        number=32,
        symptom="An arm ten points below undistilled in every seed, though above shuffled, is "
                "not called WORSE.",
        file="eval.py",
        old="best = min(comparisons,",
        new="best = max(comparisons,",
        seen=COMMON,
        tests=("tests/test_eval.py::test_the_verdict_is_on_the_best_control",)),
    Defect(
        number=33,
        symptom='"24 clips and 48 clips are 72 clips" is marked wrong where 72 is the answer.',
        file="eval.py",
        old="return normalise(in_text[-1])",
        new="return normalise(in_text[0])",
        seen="Seen in a collection of adapters for language models.",
        tests=("tests/test_generate.py::"
               "test_answers_are_extracted_by_the_references_family",)),
)


# ---- a broken copy ----
def find_defect(number):
    """Return the entry of a number; UserError where there is none."""
    for defect in DEFECTS:
        if defect.number == number:
            return defect
    raise UserError(f"there is no defect {number}: --list shows 1 to {len(DEFECTS)}")


def copy_project(folder):
    """Copy modules, tests and README into a new folder, without this table and git's history."""
    folder.mkdir(parents=True)
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                ignore = shutil.ignore_patterns(*LEFT_OUT)
                shutil.copytree(path, folder / path.name, ignore=ignore)
            else:
                shutil.copy(path, folder)


def break_copy(folder, defect):
    """Change the one place of a copy; UserError where its text is not there exactly once."""
    path = folder / defect.file
    source = path.read_text(encoding="utf-8")
    count = source.count(defect.old)
    if count != 1:
        raise UserError(f"defect {defect.number}: its old text occurs {count} times in "
                        f"{defect.file}, not once: mend the entry in tests/defects.py")
    path.write_text(source.replace(defect.old, defect.new), encoding="utf-8")


def write(number, folder):
    """Write a broken copy of the project, and print what to look for."""
    defect = find_defect(number)
    if folder.exists():
        raise UserError(f"{folder} is there already: give the name of a new folder")
    copy_project(folder)
    break_copy(folder, defect)
    print(f"{folder} is a copy of the project, of which one place is broken. The symptom:\n\n"
          f"    {defect.symptom}\n\n"
          "Begin so: what would you measure to see it in a minute, on tiny models or made-up\n"
          "tensors? Which numbers does it touch, and which are as they were? Say which line of\n"
          "the method must be wrong before you read it. Comments there tell what the code is\n"
          "meant to do. Its tests know (python -m pytest -x -q), but first write one of your own\n"
          f"that fails. At the end compare: diff -r {ROOT} {folder}, and\n"
          f"python -m tests.defects --check {number} names the test that we have for it.")


# ---- are they caught? ----
def run_tests(folder, tests):
    """Run some tests of a copy; return (pytest's exit status, what it printed).

    The status is None where they have not ended within PATIENCE.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # On two cores two processes of one thread each are the faster way to have two answers.
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, timeout=PATIENCE,
                              capture_output=True, text=True, encoding="utf-8", errors="replace")
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PATIENCE} s"
    return done.returncode, done.stdout + done.stderr


def check_one(defect, folder):
    """Break a new copy of the project in FOLDER and run the defect's tests there.

    Returns (whether they caught it, what to say of that). Only a test that failed has caught
    anything: a name that is not found, or a module that cannot be imported, proves nothing.
    """
    copy_project(folder)
    break_copy(folder, defect)
    status, printed = run_tests(folder, defect.tests)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    if status == 1 and failed:
        return True, f"caught by {failed[1]}"
    if status == 0:
        return False, "NOT CAUGHT: all of its tests pass"
    return False, f"NOT CAUGHT, pytest's status is {status}: {printed.strip()[-500:]}"


def check_healthy(defects, folder):
    """Run the tests of all these defects on a copy without any; return the same as check_one."""
    tests = []
    for defect in defects:
        tests += defect.tests
    copy_project(folder)
    status, printed = run_tests(folder, dict.fromkeys(tests))  # several defects share a test
    if status == 0:
        return True, "the tests of these defects pass without them"
    return False, f"WITHOUT ANY DEFECT pytest's status is {status}: {printed.strip()[-2000:]}"


def timed(function, *arguments):
    """Return (the seconds that a call took, what it returned)."""
    began = time.perf_counter()
    returned = function(*arguments)
    return time.perf_counter() - began, returned


def check(defects):
    """Check some defects, two at a time, and print a line for each; return whether all is well."""
    began = time.perf_counter()
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        # It takes longest, so it begins first; the others need not wait to be told.
        healthy = pool.submit(timed, check_healthy, defects, Path(scratch, "healthy"))
        jobs = {}
        for defect in defects:
            folder = Path(scratch, str(defect.number))
            jobs[f"{defect.number:3}"] = pool.submit(timed, check_one, defect, folder)
        jobs["  -"] = healthy
        for number, job in jobs.items():
            seconds, (is_well, said) = job.result()
            print(f"{number} {seconds:5.1f} s  {said}", flush=True)
            outcomes.append(is_well)
    print(f"{sum(outcomes[:-1])} of {len(defects)} defects are caught, in "
          f"{time.perf_counter() - began:.0f} s")
    return all(outcomes)


def handful(number):
    """Return every sixth defect, beginning with one that the number tells; say which."""
    first = number % HANDFULS
    chosen = DEFECTS[first::HANDFULS]
    numbers = ", ".join(str(defect.number) for defect in chosen)
    print(f"handful {first} of 0 to {HANDFULS - 1}: defects {numbers}. Once more: "
          f"python -m tests.defects --check --handful {first}", flush=True)
    return chosen


# ---- the command line ----
def make_parser():
    """Return the parser of the command line."""
    parser = Parser(prog="-m tests.defects", allow_abbrev=False,
                    description="Defects to find, and the tests that find them.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="Show numbers and symptoms.")
    what.add_argument("--write", nargs=2, metavar=("N", "FOLDER"),
                      help="Write a copy of the project with defect N.")
    what.add_argument("--check", nargs="*", type=int, metavar="N",
                      help="Run the tests that are to catch each defect, or those named.")
    parser.add_argument("--handful", type=int, metavar="K",
                        help="Of --check: every sixth defect, beginning with K modulo 6.")
    return parser


def main(argv=None):
    """The command line: status 0; 1 where a defect is not caught; 2 for a mistake in typing."""
    prepare_console()
    args = make_parser().parse_args(argv)
    try:
        if args.handful is not None and args.check != []:
            raise UserError("--handful goes with --check alone: --check --handful 3")
        if args.list:
            for defect in DEFECTS:
                print(f"{defect.number:3}  {defect.symptom}")
        elif args.write:
            number, folder = args.write
            if not re.fullmatch("[0-9]{1,9}", number):
                raise UserError(f"--write {number}: give a number of --list, then a new folder")
            write(int(number), Path(folder))
        else:
            chosen = [find_defect(number) for number in args.check] or DEFECTS
            if args.handful is not None:
                chosen = handful(args.handful)
            if not check(chosen):
                sys.exit(1)
    except (UserError, OSError) as error:
        exit_with_message(2, f"tests.defects: error: {error}")


if __name__ == "__main__":
    main()
