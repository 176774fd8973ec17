"""The examples of launches: each is parsed and run dry, and the commands that come of it have only known options."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from ropo.cli.arguments import parse_train
from ropo.cli.launcher import CONFIGS, LaunchArguments, arguments_of
from ropo.sampling.engines import ENGINES

EXAMPLES = Path(__file__).parents[2] / "examples"
SBATCH = sorted(EXAMPLES.glob("slurm/*.sbatch"))
CONFIG_NAMES = {"one_gpu", "ddp", "fsdp2", "zero2", "zero3", "qlora"}
# What each stand-in is called with becomes a line of a file; srun runs its command on each node.
_SAY = 'python3 -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@" >> "$SAID"'
STAND_INS = {
    "ropo": _SAY,
    "vllm": f"{_SAY}; exec /bin/sleep 60",
    "scontrol": "echo node-a; /bin/sleep 0.2; echo node-b",  # as slowly as for a large cluster
    "srun": """while [[ $1 == --* ]]; do shift; done
for i in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$i "$@"; done""",
    "sleep": '/bin/sleep 0.5; touch "$OUTPUT.done"',  # of the node that serves: the training ends meanwhile
}


@pytest.fixture
def dry(tmp_path):
    """Runs a script with the stand-ins, and says what they were called with."""
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script, **environment):
        said = tmp_path / "said"
        said.unlink(missing_ok=True)
        paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SAID": str(said)}
        done = subprocess.run(
            ["bash"], input=script, text=True, env={**os.environ, **paths, **environment}, cwd=tmp_path, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return [json.loads(line) for line in said.read_text().splitlines()]

    return run


def read(words):
    """The options that a command line means; a config that does not exist, or a misspelt option, is refused."""
    command, *rest = words
    assert command == "train"
    given, args = parse_train([*rest, "--use_cpu"])
    launched = arguments_of(given, command, rest)
    return given, args, launched


@pytest.mark.parametrize("name", sorted(CONFIG_NAMES))
def test_accelerate_understands_the_configs(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.mixed_precision == "no"  # the options of the run say which
    known = vars(launch_command_parser().parse_args(["script"]))
    assert not [key for key in {**config.fsdp_config, **config.deepspeed_config} if key not in known]
    launched = arguments_of(LaunchArguments(accelerate_config=name, num_processes=1), "train", ["--beta", "0.1"])
    if name == "one_gpu":
        assert launched is None
    else:
        assert launched.training_script_args == ["train", "--beta", "0.1"]
        assert (launched.training_script, launched.module) == ("ropo", True)


def test_the_readme_names_all_configs():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == CONFIG_NAMES
    text = (EXAMPLES / "accelerate" / "README.md").read_text()
    assert not [name for name in CONFIG_NAMES if f"| `{name}` |" not in text]


def test_slurm_on_one_node(dry):
    [words] = dry((EXAMPLES / "slurm" / "one_node.sbatch").read_text(), SLURM_NNODES="1")
    given, args, _ = read([*words, "--num_processes", "8"])
    assert (given.accelerate_config, args.output_dir) == ("fsdp2", "outputs/aligned")


def test_slurm_on_several_nodes(dry):
    script = (EXAMPLES / "slurm" / "several_nodes.sbatch").read_text()
    called = dry(script, SLURM_NNODES="2", SLURM_JOB_NODELIST="node-[a-b]", SLURM_JOB_ID="41234")
    assert len(called) == 2
    for rank, words in enumerate(called):
        *_, launched = read([*words, "--num_processes", "16"])
        assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (rank, 2, 16)
        assert (launched.main_process_ip, launched.main_process_port) == ("node-a", 29734)


def test_skypilot(dry, tmp_path):
    task = yaml.safe_load((EXAMPLES / "skypilot" / "several_nodes.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "volumes", "envs", "setup", "run"}
    environment = {
        **task["envs"], "OUTPUT": str(tmp_path / "aligned"), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3",
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }  # fmt: skip
    for rank in (0, 1):
        [words] = dry(task["run"], **environment, SKYPILOT_NODE_RANK=str(rank))
        _, args, launched = read([*words, "--num_processes", "16"])
        assert (launched.machine_rank, launched.num_machines) == (rank, 2)
        assert launched.main_process_ip == "10.0.0.1"
        assert args.generation_url == "http://10.0.0.3:8000/v1"
    [words] = dry(task["run"], **environment, SKYPILOT_NODE_RANK="2")
    assert words[:2] == ["serve", task["envs"]["MODEL"]]
    assert words[words.index("--served-model-name") + 1] == args.generation_model


def test_ray():
    spec = importlib.util.spec_from_file_location("several_nodes", EXAMPLES / "ray" / "several_nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = module.parse(["--model", "M", "--data", "D", "--output", "O"])
    program, *words = module.train_words(given, rank=1, head="10.0.0.1", server="10.0.0.3")
    assert program == "ropo"
    _, args, launched = read(words)
    assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (1, 2, 16)
    served = module.serve_words(given)
    assert served[served.index("--served-model-name") + 1] == args.generation_model
    assert args.generation_engine in ENGINES
    assert args.generation_url == f"http://10.0.0.3:{served[served.index('--port') + 1]}/v1"


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_slurm_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert path.read_text().startswith("#!/bin/bash\n")
