"""All targets, in the order of the table."""

from fuzz import captions, datasets, models, weights

ALL = [*datasets.TARGETS, *captions.TARGETS, *weights.TARGETS, *models.TARGETS]
