"""Every setting of a run, once: typed, with its default, unit and meaning.

Nothing here imports torch, ray, vllm or deepspeed, so that a bad config is refused before anything heavy starts.
"""

from dprlhf_ray.config.algorithm import AlgorithmConfig, GenerationConfig, OptimizerConfig
from dprlhf_ray.config.data import BudgetConfig, DataConfig
from dprlhf_ray.config.model import AdapterConfig, ModelConfig
from dprlhf_ray.config.privacy import PrivacyConfig
from dprlhf_ray.config.resources import LearnerConfig, RayConfig, RolloutConfig
from dprlhf_ray.config.run import EvaluationConfig, RunConfig, TrackingConfig
from dprlhf_ray.config.scorer import ScorerConfig
from dprlhf_ray.config.section import Section
from dprlhf_ray.config.stages import STAGES, AnyStage, RewardModelStage, RLStage, SFTStage, Stage

__all__ = [
    "AdapterConfig",
    "AlgorithmConfig",
    "AnyStage",
    "BudgetConfig",
    "DataConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "LearnerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrivacyConfig",
    "RLStage",
    "RayConfig",
    "RewardModelStage",
    "RolloutConfig",
    "RunConfig",
    "SFTStage",
    "STAGES",
    "ScorerConfig",
    "Section",
    "Stage",
    "TrackingConfig",
]
