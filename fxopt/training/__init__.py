"""What leads from training to deployment: batch norms over the batches of all processes."""

from fxopt.training.sync_batchnorm import SynchronisedModel, deployed, sync_batchnorm

__all__ = ["SynchronisedModel", "deployed", "sync_batchnorm"]
