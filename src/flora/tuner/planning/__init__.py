"""Which weights an adapter trains, and at which ranks: `targets` finds them, `left_out` says why others are not among
them, `values` solves the budget, `plan` is the result, `saved` lets a file's tensors decide."""
