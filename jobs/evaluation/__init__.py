"""How good a model is: at choosing, at predicting text, at answering."""
