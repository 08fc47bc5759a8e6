"""Starts from data: `initialize` is the call, `trainer` makes it for a Trainer. `batches` and `loss` check what the
user gives, `guard` keeps the model as it was. `gradient` and `activations` say which subspaces a batch points to,
`reduction` gathers them over batches and processes within a bound of memory."""
