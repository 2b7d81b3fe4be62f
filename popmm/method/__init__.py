"""The method as pure functions on tensors, to be read with the paper in hand. Knows no module and no model."""
