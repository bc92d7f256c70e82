"""Runs in which any part dies, on several nodes of a real Ray on one machine, and what must hold after each of them."""
