"""Before a long run: what a step costs, which recipe fits a machine, and twenty real steps examined."""
