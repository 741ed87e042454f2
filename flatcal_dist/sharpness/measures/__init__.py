"""How sharp the loss is at the weights of a trained network."""

from flatcal_dist.sharpness.measures.loss import MeanLoss, MeasureError
from flatcal_dist.sharpness.measures.measure import Options, Sharpness, measure

__all__ = ["MeanLoss", "MeasureError", "Options", "Sharpness", "measure"]
