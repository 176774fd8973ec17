"""Train on several nodes of a Ray cluster, with vLLM servers of the reference on one more node for sampling.

    ray job submit --working-dir . -- python examples/ray/several_nodes.py \
        --model Qwen/Qwen2.5-7B-Instruct --data /shared/pairs.jsonl --output /shared/outputs/aligned

ropo and vLLM must be installed on all nodes, and /shared is a file system that all of them mount.
"""

import argparse
import subprocess
import sys
import time

PORT = 8000


def train_words(given: argparse.Namespace, *, rank: int, head: str, server: str) -> list[str]:
    """The command of one training node, which starts a process per GPU."""
    return [
        "ropo", "train", "--accelerate_config", "fsdp2",
        "--num_machines", str(given.num_nodes), "--machine_rank", str(rank), "--main_process_ip", head,
        "--num_processes", str(given.num_nodes * given.gpus_per_node),
        "--model_name_or_path", given.model, "--dataset_name", given.data, "--output_dir", given.output,
        "--bf16", "--per_device_train_batch_size", "2",
        "--rounds", "2", "--num_candidates", "4", "--sample_from", "reference",
        "--generation_engine", "server", "--generation_url", f"http://{server}:{PORT}/v1",
        "--generation_model", "reference",
    ]  # fmt: skip


def serve_words(given: argparse.Namespace) -> list[str]:
    """The command of the node that samples: a copy of the model on each GPU, behind one address."""
    return [
        "vllm", "serve", given.model, "--served-model-name", "reference", "--port", str(PORT),
        "--data-parallel-size", str(given.gpus_per_node),
    ]  # fmt: skip


class Node:
    """A node of the cluster, which runs one command at a time."""

    def address(self) -> str:
        """Where the other nodes reach it."""
        import ray  # noqa: PLC0415 - only where Ray runs

        return ray.util.get_node_ip_address()

    def start(self, words: list[str]) -> None:
        """Start a command; it sees the GPUs that Ray gives this node."""
        self.process = subprocess.Popen(words)

    def exit_code(self) -> int | None:
        """Of the command; None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """Have the command end, if it has not."""
        self.process.terminate()
        self.process.wait(timeout=60)


def run(given: argparse.Namespace) -> int:
    """Start all nodes and wait for the end of the training; the first failure ends all."""
    import ray  # noqa: PLC0415

    ray.init()
    bundle = {"CPU": 1, "GPU": given.gpus_per_node} if given.gpus_per_node else {"CPU": 1}
    group = ray.util.placement_group([bundle] * (given.num_nodes + 1), strategy="STRICT_SPREAD")
    ray.get(group.ready())
    where = (
        ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, i) for i in range(given.num_nodes + 1)
    )
    kind = ray.remote(num_cpus=1, num_gpus=given.gpus_per_node)(Node)
    *training, serving = (kind.options(scheduling_strategy=one).remote() for one in where)
    head, server = ray.get([training[0].address.remote(), serving.address.remote()])
    ray.get(serving.start.remote(serve_words(given)))
    ray.get(
        [
            node.start.remote(train_words(given, rank=rank, head=head, server=server))
            for rank, node in enumerate(training)
        ]
    )
    try:
        while True:
            *codes, served = ray.get([node.exit_code.remote() for node in (*training, serving)])
            if served is not None or any(codes):
                return next(filter(None, (*codes, served)), 1)
            if None not in codes:
                return 0
            time.sleep(5)
    finally:
        ray.get([node.stop.remote() for node in (*training, serving)])


def parse(words: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--data", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--num_nodes", type=int, default=2, help="Of the training; one more node samples.")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(parse(sys.argv[1:])))
