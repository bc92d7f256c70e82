"""Slurm: the script of a batch job, a Ray on the nodes of one, and tasks of srun as ranks."""
