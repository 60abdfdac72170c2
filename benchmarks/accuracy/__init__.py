"""How good the predictions and intervals are, on published splits, beside published numbers."""
