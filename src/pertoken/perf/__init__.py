"""Prediction: what a model does on a GPU. `predict` answers a point, `search` finds the best one for a workload."""
