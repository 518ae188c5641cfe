"""Metrics as `evaluate` modules. They are imported, not fetched: nothing is downloaded."""

from mergekit_moe.evaluation.metrics.retention import Retention, judged_by, what_is_lost
from mergekit_moe.evaluation.metrics.routing_accuracy import RoutingAccuracy
from mergekit_moe.evaluation.metrics.token_loss import TokenLoss

__all__ = ["Retention", "RoutingAccuracy", "TokenLoss", "judged_by", "what_is_lost"]
