"""`ropo` as a launcher starts it on GPUs, but on CPUs; what its memory came to is written where MEMORY_FILE says.

`accelerate` takes FSDP only where it sees several GPUs. DeepSpeed would compile an operator for processes that share
memory, for which it needs a compiler and minutes; without it everything goes through gloo. The head's logits are made
in pieces of ten tokens, of which the processes then have different numbers.
"""

import ctypes
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

from accelerate import state
from accelerate.utils import DistributedType

from ropo.logps import response_head, score
from ropo.models.sharding import local_part
from ropo.train import trainer


def take_for_gpus() -> None:
    """Have `accelerate` shard over these processes."""
    begin = state.PartialState.__init__

    def as_on_gpus(self, *args, **options):
        begin(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_on_gpus


def compile_nothing() -> None:
    """Have DeepSpeed do without its operator for shared memory."""
    import deepspeed  # noqa: F401, PLC0415 - where it is installed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def anonymous_mib() -> int:
    """What this process holds itself: without files that are mapped, as those of the weights are."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024


def watch_memory(path: Path) -> None:
    """Write what this process held while it scored and while it trained, in MiB.

    `weights` are those of its parameters between forward passes; `peak` is the most of everything in memory, beyond
    what it held when it began. `passes` counts calls.
    """
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, which else grows: what is freed is given back
    before, at, found = anonymous_mib(), ["start"], {}

    def watched(function, name):
        def run(model, *args, **options):
            here = sum(local_part(one).nbytes for one in model.parameters()) / 2**20
            found[f"weights {name}"] = max(found.get(f"weights {name}", 0), here)
            found[f"passes {name}"] = found.get(f"passes {name}", 0) + 1
            at.append(name)
            try:
                return function(model, *args, **options)
            finally:
                at.append("between")
                path.write_text(json.dumps(found))

        return run

    def watch():
        while True:
            found[f"peak {at[-1]}"] = max(found.get(f"peak {at[-1]}", 0), anonymous_mib() - before)
            time.sleep(0.02)

    score._forward_if_it_fits = watched(score._forward_if_it_fits, "scoring")
    loss = trainer.ROPOTrainer.training_step
    trainer.ROPOTrainer.training_step = lambda self, model, *rest: watched(partial(loss, self), "training")(
        model, *rest
    )
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    response_head.LOGITS_BUDGET_BYTES["cpu"] = 4 * 300 * 10
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_for_gpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        compile_nothing()
    if "MEMORY_FILE" in os.environ:
        watch_memory(Path(f"{os.environ['MEMORY_FILE']}.{os.environ.get('RANK', '0')}"))
    from ropo.cli.main import main

    sys.exit(main())
