"""dprlhf_ray: reinforcement learning from human feedback on private data, with a guarantee, at scale."""

__version__ = "0.1.0"
