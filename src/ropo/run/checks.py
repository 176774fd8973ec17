"""What a single training may do and a whole run cannot.

In: a `ROPOConfig`. Out: nothing, or a refusal before anything is read.
"""

from transformers import IntervalStrategy, SchedulerType

from ropo.config import ROPOConfig
from ropo.run.hub import check_upload
from ropo.train.checks import AFTER_EVALUATION, check_training
from ropo.train.sharding import sharder

# Options of `Trainer` with which a training that is stopped would end in other weights, or be taken for finished.
_NOT_RESUMED = {
    "save_only_model": "leaves the optimizer out of checkpoints",
    "ignore_data_skip": "trains on the first pairs of an epoch again",
    "auto_find_batch_size": "changes the batch on the way",
    "enable_jit_checkpoint": "ends a training early at SIGTERM as if it were done",
}


def check_run(args: ROPOConfig, *, has_evaluation: bool) -> None:
    """Refuse before anything is read what a single training may do and a whole run cannot.

    Args:
        args: Options.
        has_evaluation: Whether the run is given an evaluation set, or would not read one.

    Raises:
        ValueError: If there are several GPUs in this process, or an option asks for what a run has not or does not do.
    """
    check_training(args)
    if args.num_candidates and args.generation_engine == "transformers" and sharder(args) is not None:
        raise ValueError(
            f"generation_engine transformers needs the whole model in each process; got weights sharded by "
            f"{args.sharding}, and num_candidates {args.num_candidates}. Sample from a server (generation_engine "
            "server), or leave num_candidates out."
        )
    for name, reason in _NOT_RESUMED.items():
        if getattr(args, name):
            raise ValueError(
                f"A run that is stopped resumes as if it had not been; got {name}, which {reason}. Leave it out."
            )
    if args.resume_from_checkpoint is not None:
        raise ValueError("Rerun the same command to resume a run; got resume_from_checkpoint. Leave it out.")
    if args.eval_strategy != "no" and not has_evaluation:
        raise ValueError(
            f"eval_strategy {IntervalStrategy(args.eval_strategy).value} needs an evaluation set; got none. Name it by "
            "eval_dataset_name (in Python: eval_dataset)."
        )
    if args.eval_on_start and args.eval_strategy == "no":
        raise ValueError("eval_on_start needs eval_strategy steps or epoch; got no. Add it.")
    schedule = SchedulerType(args.lr_scheduler_type).value
    if schedule in AFTER_EVALUATION:
        raise ValueError(
            f"A run trains the same model whatever it is evaluated on; got lr_scheduler_type {schedule}, which follows "
            "an evaluation. Take another, or use ROPOTrainer."
        )
    for name, is_asked in (
        ("save_strategy best", args.save_strategy == "best"),
        ("load_best_model_at_end", args.load_best_model_at_end),
    ):
        if is_asked:
            raise ValueError(
                f"A run takes the model that a training ends with; got {name}. Leave it out, or use ROPOTrainer."
            )
    check_upload(args)
