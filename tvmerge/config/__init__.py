"""The configuration of a run: the flags of the command line, the keys of its YAML file. One file per command."""

from tvmerge.config.dashboard import DashboardConfig
from tvmerge.config.jglue import JglueConfig
from tvmerge.config.merge import ApplyConfig, MergeConfig
from tvmerge.config.moe import MoeConfig
from tvmerge.config.mt_bench import MtBenchConfig, PlanConfig
from tvmerge.config.push import PushConfig
from tvmerge.config.search import SearchConfig
from tvmerge.config.worker import WorkerConfig

__all__ = [
    "ALIASES",
    "LIST_SETTINGS",
    "SWITCHES",
    "ApplyConfig",
    "DashboardConfig",
    "JglueConfig",
    "MergeConfig",
    "MoeConfig",
    "MtBenchConfig",
    "PlanConfig",
    "PushConfig",
    "SearchConfig",
    "WorkerConfig",
]

#: Settings that take several values on the command line: `--tuned_model a b`.
LIST_SETTINGS = frozenset(
    {"target_model", "tuned_model", "weight_groups", "freeze", "task_metric", "task_weight", "loggers"}
)
#: Settings that are switched on by their name alone: `--apply_chat_template`.
SWITCHES = frozenset({"apply_chat_template", "share_weights", "search_gate", "save_experts", "private", "dry_run"})
#: Other names of flags, as older scripts write them.
ALIASES = {"--judge_model": "--judge_model_name", "--max_new_tokens": "--max_new_token"}
