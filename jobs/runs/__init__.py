"""The folder of a run: who may work in it, what it holds, what a person sees of it."""
