"""One training, one trial and its row, a folder of trials, and methods × budgets × seeds."""
