"""Proves on your own machines, in your own configuration, that the weights depend on the global batch alone.

    accelerate launch <your configuration> -m accel_weighting.selfcheck

Trains a small model for a few steps with GradNorm, CoVWeighting and RotoGrad under the engine, the precision and the
processes that the launcher gave, and compares statistics, weights, rotations and the model with the same training done
by hand: one process, the whole batch, float64, no engine and no weighter. Then it times what weighting costs. Exits
with 0 if all is right and with 1 if not, on every process.
"""
