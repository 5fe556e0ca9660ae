"""Lower bounds on epsilon by attack: they prove no guarantee, but can prove a defect."""

from dprlhf_ray.audit.bounds import Reading, power
from dprlhf_ray.audit.canary import AuditReport, audit

__all__ = ["AuditReport", "Reading", "audit", "power"]
