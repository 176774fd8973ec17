"""Kill a run anywhere, give the same command again, and compare what it leaves with a run that was never killed.

    python benchmarks/kills.py --kills 30            # `make kill-test`
    python benchmarks/kills.py --kills 200 --write   # by hand: kills.json and the table in docs/reliability.md

A run is `ropo train` on a tiny model: an audit, two rounds of two epochs, resampling, an evaluation set. It is killed
(SIGKILL, once to three times) after a random time, or right before something it does to a file of its output folder; or
the disk fills up, by a limit to the size of a file or a small tmpfs (where the system lets one be mounted), at a random
moment. Each loss that has a state of its own is trained, with the default checkpoints and with one at every step.
Identical are: every weight, the ledger, the summary but for its times, every file that later stages read, and the list
of all files. Everything is imported once; each run is a fork.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import math
import mmap
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ropo.cli.main import main
from ropo.provenance import hash_file, is_leftover, versions
from ropo.train.checkpoints import MARKER

FIGURES = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- kills: begin, made by benchmarks/kills.py -->", "<!-- kills: end -->"

LOSSES = ("ropo", "dpo", "re_po", "gamma_po", "plc_dpo")
CHECKPOINTS = {"default": (), "every step": ("--save_strategy=steps", "--save_steps=1")}
KINDS = {
    "random time": "SIGKILL after a random time",
    "file event": "SIGKILL right before a file is opened, written, synced, renamed or removed",
    "file size": "no room: a file may not grow beyond a random size, from a random file event on",
    "small disk": "no room: a tmpfs of a random size",
}
OPTIONS = (
    "--learning_rate=3e-3", "--per_device_train_batch_size=6", "--logging_steps=1", "--num_train_epochs=2",
    "--max_length=64", "--max_new_tokens=8", "--num_candidates=3", "--use_cpu=true", "--disable_tqdm=true", "--rho=0.3",
    "--max_length_ratio=30", "--rounds=2", "--num_folds=2", "--decision_rule=lowest_loss", "--max_repetition=1.0",
    "--max_resampled_share=1.0", "--selection_rule=uncertainty_aware", "--sample_from=policy",
)  # fmt: skip
SHARES = {"random time": 0.35, "file event": 0.45, "file size": 0.1, "small disk": 0.1}
STAGE_FOLDERS = ("00", "01", "audit", "models")  # of which every file must be identical
NOT_TRIED = "the system does not let us mount a tmpfs"
LONGEST = 300.0  # seconds; no run of these takes a tenth of it


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    said: str


class Events:
    """What a process does to files under a folder, counted; at one of these events something is done to it.

    Args:
        folder: Watched in all its depth.
        at: The number of the event, from 1; 0 only counts.
        act: What is done, right before the event.
    """

    def __init__(self, folder: Path, at: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self._folder, self._at, self._act = str(folder), at, act
        self._shared = mmap.mmap(-1, 8)  # of both processes

    @property
    def count(self) -> int:
        """Events so far."""
        number: int = struct.unpack("q", self._shared[:8])[0]
        return number

    def watch(self) -> None:
        """Begin; only in the process that is to be watched, since a hook stays to its end."""
        sys.addaudithook(self._hook)
        for module, name, place in ((torch, "save", 1), (safetensors.torch, "serialize_file", 1), (os, "fsync", 0)):
            setattr(module, name, self._around(getattr(module, name), place))

    def _around(self, inner: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Writers in C++ and Rust tell no hook, so there is an event before they write and one after."""

        def watched(*given: Any, **options: Any) -> Any:
            path = given[place]
            self._event(str(Path(f"/proc/self/fd/{path}").readlink()) if isinstance(path, int) else str(path))
            found = inner(*given, **options)
            self._event(str(path))
            return found

        return watched

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._event(given[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            self._event(str(given[0]))

    def _event(self, path: str) -> None:
        if path.startswith(self._folder):
            self._shared[:8] = struct.pack("q", self.count + 1)
            if self.count == self._at:
                self._act()


def start(words: list[str], prepare: Callable[[], None] = lambda: None, *, kill_after: float = LONGEST) -> Ended:
    """Run the command in a fork of this process, and kill it after some seconds if it still runs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            for stream in (1, 2, writer):
                os.dup2(writer, stream)
            prepare()
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    said, end = b"", time.monotonic() + kill_after
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            end = math.inf
        elif more := os.read(reader, 65536):
            said += more
        else:
            break
        end = min(end, time.monotonic() + LONGEST)
    os.close(reader)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode(errors="replace"))


def contents(folder: Path) -> dict[str, str]:
    """Every file that a run leaves; with its digest where it holds no time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or "reference_cache" in path.parts:  # its shards have random names
            continue
        if path.name == "summary.json":
            summary = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
            found[name] = hashlib.sha256(json.dumps(summary).encode()).hexdigest()
        elif path.suffix in (".safetensors", ".parquet", ".jsonl") or path.parent.name in STAGE_FOLDERS:
            found[name] = "" if path.name == "manifest.json" else hash_file(path)
        else:
            found[name] = ""
    return found


@dataclass(frozen=True)
class Case:
    """One command, and what it leaves when nothing happens to it.

    Attributes:
        words: The command.
        folder: Its output folder.
        whole: `contents` of it.
        seconds: How long it took.
        num_events: What it did to files.
        num_bytes: What it took on the disk at its end.
    """

    words: list[str]
    folder: Path
    whole: dict[str, str]
    seconds: float
    num_events: int
    num_bytes: int

    def difference(self, ended: Ended) -> str:
        """What the last run of a trial left otherwise than the whole one; empty where it is identical."""
        if ended.code != 0:
            return f"stuck with exit code {ended.code}: {ended.said[-2000:]}"
        found = contents(self.folder)
        names = sorted({*found, *self.whole})
        wrong = [name for name in names if found.get(name) != self.whole.get(name)]
        return f"different: {', '.join(wrong)}" if wrong else ""


def make_case(made: Path, loss: str, checkpoints: str) -> Case:
    """Run a command once, in peace."""
    folder = made / "run"
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        "train", f"--model_name_or_path={made / 'model'}", f"--dataset_name={made / 'pairs.jsonl'}",
        f"--eval_dataset_name={made / 'eval.jsonl'}", f"--output_dir={folder}", f"--loss={loss}", *OPTIONS,
        *CHECKPOINTS[checkpoints],
    ]  # fmt: skip
    events, begin = Events(folder), time.monotonic()
    ended = start(words, events.watch)
    if ended.code:
        sys.exit(f"The run that nobody kills ended with exit code {ended.code}:\n{ended.said}")
    seconds = time.monotonic() - begin
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Case(words, folder, contents(folder), seconds, events.count, size)


def kill(case: Case, chance: random.Random, *, is_event: bool, most: int) -> tuple[int, str]:
    """Kill a run once or more, then let it end.

    Returns:
        How often it was killed, and how it differs.
    """
    shutil.rmtree(case.folder, ignore_errors=True)
    num_kills = 0
    for _ in range(min(most, chance.choice((1, 1, 2, 3)))):
        if is_event:
            at = chance.randint(1, case.num_events)
            events = Events(case.folder, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            ended = start(case.words, events.watch)
        else:
            ended = start(case.words, kill_after=chance.uniform(0.02, case.seconds))
        if ended.code != -signal.SIGKILL:  # it was done before
            if ended.code or num_kills:
                return num_kills, case.difference(ended)
            continue
        num_kills += 1
    return num_kills, case.difference(start(case.words)) if num_kills else ""


def fill(case: Case, chance: random.Random) -> tuple[int, str]:
    """Let no file grow beyond a size, from an event on; then make room."""
    shutil.rmtree(case.folder, ignore_errors=True)
    size = int(math.exp(chance.uniform(math.log(100), math.log(30_000))))
    events = Events(
        case.folder,
        chance.randint(1, case.num_events),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)),
    )
    ended = start(case.words, events.watch)
    if ended.code == 0:  # nothing that large was left to write
        return 0, case.difference(ended)
    return 1, _complaint(case, ended) or case.difference(start(case.words))


def _complaint(case: Case, ended: Ended) -> str:
    """What is wrong with how a run ended that had no room; empty where it said so and cleared up."""
    if ended.code != 1 or "Make room" not in ended.said or "Traceback" in ended.said:
        return f"no sentence, exit code {ended.code}: {ended.said[-2000:]}"
    halves = [path for path in case.folder.rglob("checkpoint-*") if not (path / MARKER).exists()]
    left = [*halves, *(path for path in case.folder.rglob("*") if is_leftover(path))]
    return f"left behind: {left}" if left else ""


def fill_disk(case: Case, chance: random.Random) -> tuple[int, str]:
    """Run on a disk that is too small; then make it larger. A process of its own, to which alone it is mounted."""
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir()
    size = int(case.num_bytes * chance.uniform(0.15, 1.3))
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        found: tuple[int, str] = (0, NOT_TRIED)
        try:
            if _mount(case.folder, f"size={size}"):
                ended = start(case.words)
                if ended.code == 0:
                    found = 0, case.difference(ended)
                else:
                    complaint = _complaint(case, ended)
                    _mount(case.folder, "size=64m", again=True)
                    found = 1, complaint or case.difference(start(case.words))
        finally:
            os.write(writer, json.dumps(found).encode()[:60_000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        num, difference = json.loads(file.read())
    os.waitpid(pid, 0)
    return num, difference


def _mount(folder: Path, options: str, *, again: bool = False) -> bool:
    """Mount a tmpfs for this process alone; False where the system does not let us."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private, remount = 0x00020000, 0x40000 | 0x4000, 0x20
    if not again and (libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None)):
        return False
    how = remount if again else 0
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", how, options.encode())


def make_inputs(made: Path) -> None:
    """A tiny model with a byte-level tokenizer, twelve pairs to train on and four to evaluate."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape, **special))
    policy.save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    chance = random.Random(0)
    words = ["the", "soup", "was", "good", "bad", "slow", "kind", "very", "not", "and", "it", "loud", "cold"]
    rows = [
        {
            "prompt": f"{i}: {' '.join(chance.choices(words, k=2))}?",
            "chosen": f" {' '.join(chance.choices(words, k=chance.randint(1, 4)))}",
            "rejected": f" {' '.join(chance.choices(words, k=chance.randint(4, 7)))}",
            "annotator": chance.choice(("ann", "bob")),
        }
        for i in range(16)
    ]
    for name, some in (("pairs.jsonl", rows[:12]), ("eval.jsonl", rows[12:])):
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in some))


@dataclass(frozen=True)
class Figures:
    """By kind: how often it was done, in how many runs, and how these ended; and what went wrong, in words."""

    kinds: dict[str, Counter[str]]
    failures: list[str]


def measure(num_kills: int, commands: Sequence[tuple[str, str]], *, seed: int) -> Figures:
    """Kill so many times, evenly over the kinds and commands."""
    found, chance = Figures({kind: Counter() for kind in KINDS}, []), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        made = Path(name).resolve()
        make_inputs(made)
        for number, command in enumerate(commands):
            case, begin = make_case(made, *command), time.monotonic()
            for kind, part in SHARES.items():
                goal = math.ceil(num_kills * part * (number + 1) / len(commands))  # of this kind, after this command
                _repeat(case, kind, goal, chance, found)
            total = sum(counts["kills"] for counts in found.kinds.values())
            told = f"{command[0]}, checkpoints {command[1]}: {case.num_events} file events, {case.seconds:.1f} s a run"
            print(f"[{total}/{num_kills}] {told}, all of it {time.monotonic() - begin:.0f} s", flush=True)
    return found


def _repeat(case: Case, kind: str, goal: int, chance: random.Random, found: Figures) -> None:
    """Until so much of this kind was done, or it does not happen any more."""
    counts = found.kinds[kind]
    for _ in range(20 + goal):
        missing = goal - counts["kills"]
        if missing <= 0:
            return
        if kind in ("random time", "file event"):
            num, difference = kill(case, chance, is_event=kind == "file event", most=missing)
        else:
            num, difference = (fill if kind == "file size" else fill_disk)(case, chance)
        if difference == NOT_TRIED:
            return
        is_stuck = difference.startswith(("stuck", "no sentence"))
        counts.update(kills=num, runs=bool(num), identical=bool(num) and not difference, stuck=is_stuck)
        if difference:
            found.failures.append(f"{kind}: {difference}")
            print(f"FAILED {' '.join(case.words)}\n{kind}: {difference}", flush=True)


def measure_side_by_side(num_kills: int, *, seed: int, num_jobs: int) -> Figures:
    """The same by several processes, each with its share of the commands."""
    commands = [(loss, how) for loss in LOSSES for how in CHECKPOINTS]
    jobs = []
    for job in range(num_jobs):
        reader, writer = os.pipe()
        if not os.fork():
            try:
                found = measure(-(-num_kills // num_jobs), commands[job::num_jobs], seed=seed + job)
                os.write(writer, json.dumps(vars(found)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        jobs.append(reader)
    total = Figures({kind: Counter() for kind in KINDS}, [])
    for reader in jobs:
        with os.fdopen(reader) as file:
            told = json.loads(file.read())
        total.failures.extend(told["failures"])
        for kind, counts in told["kinds"].items():
            total.kinds[kind].update(counts)
    return total


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| what happens | times | runs | identical at the end | stuck |", "|---|---|---|---|---|"]
    rows = {text: figures["kinds"][kind] for kind, text in KINDS.items()}
    names = ("kills", "runs", "identical", "stuck")
    rows["all"] = {name: sum(row.get(name, 0) for row in rows.values()) for name in names}
    lines += [f"| {text} | {' | '.join(str(row.get(name, 0)) for name in names)} |" for text, row in rows.items()]
    found, losses = figures["versions"], ", ".join(f"`{loss}`" for loss in figures["losses"])
    conditions = (
        f"Losses {losses}, each with the default checkpoints and with one at every "
        f"step. ropo {found['ropo']}, torch {found['torch']}, transformers {found['transformers']}."
    )
    return "\n".join([*lines, "", conditions])


def run() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill runs and compare.")
    parser.add_argument("--kills", type=int, default=30, help="How often.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    parser.add_argument("--jobs", type=int, default=min(len(os.sched_getaffinity(0)), 8), help="Processes.")
    parser.add_argument("--write", action="store_true", help="Write kills.json and the table in docs/reliability.md.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # every load of a model collects garbage; what the imports have made need not be searched
    begin = time.monotonic()
    found = measure_side_by_side(given.kills, seed=given.seed, num_jobs=given.jobs)
    figures = {**vars(found), "losses": LOSSES, "seed": given.seed, "jobs": given.jobs, "versions": versions()}
    print(table(figures))
    if given.write:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{rest.partition(END)[2]}")
    killed = sum(counts["kills"] for counts in found.kinds.values())
    print(f"{killed} kills in {time.monotonic() - begin:.0f} s: {len(found.failures)} runs not identical.")
    return 1 if found.failures or not killed else 0


if __name__ == "__main__":
    sys.exit(run())
