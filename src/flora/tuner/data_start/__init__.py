"""Starts from data: `initialize` is the call, `trainer` makes it for a Trainer; `gradient` and `activations` say which
subspaces a batch points to, `reduction` gathers them over batches and processes within a bound of memory."""
