"""moray trains Mixture-of-Experts and dense GPTs on Ray."""
