"""One model made out of another."""
