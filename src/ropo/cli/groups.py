"""Which options a help page shows, and under which title.

In: nothing. Out: tables of names. A name that no option has is passed over, so that a table need not change with every
option.
"""

from collections.abc import Mapping
from types import MappingProxyType

Groups = Mapping[str, tuple[str, ...]]

AUDIT: Groups = {
    "Model and data": (
        "model_name_or_path", "dataset_name", "dataset_split", "annotator_column", "max_length", "on_bad_rows",
    ),
    "Noise and audit": (
        "num_folds", "scorer", "length_is_evidence", "rho", "decision_rule", "trusted", "decisions",
    ),
    "Training of the fold models, with --scorer models": (
        "learning_rate", "num_train_epochs", "per_device_train_batch_size", "use_peft",
    ),
    "Device and memory": ("bf16", "use_cpu", "dtype", "load_in_4bit", "max_tokens_per_batch", "seed"),
    "Output": ("output_dir", "config", "dry_run", "reference_cache_dir"),
}  # fmt: skip
TRAIN: Groups = {
    "Model and data": ("model_name_or_path", "dataset_name", "dataset_split", "eval_dataset_name", "max_length"),
    "Loss": ("loss", "beta", "alpha", "loss_args"),
    "Noise and audit": ("rho", "decision_rule", "num_folds", "scorer", "audit_from", "trusted", "decisions"),
    "Training": (
        "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "use_peft",
        "load_in_4bit", "bf16", "use_cpu", "rounds", "num_candidates", "seed",
    ),
    "Output": ("output_dir", "config", "dry_run"),
}  # fmt: skip
EVERY: Groups = MappingProxyType(
    {
        "Data": (
            "dataset_config", "dataset_data_dir", "eval_dataset_split", "prompt_column", "chosen_column",
            "rejected_column", "annotator_column", "weight_column", "on_bad_rows", "max_samples",
        ),
        "Model and adapter": (
            "dtype", "attn_implementation", "model_revision", "trust_remote_code", "load_in_8bit",
            "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "use_bnb_nested_quant", "peft_config", "lora_r",
            "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora",
            "merge_adapter",
        ),
        "Loss": ("loss", "beta", "adapt_beta", "alpha", "loss_args", "sft_weight", "router_aux_loss_coef"),
        "Scoring": ("length_is_evidence", "max_tokens_per_batch", "reference_cache_dir"),
        "Rounds and resampling": (
            "round_start", "sample_from", "max_new_tokens", "temperature", "top_p", "selection_rule", "max_abs_margin",
            "max_length_ratio", "max_repetition", "max_copies", "max_resampled_share", "resampled_weight",
            "resampled_decay", "generation_engine", "generation_url", "generation_model", "generation_api_key_env",
        ),
        "Processes": (
            "accelerate_config", "num_processes", "num_machines", "machine_rank", "main_process_ip",
            "main_process_port",
        ),
        "Judge": ("judge", "judge_model", "judge_url", "judge_api_key_env", "judge_on_failure"),
        "Optimizer, checkpoints and log": (
            "lr_scheduler_type", "warmup_steps", "train_sampling_strategy", "liger_kernel_config", "save_strategy",
            "save_total_limit", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "disable_tqdm",
        ),
        "Upload, when asked for": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token"),
    }
)  # fmt: skip
"""The options that `--help_all` adds, before those of `TrainingArguments`."""

REFUSED = (
    "label_smoothing_factor", "torch_compile", "torch_compile_backend", "torch_compile_mode", "remove_unused_columns",
    "save_only_model", "ignore_data_skip", "auto_find_batch_size", "enable_jit_checkpoint", "resume_from_checkpoint",
    "load_best_model_at_end", "neftune_noise_alpha",
)  # fmt: skip
"""Options of `TrainingArguments` that a run refuses; the refusal says what there is instead."""

IDLE = (  # that do nothing in a run, since they belong to what is refused, to labels of tokens or to other programs
    "hub_strategy", "hub_always_push",
    "metric_for_best_model", "greater_is_better", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "prediction_loss_only", "label_names", "length_column_name", "average_tokens_across_devices",
    "include_num_input_tokens_seen", "do_train", "do_eval", "do_predict", "local_rank", "parallelism_config",
    "restore_callback_states_from_checkpoint", "bf16_full_eval", "fp16_full_eval",
)  # fmt: skip
OLD_NAMES = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # of activation_checkpointing; shown as that
ONLY_IN_TRAIN = (
    "eval_dataset_name", "eval_dataset_split", "rounds", "num_candidates", "audit_from", "merge_adapter",
)  # fmt: skip

# Where `TrainingArguments` says less than there is to say about the options that are shown first.
TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "output_dir": "Folder that everything is written to. Rerun the same command to resume there.",
        "config": "YAML file whose keys are options; what stands on the command line wins.",
        "per_device_train_batch_size": "Pairs in a batch, on each device.",
        "gradient_accumulation_steps": "Batches in an optimizer step.",
        "bf16": "Compute in bfloat16 (mixed precision).",
        "use_cpu": "Use no GPU.",
        "seed": "Random seed.",
        "report_to": "Where the log goes as well: tensorboard, wandb, ...; none or all.",
    }
)
