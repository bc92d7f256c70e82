"""Where it is computed: layouts, meshes, tensor and expert parallelism, gradients, checkpoints."""
