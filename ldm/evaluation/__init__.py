"""How good a trained model is, with sample counts and confidence intervals."""
