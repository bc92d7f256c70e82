"""Who computes: worker processes under Ray, torchrun or alone, and their recovery. Knows nothing of training."""
