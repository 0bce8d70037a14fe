"""The solutions of the exercises, each as the least change of the project that does it.

    python -m tests.exercises.solutions 1 FOLDER    # a copy of the project with exercise 1 solved

Look here last. A solution is one of many, and shows what is asked, not how you must do it.
tests/test_exercises.py sees that the checks fail without it and pass with it.
"""
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = "# ---- the method ends here; below is bookkeeping ----"


class Change(NamedTuple):
    """Text that stands once in a file of the project, and what it becomes."""
    file: str
    old: str
    new: str


def before(file, anchor, text):
    """Return the change that puts text in front of an anchor."""
    return Change(file, anchor, text + anchor)


def after(file, anchor, text):
    """Return the change that puts text behind an anchor."""
    return Change(file, anchor, anchor + text)


# ---- 1: a relational loss ----

RELATIONAL_LOSS = (
    Change("losses.py",
           'KINDS = ("euclidean", "cosine", "manifold")',
           'KINDS = ("euclidean", "cosine", "manifold", "relational")'),
    after("losses.py", '        "manifold"     MSE(p_t, p_s), text by text\n', '''\
        "relational"   MSE(cosines within the batch of p_t, of p_s), pair by pair
'''),
    after("losses.py", '''\
    if kind == "manifold":
        return _mse(p_t, p_s)
''', '''\
    if kind == "relational":
        _check_shapes(p_t, p_s)  # which the matrices (B, B) no longer show
        return _mse(_cosines(p_t), _cosines(p_s))
'''),
    before("losses.py", "def _mean_cosine_distance(m_t, m_s):\n", '''\
def _cosines(p):
    """cos(p_i, p_j) of all pairs of rows, (B, d) -> (B, B); those of a row of zeros are 0."""
    norms = p.norm(dim=-1, keepdim=True)        # (B, 1)
    unit = p / torch.where(norms > 0, norms, 1)  # (B, d)
    return unit @ unit.T                        # (B, B)


'''),
    Change("train.py",
           '("euclidean", "cosine", "manifold"))',
           '("euclidean", "cosine", "manifold", "relational"))'),
    after("train.py", '''\
    "cosine": {"loss": "cosine"},
''', '''\
    "relational": {"loss": "relational"},
'''),
    before("tests/test_losses.py", "# kind -> the same loss as a naive loop", '''\
def naive_cosines(rows):
    cosines = []
    for a in rows:
        for b in rows:
            dot = sum(x * y for x, y in zip(a, b))
            square_norms = sum(x * x for x in a) * sum(y * y for y in b)
            cosines.append(dot / math.sqrt(square_norms))
    return cosines


def naive_relational(t, s):
    return mean_square(naive_cosines(t), naive_cosines(s))


'''),
    after("tests/test_losses.py", '''\
    "manifold": naive_manifold,
''', '''\
    "relational": naive_relational,
'''),
)

# ---- 2: a teacher of one's own ----

OWN_TEACHER = (
    before("teacher.py", f"{FENCE}\n", '''\
class Thermometers(Teacher):
    """Two thermometers, whose columns are as high as the sizes of a text's first two objects.

    Mark k of 32 is 1 where the column reaches it. mine:RHO gives RHO marks + sqrt(1 - RHO^2) noise
    of the same power.
    """
    dim = 64

    def __init__(self, rho):
        try:
            self.rho = float(rho or 1)
        except ValueError:
            self.rho = -1
        if not 0 <= self.rho <= 1:
            raise UserError(f"mine:{rho}: write mine:RHO with a dose RHO from 0 to 1")
        self.name = f"mine:{self.rho:g}"

    def encode(self, texts):
        vectors = [self.read_off(text) for text in texts]
        return np.array(vectors, np.float32).reshape(-1, self.dim)  # (N, d_e)

    def read_off(self, text):
        """Return the vector of one text, (d_e,)."""
        words = re.findall(r"\\w+", text.lower())
        sizes = [OBJECTS[word][0] for word in words if word in OBJECTS]
        marks = np.geomspace(0.5, 6000, 32)
        columns = np.zeros((2, 32))
        for column, size in zip(columns, sizes):
            column[:] = marks <= size
        noise = seeded_generator("mine", text).standard_normal(self.dim)  # (d_e,)
        noise = noise * np.sqrt((columns**2).mean())
        return self.rho * columns.ravel() + np.sqrt(1 - self.rho**2) * noise


'''),
    after("teacher.py", '''\
TEACHERS = {
''', '''\
    "mine": Thermometers,
'''),
    before("tests/test_teacher.py", "def offline_clip(request):\n", '''\
def offline_mine(request):
    return Offline("mine", "mine:0.5", TEXTS, second_process=True)


'''),
    after("tests/test_teacher.py", '''\
OFFLINE = {
''', '''\
    "mine": offline_mine,
'''),
)

# ---- 3: shuffled within the label ----

SHUFFLED_WITHIN_LABEL = (
    Change("train.py",
           '("own", "shuffled", "noise"))',
           '("own", "shuffled", "within-label", "noise"))'),
    after("train.py", '''\
    "shuffled": {"pairing": "shuffled"},             # the method with other texts' pictures
''', '''\
    "shuffled-within": {"pairing": "within-label"},  # other texts' pictures, with the same label
'''),
    before("train.py", '''\
        elif config.pairing != "own":
            raise ValueError(''', '''\
        elif config.pairing == "within-label":
            if self.labels.is_floating_point():
                raise UserError("--pairing within-label is for tasks whose labels are classes")
            rng = np.random.default_rng(seed_of(seed, "within-label"))
            for label in self.labels.unique():
                order = rng.permutation(np.flatnonzero(self.labels == label))
                source[order] = np.roll(order, 1)
'''),
)

# ---- 4: two adapters become one ----

LORA_MERGE = (
    Change("tests/exercises/4_lora_merge.py", '''\
    raise NotImplementedError(f"{HERE}: write joined()")
''', '''\
    if first.base is not second.base:
        raise ValueError("only adapters of one base can be joined")
    a = torch.cat([first.lora_A.weight, second.lora_A.weight])              # (r1 + r2, in)
    scaled = [lora.scale * lora.lora_B.weight for lora in (first, second)]  # (out, r) each
    both = LoRA(first.base, len(a))
    with torch.no_grad():
        both.lora_A.weight.copy_(a)
        both.lora_B.weight.copy_(torch.cat(scaled, 1) / both.scale)         # (out, r1 + r2)
    return both
'''),
    Change("tests/exercises/4_lora_merge.py", '''\
    raise NotImplementedError(f"{HERE}: write squeezed()")
''', '''\
    update = lora.scale * lora.lora_B.weight @ lora.lora_A.weight  # (out, in)
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    narrow = LoRA(lora.base, rank)
    with torch.no_grad():
        narrow.lora_A.weight.copy_(vt[:rank])                                # (rank, in)
        narrow.lora_B.weight.copy_(u[:, :rank] * s[:rank] / narrow.scale)    # (out, rank)
    return narrow
'''),
)

# ---- 5: how many seeds ----

HOW_MANY_SEEDS = (
    Change("tests/exercises/5_how_many_seeds.py", '''\
    raise NotImplementedError(f"{HERE}: write deviation_of_differences()")
''', '''\
    a = comparison["arms"][arm]["scores"]
    b = comparison["arms"][control]["scores"]
    differences = [100 * (a[seed] - b[seed]) for seed in a if seed in b]
    if len(differences) < 2:
        raise ValueError(f"{arm} and {control} share {len(differences)} seeds: two are needed")
    return float(np.std(differences, ddof=1))
'''),
    Change("tests/exercises/5_how_many_seeds.py", '''\
    raise NotImplementedError(f"{HERE}: write seeds_needed()")
''', '''\
    z_level = NormalDist().inv_cdf(1 - level / 2)
    z_power = NormalDist().inv_cdf(power)
    n = ((z_level + z_power) * deviation / difference) ** 2 + z_level**2 / 2
    floor = math.log2(2 / level)  # 2 / 2^n <= level
    return math.ceil(max(n, floor))
'''),
    Change("tests/exercises/5_how_many_seeds.py",
           "import json\nimport sys\nfrom pathlib import Path\n",
           "import json\nimport math\nimport sys\nfrom pathlib import Path\n"
           "from statistics import NormalDist\n"),
)

# ---- 6: unlabelled text from a file ----

UNLABELLED_FILE = (
    before("data.py", "def tokenise(task, examples, tokenizer, decoder):\n", '''\
def read_texts(task, path):
    """Return the Examples, without a label, of a file with one text a line; blank lines are none.

    UserError where it cannot be read, and of a task whose examples are more than one text.
    """
    if len(task.fields) > 1:
        raise UserError(f"a line of {path} is one text, and {task.name} reads "
                        f"{', '.join(task.fields)}: leave it out")
    try:
        # Not read_text(), which would take a CR inside a text for the end of its line.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            fields = {task.fields[0]: line.removesuffix("\\r")}
            examples.append(
                Example(fields, NO_LABEL[task.kind], number, f"{path}:{number}"))
    if not examples:
        raise UserError(f"{path} has no text: write one a line")
    return examples


'''),
    Change("train.py", "seed_of,\n                  without_label)",
           "\n                  read_texts, seed_of, without_label)"),
    before("train.py", "    eval_limit: int = option(\n", '''\
    unlabelled_file: str = option(
        None, "Text file, one text a line, that --unlabelled takes its N from instead.")
'''),
    before("train.py", "    if config.memory and not config.plan:\n", '''\
    if config.unlabelled_file is not None:
        check_unlabelled_file(config)
'''),
    before("train.py", "def check_processes(config):\n", '''\
def check_unlabelled_file(config):
    """Raise UserError unless --unlabelled-file can be read, and has N texts for --unlabelled N."""
    if not config.unlabelled:
        raise UserError("--unlabelled-file goes with --unlabelled N: how many of its texts?")
    if config.teacher.startswith("vectors:"):
        raise UserError("--teacher vectors: has a vector for a row of the task, not for a text of "
                        "--unlabelled-file: leave one of them out")
    texts = read_texts(find_task(config.task), config.unlabelled_file)
    if len(texts) < config.unlabelled:
        raise UserError(f"{config.unlabelled_file} has {len(texts)} texts, --unlabelled "
                        f"{config.unlabelled} wants more: lower it")


'''),
    Change("train.py",
           "        examples = load_task(config.task, config.data_dir, config.cache_dir)\n",
           "        examples = load_task(config.task, config.data_dir, config.cache_dir)\n"
           "        examples = join_texts(config, examples)\n"),
    Change("train.py",
           "    return splits_in_use(config, load_task(task.name, str(folder)))\n",
           "    splits = join_texts(config, load_task(task.name, str(folder)))\n"
           "    return splits_in_use(config, splits)\n"),
    before("train.py", "def splits_in_use(config, splits):\n", '''\
def join_texts(config, splits):
    """Return the splits, with --unlabelled-file's texts in place of the rows behind --limit."""
    if config.unlabelled_file is None:
        return splits
    own = splits["train"][:config.limit]
    if len(own) < config.limit:
        raise UserError(f"{config.task} has {len(own)} training examples, --limit {config.limit} "
                        "wants more: lower it")
    texts = read_texts(find_task(config.task), config.unlabelled_file)
    return {**splits, "train": own + texts[:config.unlabelled]}


'''),
    after("train.py", "    train, dev = official\n", '''\
    if config.unlabelled_file is not None:
        train += config.unlabelled  # they take no place of the task's own rows
'''),
)

SOLUTIONS = {
    1: RELATIONAL_LOSS,
    2: OWN_TEACHER,
    3: SHUFFLED_WITHIN_LABEL,
    4: LORA_MERGE,
    5: HOW_MANY_SEEDS,
    6: UNLABELLED_FILE,
}


# ---- a solved copy ----

def copy_project(folder):
    """Copy modules, tests and README into a new folder: no runs, no caches, no history."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def solve(number, folder):
    """Change the copy of the project in a folder; ValueError where an old text is not there once.

    Nothing is written then: a solution is applied as a whole or not at all.
    """
    texts = {}
    for change in SOLUTIONS[number]:
        path = Path(folder, change.file)
        text = texts.get(path) or path.read_text(encoding="utf-8")
        count = text.count(change.old)
        if count != 1:
            raise ValueError(f"solution {number} does not fit: {change.file} has {count} times "
                             f"what it changes, {change.old!r:.80}")
        texts[path] = text.replace(change.old, change.new)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    count_reading_path(folder)


def count_reading_path(folder):
    """Write into README how many lines there are to read now; tests/test_layout.py holds it to it.

    The numbers follow the modules' names, as in "`losses.py` (206 lines), `align.py` (94)".
    """
    readme = Path(folder, "README.md")
    text = readme.read_text(encoding="utf-8")
    for module in ("losses", "align", "student", "train"):
        lines = Path(folder, f"{module}.py").read_text(encoding="utf-8").splitlines()
        count = lines.index(FENCE) if FENCE in lines else len(lines)
        text = re.sub(rf"(`{module}\.py` \()\d+", rf"\g<1>{count}", text, count=1)
    readme.write_text(text, encoding="utf-8")


def main(argv):
    """Write the solved copy that the command line asks for; one line and status 2 if it cannot."""
    usage = (f"python -m tests.exercises.solutions N FOLDER, with an N of "
             f"{', '.join(map(str, SOLUTIONS))} and a FOLDER that is not there yet")
    if len(argv) != 2 or argv[0] not in map(str, SOLUTIONS) or Path(argv[1]).exists():
        print(usage, file=sys.stderr)
        return 2
    number, folder = argv
    copy_project(folder)
    try:
        solve(int(number), folder)
    except ValueError as error:
        shutil.rmtree(folder)
        print(f"{error}: was this project changed already?", file=sys.stderr)
        return 2
    page, = Path(folder, "tests", "exercises").glob(f"{number}_*.py")
    print(f"wrote {folder}; cd {folder} and python -m pytest tests/exercises/{page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
